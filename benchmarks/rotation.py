"""What a rotation of the input costs a W4 linear on one GPU: python benchmarks/rotation.py [-o FILE]

Correctness first, against fp64, for every batch and block, with the allocator's memory poisoned. Then microseconds per
call by CUDA-graph replay over more than 400 MB of weights, by turns: the linear without a rotation, with blocks of 64,
128 and 1024, and with 1024 by a kernel of the rotation's own in front of the linear: rotate.cu, hadamard.py. `more` is
the median, over the turns, of the time of a turn with the rotation over that without.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from timing import DEVICE, copies, random_weight, relative_error, times_together
from torch import Tensor

from qbench.format.rotation import Rotation
from qbench.kernels import cuda_rotate, hadamard, ops
from qbench.kernels.tiles import Tiles, to_tiles

SHAPES = ((12288, 4096), (4096, 12288), (4096, 4096))  # out x in
CHECKED = ((256, 4096), (200, 3072))
BATCHES = (1, 16, 64, 2048)
BLOCKS = (64, 128, 1024)
APART = {"1024 by rotate.cu": cuda_rotate.rotate, "1024 by hadamard.py": hadamard.rotate}
LIMIT = 1e-2  # of the relative error in bf16


def check(batches: list[int]) -> float:
    """The largest relative error; raises SystemExit naming the first case above LIMIT."""
    worst = 0.0
    for rows, columns in CHECKED:
        plain = random_weight(rows, columns, 4)
        for block in BLOCKS:
            weight = replace(plain, rotation=Rotation.seeded(columns, block, 0, DEVICE))
            tiles = to_tiles(weight)
            for batch in batches:
                x = torch.randn(batch, columns, dtype=torch.bfloat16, device=DEVICE)
                poison = torch.full((2**24,), float("nan"), device=DEVICE)
                del poison  # the next allocation gets this memory: what is not written stays NaN
                y = ops.linear(x, tiles)
                error = relative_error(y, x, weight)
                worst = max(worst, error)
                if not error <= LIMIT or not torch.equal(y, ops.linear(x, tiles)):
                    raise SystemExit(
                        f"{rows}x{columns} batch {batch} block {block}: error {error:.2e}, or not twice the same"
                    )
    return worst


def compile_all(batches: list[int]) -> None:
    """Every kernel once, on as many threads as there are cores: a compiler works on one core."""

    def use(case: tuple[Tiles, int, Rotation | None]) -> None:
        tiles, batch, rotation = case
        x = torch.zeros(batch, tiles.shape[1], dtype=torch.bfloat16, device=DEVICE)
        ops.linear(x, replace(tiles, rotation=rotation))

    cases = [
        (tiles, batch, rotation)
        for shape in (*CHECKED, *SHAPES)
        for tiles in [to_tiles(random_weight(*shape, 4))]
        for rotation in (None, *(Rotation.seeded(shape[1], block, 0, DEVICE) for block in BLOCKS))
        for batch in batches
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(use, cases))
    torch.cuda.synchronize()


def apart(rotate: Callable, x: Tensor, rotation: Rotation, tiles: Tiles) -> Tensor:
    """The same product, x rotated by a kernel of its own."""
    return ops.linear(rotate(x, rotation), tiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="write all rows as JSON")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    chosen = parser.parse_args()
    batches = [int(batch) for batch in chosen.batches.split(",")]
    torch.manual_seed(0)
    compile_all(batches)
    worst, gpu, rows = check(batches), torch.cuda.get_device_name(), []
    print(f"{gpu}; correct: largest error {worst:.1e}, every run twice the same")
    for out, columns in SHAPES:
        weight = random_weight(out, columns, 4)
        tiles = to_tiles(weight)
        weights = [replace(tiles, data=tiles.data.clone()) for _ in range(copies(weight.nbytes))]
        rotations = {0: None} | {block: Rotation.seeded(columns, block, 0, DEVICE) for block in BLOCKS}
        for batch in batches:
            x = torch.randn(batch, columns, dtype=torch.bfloat16, device=DEVICE)
            used = weights if batch <= 512 else weights[:4]
            calls = {
                block: [partial(ops.linear, x, replace(each, rotation=rotation)) for each in used]
                for block, rotation in rotations.items()
            }
            for name, rotate in APART.items():
                calls[name] = [partial(apart, rotate, x, rotations[BLOCKS[-1]], each) for each in used]
            times = times_together(calls, 41 if batch <= 512 else 21)
            for block, us in times.items():
                ratios = sorted(a / b - 1 for a, b in zip(us, times[0], strict=True))
                low, more, high = (ratios[int(len(ratios) * q)] for q in (0.1, 0.5, 0.9))
                rows.append(
                    {"out": out, "in": columns, "batch": batch, "block": block, "us": statistics.median(us)}
                    | {"more": more, "more_low": low, "more_high": high}
                )
                print(
                    f"{out}x{columns} batch {batch:5} block {block:19} {rows[-1]['us']:8.2f} us {more:+7.1%} "
                    f"(80 % of turns {low:+.1%} to {high:+.1%})",
                    flush=True,
                )
        if chosen.output:  # after every shape: a run that is cut off keeps what it has
            chosen.output.write_text(json.dumps({"gpu": gpu, "worst_error": worst, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
