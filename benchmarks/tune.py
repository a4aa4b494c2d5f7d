"""Finds the block shape of every linear of the benchmarked models: python benchmarks/tune.py

Times a fixed set of candidates by CUDA-graph replay over rotated weights and writes the fastest ones to
qbench/kernels/plans/GPU.json, which the launcher reads; an empty entry stands for writing W and cuBLAS. Never run by
the library itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from shapes import FORMATS, SHAPES
from timing import copies, random_weight, time_together
from torch import Tensor

from qbench.kernels import cuda
from qbench.kernels.blocks import BUCKETS, NARROW, AnyPlan, Plan, PromptPlan, WidePlan, table_key
from qbench.kernels.tiles import COLUMNS, ROWS, Tiles, to_tiles

PLANS = Path(cuda.__file__).with_name("plans")


def candidates(M: int, N: int, K: int, tiles: Tiles) -> Iterator[AnyPlan]:
    properties = torch.cuda.get_device_properties(0)
    chunks = -(-K // COLUMNS)
    for found in (*narrow(M, N, chunks, properties.multi_processor_count), *wide(M, N, chunks), *prompt(M, tiles)):
        shared = found.shared_bytes(M, chunks, tiles.nbits, tiles.group_size, tiles.has_zero)
        if shared <= properties.shared_memory_per_block_optin:
            yield found


def narrow(M: int, N: int, chunks: int, sms: int) -> Iterator[Plan]:
    """Of dual_linear.cu."""
    if M > NARROW:
        return
    strips, blocks = -(-N // ROWS), 1 if M <= 8 else 2
    warps = [(rows, splits) for rows in (1, 2, 4, 8, 16) for splits in (1, 2, 4, 8, 16) if 4 <= rows * splits <= 16]
    for rt in (1, 2):
        for wr, wk in warps:
            for splits in (1, 2, 4, 8):
                for stages, ring in ((2, True), (3, True), (6, True), (2, False)):
                    found = Plan(blocks, rt, wr, wk, splits, stages, ring)
                    grid = -(-strips // (rt * wr)) * splits
                    if grid < sms // 3 or grid * wr * wk > 64 * sms:
                        continue
                    if chunks >= splits * wk * (1 if stages == 2 else 4):
                        yield found


def wide(M: int, N: int, chunks: int) -> Iterator[WidePlan]:
    """Of wide_linear.cu; up to 8 rows of x, its narrowest product would be half empty."""
    if not 8 < M <= 1024:
        return
    enough = next(size for size in (2, 4, 8, 16) if 8 * size >= min(M, 128))
    for blocks in {enough, max(2, enough // 2)}:
        for warpgroups, splits_in_block in ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)):
            for splits in (1, 2, 4, 8):
                for stages in (2, 3, 4, 6, 8, 9, 12):
                    fits = stages % splits_in_block == 0 and stages >= 2 * splits_in_block
                    fits = fits and splits * splits_in_block <= chunks
                    registers = 128 * warpgroups * splits_in_block * (8 * blocks // 2 + 56)
                    if fits and registers <= 65536 and warpgroups * 64 < N + 64:
                        yield WidePlan(blocks, warpgroups, splits_in_block, splits, stages)


def prompt(M: int, tiles: Tiles) -> Iterator[PromptPlan]:
    """Of prompt_linear.cu."""
    if M > 128:
        yield from (PromptPlan(*shape) for shape in ((32, 2, 1), (32, 2, 2), (24, 2, 1), (16, 3, 1)))


def calls_of(plan: AnyPlan | None, x: Tensor, rotated: list[Tiles]) -> list[Callable[[], Tensor]]:
    if plan is None:
        return [lambda w=w: F.linear(x, cuda.dequantize(w, x.dtype)) for w in rotated]
    return [lambda w=w: cuda.linear(x, w, None, plan) for w in rotated]


def compile_all(plans: Sequence[AnyPlan | None], x: Tensor, tiles: Tiles) -> None:
    """The compiler runs on as many cores as there are; what is compiled once is kept."""
    with ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(0,)) as pool:
        list(pool.map(lambda plan: None if plan is None else cuda.linear(x, tiles, None, plan), plans))
    torch.cuda.synchronize()


def splits(plan: AnyPlan | None) -> int:
    return getattr(plan, "splits", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--formats", default="W4,W3,W2,W8")
    parser.add_argument("--batches", default=",".join(map(str, BUCKETS)))
    chosen = parser.parse_args()
    path = PLANS / f"{torch.cuda.get_device_name().replace(' ', '-').lower()}.json"
    table = json.loads(path.read_text()) if path.is_file() else {}
    shapes = {shape for model in chosen.shapes.split(",") for shape in SHAPES[model].values()}
    for N, K in sorted(shapes):
        for name in chosen.formats.split(","):
            first = to_tiles(random_weight(N, K, FORMATS[name][0]))
            rotated = [first] + [replace(first, data=first.data.clone()) for _ in range(copies(first.nbytes) - 1)]
            torch.cuda.synchronize()
            for M in map(int, chosen.batches.split(",")):
                x = torch.randn(M, K, dtype=torch.bfloat16, device="cuda")
                sets = rotated if M <= 512 else rotated[:4]
                plans: list[AnyPlan | None] = [*candidates(M, N, K, first)] + [None] * (M > 128)
                compile_all(plans, x, first)
                timings = time_together({i: calls_of(plan, x, sets) for i, plan in enumerate(plans)}, replays=5)
                timed = [(timing.us, plan) for timing, plan in zip(timings.values(), plans, strict=True)]
                if not timed:
                    continue
                prompts = [pair for pair in timed if isinstance(pair[1], PromptPlan)]
                timed = [pair for pair in timed if pair not in prompts]  # these take any number of rows, and any width
                us, best = min(prompts, key=lambda pair: pair[0], default=(float("inf"), None))
                if prompts:  # an empty entry: none is used, which the rule might
                    wins = us < 0.99 * min(us for us, _ in timed)
                    table[f"prompt {table_key(M, N, K, first.nbits)}"] = list(astuple(best)) if wins else []
                within = 1.02 * min(us for us, _ in timed)  # the noise; splits cost more among other kernels
                us, best = min(
                    (pair for pair in timed if pair[0] <= within), key=lambda pair: (splits(pair[1]), pair[0])
                )
                table[table_key(M, N, K, first.nbits)] = [] if best is None else [int(value) for value in astuple(best)]
                print(f"{name} {N}x{K} batch {M}: {us:.1f} us {best} of {len(timed)}", flush=True)
            path.parent.mkdir(exist_ok=True)
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(table.items()))
            path.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
