"""Self against self, and the floor: what the measures say of the reference model beside itself in every precision.

    python benchmarks/floor.py [OUTPUTS [DTYPE ...]] > docs/results/floor.json

`quantizer=none` must give differences and a KL of 0 and an agreement of 1, exactly. `quantizer=noise`, the original
with rounding noise of its precision, must give more than 0 and less than every 8-bit method. Exit status 1 where not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qbench.record.quality import EvaluationRecord, IntervalRecord
from qbench.report import entries

DTYPES = ("float32", "bfloat16", "float16")
SWEEPS = (
    "quantizer=none,noise,mxfp8,fp8,gguf/q8_0",
    "quantizer=rtn,hqq,sinq quantizer.nbits=8",
)
TASK = "model=smollm2-135m task=mini task.window=64 task.max_windows=4"


def exact(record: EvaluationRecord) -> bool:
    """Whether every measure of a model beside itself is what it must be."""
    divergence = record.divergence
    assert divergence is not None
    zero = [record.ppl_delta, divergence.true_token_rms_change.value, divergence.top1_agreement.value - 1]
    for value in asdict(divergence).items():
        name, found = value
        if name.startswith("kl") and not name.endswith("histogram"):
            zero.append(found["value"] if isinstance(found, dict) else found)
    zero += [getattr(part, key) for part in (*divergence.by_confidence, *divergence.by_position) for key in PART]
    return all(value == 0 for value in zero if value is not None)


PART = ("kl", "top1_changed")


def said(record: EvaluationRecord) -> dict[str, Any]:
    assert record.divergence is not None
    kl: IntervalRecord = record.divergence.kl
    return {"kl": kl.value, "kl_low": kl.low, "kl_high": kl.high, "ppl_delta": record.ppl_delta}


def measured(outputs: Path, dtype: str) -> dict[str, Any]:
    for sweep in SWEEPS:
        words = [*TASK.split(), *sweep.split(), f"runtime.dtype={dtype}", "runtime.device=cpu", f"outputs={outputs}"]
        subprocess.run([sys.executable, "-m", "qbench", "-m", *words], check=True, stdout=subprocess.DEVNULL)
    rows = {}
    for entry in entries.latest(entries.read(outputs).entries):
        if entry.identity.dtype == dtype:
            rows[entry.quantizer] = entry.result.evaluation[0]
    none, noise = rows.pop("none"), rows.pop("noise")
    eight = {name: said(record) for name, record in sorted(rows.items())}
    floor = said(noise)
    return {
        "dtype": dtype,
        "self_is_exact": exact(none),
        "floor": floor,
        "eight_bits": eight,
        "floor_is_below_all": 0 < floor["kl"] < min(row["kl"] for row in eight.values()),
    }


def main() -> None:
    outputs, *dtypes = sys.argv[1:] or ["outputs"]
    found = [measured(Path(outputs), dtype) for dtype in dtypes or DTYPES]
    print(json.dumps({"settings": TASK, "precisions": found}, indent=1))
    sys.exit(not all(one["self_is_exact"] and one["floor_is_below_all"] for one in found))


if __name__ == "__main__":
    main()
