"""What scoring costs beside a bare forward loop over the same windows, and what the divergence adds.

    python benchmarks/evaluate.py [--windows 8] [--tokens 1024] [--outputs outputs] [--device cpu] [--dtype float32]

On the reference model. Every window is run in all four ways before the next one, so that a machine that slows down
slows all of them. On a CPU, processor time is counted, which other work on the machine hardly changes. The ratios are
of the totals, and in brackets of the fastest window of each. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qbench.evaluate import resident
from qbench.evaluate.score import WindowAsks
from qbench.sources.smollm2 import SmolLM2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--outputs", default="outputs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    config = SmolLM2()
    device, dtype = torch.device(asked.device), getattr(torch, asked.dtype)
    model = config.load(dtype, device, Path(asked.outputs) / "models").model
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (asked.windows, asked.tokens))
    seconds: dict[str, list[float]] = {"forward": [], "scored": [], "compared": [], "baseline": []}
    forward(model, ids[:1])
    for window in ids:
        one, asks = window[None], WindowAsks(window[None], 1, True)
        clock(seconds["forward"], device, lambda one=one: forward(model, one))
        clock(seconds["scored"], device, lambda asks=asks: resident.score(model, asks, "scored"))
        original: list[Any] = []
        keep = partial(resident.score, model, asks, "baseline", keep=True)
        clock(seconds["baseline"], device, lambda keep=keep, original=original: original.append(keep()))
        clock(seconds["compared"], device, partial(resident.score, model, asks, "compared", *original))
    totals = {name: sum(values) for name, values in seconds.items()}
    print(f"{asked.windows} windows of {asked.tokens} tokens, {asked.device}, {asked.dtype}")
    for name, over in (("scored", "forward"), ("compared", "scored"), ("baseline", "scored")):
        fastest = min(seconds[name]) / min(seconds[over])
        print(f"{name} / {over}: {totals[name] / totals[over]:.3f} (fastest: {fastest:.3f})")
    print(json.dumps({"seconds": totals, "threads": torch.get_num_threads()}))


@torch.inference_mode()
def forward(model: torch.nn.Module, ids: np.ndarray) -> None:
    model(torch.from_numpy(ids[:, :-1]).to(model.device), use_cache=False)


def clock(seconds: list[float], device: torch.device, run: Callable[[], object]) -> None:
    if device.type == "cpu":
        now = time.process_time
    else:

        def now() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

    started = now()
    run()
    seconds.append(now() - started)


if __name__ == "__main__":
    main()
