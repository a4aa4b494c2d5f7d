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
from pathlib import Path

import numpy as np
import torch

from qbench.evaluate.divergence import CompareTop, KeepTop
from qbench.evaluate.score import token_nll
from qbench.sources.smollm2 import SmolLM2

TOPK = 64


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
        one = window[None]
        keep = KeepTop(1, asked.tokens - 1, TOPK)
        clock(seconds["forward"], device, lambda one=one: forward(model, one))
        clock(seconds["scored"], device, lambda one=one: token_nll(model, one, 1, "scored"))
        clock(seconds["baseline"], device, lambda one=one, keep=keep: token_nll(model, one, 1, "baseline", keep))
        compare = CompareTop(keep.ids, keep.log_probabilities, keep.log_tail, keep.most_probable, TOPK)
        clock(seconds["compared"], device, lambda one=one, c=compare: token_nll(model, one, 1, "compared", c))
    totals = {name: sum(values) for name, values in seconds.items()}
    print(f"{asked.windows} windows of {asked.tokens} tokens, {asked.device}, {asked.dtype}")
    for name, over in (("scored", "forward"), ("compared", "scored"), ("baseline", "scored")):
        fastest = min(seconds[name]) / min(seconds[over])
        print(f"{name} / {over}: {totals[name] / totals[over]:.3f} (fastest: {fastest:.3f})")
    print(json.dumps({"seconds": totals, "topk": TOPK, "threads": torch.get_num_threads()}))


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
