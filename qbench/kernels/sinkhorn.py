"""Sinkhorn balancing on the GPU: the rounds of quant/sinkhorn.py for every tile of a linear group in one launch.

A tile is all rows of a matrix x one group of columns, and tiles are independent. A tile's rows are split over as many
programs as it takes to fill the chip; every round each program reads its rows once and takes from that one read what
both axes need, with weight m, inverse column factor c and inverse row factor r:

    row:     sum_j m c and sum_j m^2 c^2, complete in the program; their deviation is scaled by r afterwards
    column:  sum_i m r and sum_i m^2 r^2, added up over the programs of the tile

which is six instructions a weight, and no exponential: the factors are kept as such, not as logarithms. Then the
programs of a tile meet: each publishes its sums, waits until all have, and adds them up in the same order, so that all
of them reach the same score and the same decision, also the one to stop once the score rises. Two slots are used in
turn, since a fast program may publish the next round while a slow one still reads this one. Programs that wait for each
other must all be running, which the driver guarantees for a cooperative launch and refuses otherwise.

Variances from one pass cancel where a row or column lies far from zero compared with its spread (a constant row, say).
Such a tile is given up at once, its score NaN, and left to the reference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # weights that a program works on at once
WARPS = 8
VECTOR = 1024  # rows whose factors are updated at once
STAGES = 3  # loads of so many steps of the row loop are under way at once
PROGRAMS_PER_SM = 2  # of 8 warps with at most 128 registers a thread: the registers of a multiprocessor
STRIDE = 64  # rows by which the shares of programs may differ
MOST_SPLITS = 32  # programs that share a tile
OFF_CENTRE = 64 / 65  # share of the sum of squares that the mean makes up, beyond which one pass is not exact enough


@triton.jit
def damped(factor, deviation, target, step_min, step_max, least, most):
    """The next factor: one damped step that takes the deviation towards the target."""
    step = tl.minimum(tl.maximum(deviation, 1e-3), 1e3) / target  # STD_RANGE
    return tl.minimum(tl.maximum(factor * tl.minimum(tl.maximum(step, step_min), step_max), least), most)


@triton.jit
def _cut(weight, tiles, rows, columns, row_stride, column_stride,
         ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):  # fmt: skip
    """Copies `[rows, columns]` to `[groups, rows, PAD]`, so that a tile is read in one piece in every round."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    row, column = row.to(tl.int64), column.to(tl.int64)
    values = tl.load(weight + row[:, None] * row_stride + column[None, :] * column_stride, mask=inside)
    target = (column // WIDTH) * rows * PAD + column % WIDTH
    tl.store(tiles + target[None, :] + row[:, None] * PAD, values, mask=inside)


@triton.jit
def _balance(
    tiles, plan, inverse_columns, inverse_rows, row_spread, partial, arrived, factors, scores,
    columns, programs, iterations, step_min, step_max, least, most,
    WIDTH: tl.constexpr, PAD: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    VECTOR: tl.constexpr, OFF_CENTRE: tl.constexpr,
):  # fmt: skip
    entry = plan + tl.program_id(0) * 9
    matrix, tile, group = tl.load(entry), tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    rows, first, last = tl.load(entry + 3), tl.load(entry + 4).to(tl.int32), tl.load(entry + 5).to(tl.int32)
    first_program, splits = tl.load(entry + 6).to(tl.int32), tl.load(entry + 7).to(tl.int32)
    before = tl.load(entry + 8)  # rows of the tiles before this one
    tiles += before * PAD
    inverse_rows += before
    row_spread += before
    column = group * WIDTH + tl.arange(0, PAD)
    inside = (tl.arange(0, PAD) < WIDTH) & (column < columns)
    width = tl.sum(inside.to(tl.float32))
    height = rows.to(tl.float32)
    mean_of_row, mean_of_column = 1.0 / width, 1.0 / height
    # a single value has no spread, and its divisor is then 1
    per_row, per_column = 1.0 / tl.maximum(width - 1.0, 1.0), 1.0 / tl.maximum(height - 1.0, 1.0)

    inverse_columns += tl.program_id(0) * PAD + tl.arange(0, PAD)
    best_t = tl.full([PAD], 1.0, tl.float32)
    best, target = 0.0, 0.0
    step = 0
    while step < iterations:
        # through memory, since a value kept from the last round would be kept in that round's register layout
        c = tl.load(inverse_columns)
        column_sum = tl.zeros([ROWS, PAD], tl.float32)
        column_squares = tl.zeros([ROWS, PAD], tl.float32)
        off_centre = tl.zeros([ROWS], tl.float32)
        for start in tl.range(first, last, ROWS, num_stages=STAGES):
            row = start + tl.arange(0, ROWS)
            here = row < last
            at = tiles + row[:, None] * PAD + tl.arange(0, PAD)[None, :]
            m = tl.load(at, mask=here[:, None], other=0.0).to(tl.float32)
            r = tl.load(inverse_rows + row, mask=here, other=0.0)
            square = m * m
            column_sum += m * r[:, None]
            column_squares += square * (r * r)[:, None]
            sums, squares = tl.sum(m * c[None, :], 1), tl.sum(square * (c * c)[None, :], 1)
            tl.store(row_spread + row, squares - sums * sums * mean_of_row, mask=here)
            if step == 0:
                off_centre = tl.maximum(off_centre, sums * sums - squares * (width * OFF_CENTRE))
        tl.debug_barrier()  # the rows' spreads are read by other threads than wrote them

        high, low = tl.zeros([VECTOR], tl.float32), tl.full([VECTOR], float("inf"), tl.float32)
        for start in range(first, last, VECTOR):
            row = start + tl.arange(0, VECTOR)
            here = row < last
            of_row = tl.maximum(tl.load(row_spread + row, mask=here, other=0.0), 0.0) * per_row
            deviation = tl.sqrt(of_row) * tl.load(inverse_rows + row, mask=here, other=0.0)
            high = tl.maximum(high, deviation)
            low = tl.minimum(low, tl.where(here, deviation, float("inf")))

        # meet the other programs of the tile
        side = partial + (step % 2) * programs * (2 * PAD + 3)
        slot = side + tl.program_id(0) * (2 * PAD + 3)
        tl.store(slot + tl.arange(0, PAD), tl.sum(column_sum, 0))
        tl.store(slot + PAD + tl.arange(0, PAD), tl.sum(column_squares, 0))
        tl.store(slot + 2 * PAD, tl.max(high))
        tl.store(slot + 2 * PAD + 1, tl.min(low))
        tl.store(slot + 2 * PAD + 2, tl.max(off_centre))
        tl.debug_barrier()
        tl.atomic_add(arrived + tile, 1, sem="release", scope="gpu")
        everyone = splits * (step + 1)
        while tl.atomic_add(arrived + tile, 0, sem="acquire", scope="gpu") < everyone:
            while tl.load(arrived + tile, volatile=True) < everyone:  # waits without emptying the cache
                pass
        tl.debug_barrier()
        part = tl.arange(0, SPLITS)
        there = part < splits
        slot = side + (first_program + part) * (2 * PAD + 3)
        at = slot[:, None] + tl.arange(0, PAD)[None, :]
        total = tl.sum(tl.load(at, mask=there[:, None], other=0.0, cache_modifier=".cg"), 0)
        squares = tl.sum(tl.load(at + PAD, mask=there[:, None], other=0.0, cache_modifier=".cg"), 0)
        highest = tl.max(tl.load(slot + 2 * PAD, mask=there, other=0.0, cache_modifier=".cg"))
        lowest = tl.min(tl.load(slot + 2 * PAD + 1, mask=there, other=float("inf"), cache_modifier=".cg"))
        worst = tl.max(tl.load(slot + 2 * PAD + 2, mask=there, other=0.0, cache_modifier=".cg"))

        inverse = tl.load(inverse_columns)
        t = 1.0 / inverse
        variance = tl.maximum(squares - total * total * mean_of_column, 0.0) * per_column
        deviation = tl.sqrt(variance) * inverse
        highest = tl.maximum(highest, tl.max(tl.where(inside, deviation, 0.0)))
        lowest = tl.minimum(lowest, tl.min(tl.where(inside, deviation, float("inf"))))
        score = highest / tl.maximum(lowest, 1e-12)
        if step == 0:
            best = score
            target = tl.minimum(tl.maximum(lowest, 1e-3), 1e3) + 1e-6  # STD_RANGE, TARGET_EPS
            if tl.maximum(worst, tl.max(total * total - squares * (height * OFF_CENTRE))) > 0:
                best = float("nan")
        best_t = tl.where(score <= best, t, best_t)
        best = tl.where(score <= best, score, best)
        step += 1
        if ~(score <= best):
            step = iterations  # latched: no factor would move any more
        if step < iterations:
            tl.store(inverse_columns, 1.0 / damped(t, deviation, target, step_min, step_max, least, most))
            for start in range(first, last, VECTOR):
                row = start + tl.arange(0, VECTOR)
                here = row < last
                held = tl.load(inverse_rows + row, mask=here, other=1.0)
                of_row = tl.maximum(tl.load(row_spread + row, mask=here, other=0.0), 0.0) * per_row
                r = damped(1.0 / held, tl.sqrt(of_row) * held, target, step_min, step_max, least, most)
                tl.store(inverse_rows + row, 1.0 / r, mask=here)
            tl.debug_barrier()
    if tl.program_id(0) == first_program:
        tl.store(factors + matrix * columns + column, best_t, mask=inside)
        tl.store(scores + tile, best)


def column_factors(
    weights: Sequence[Tensor], width: int, iterations: int, step_min: float, step_max: float, log_range: tuple
) -> list[tuple[Tensor, float]]:
    """quant.sinkhorn.column_factors for every weight `[out, in]` of a group that shares `in` and dtype.

    A weight with a row or column too far from zero for one pass has NaN in place of the imbalance left.
    """
    columns, device = weights[0].shape[1], weights[0].device
    heights = tuple(len(weight) for weight in weights)
    groups = -(-columns // width)
    pad = max(16, triton.next_power_of_2(width))
    tiles = _tiles(weights, groups, width, pad)
    plan, splits = _plan(heights, columns, width, device)
    inverse_rows = torch.ones(groups * sum(heights), device=device)
    factors = torch.empty(len(weights), columns, device=device)
    scores = torch.empty(len(weights), groups, device=device)
    with torch.cuda.device_of(tiles):
        _balance[(len(plan),)](
            tiles, plan, torch.ones(len(plan), pad, device=device), inverse_rows, torch.empty_like(inverse_rows),
            torch.empty(2, len(plan), 2 * pad + 3, device=device),
            torch.zeros(len(weights) * groups, dtype=torch.int32, device=device), factors, scores,
            columns, len(plan), iterations, step_min, step_max, math.exp(log_range[0]), math.exp(log_range[1]),
            WIDTH=width, PAD=pad, SPLITS=triton.next_power_of_2(splits), ROWS=max(16, TILE // pad), STAGES=STAGES,
            VECTOR=VECTOR, OFF_CENTRE=OFF_CENTRE, num_warps=WARPS,
            **({"maxnreg": 128, "launch_cooperative_grid": True} if splits > 1 else {}),
        )  # fmt: skip
    left = [math.exp(sum(map(math.log, row)) / groups) if min(row) > 0 else min(row) for row in scores.tolist()]
    return list(zip(factors, left, strict=True))


def _tiles(weights: Sequence[Tensor], groups: int, width: int, pad: int) -> Tensor:
    """All tiles, `[rows, pad]` each, matrix by matrix and group by group; columns that pad one are zero."""
    columns = weights[0].shape[1]
    make = torch.empty if pad == width and columns % width == 0 else torch.zeros
    tiles = make(groups * sum(map(len, weights)), pad, dtype=weights[0].dtype, device=weights[0].device)
    parts = tiles.split([groups * len(weight) for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        grid = triton.cdiv(len(weight), 16), triton.cdiv(columns, 256)
        with torch.cuda.device_of(weight):
            _cut[grid](weight, part, len(weight), columns, *weight.stride(), ROWS=16, COLUMNS=256, WIDTH=width, PAD=pad)
    return tiles


@functools.lru_cache
def _plan(heights: tuple[int, ...], columns: int, width: int, device: torch.device) -> tuple[Tensor, int]:
    """What each program does, int64 `[programs, 9]`, and the most programs that share a tile.

    A row: matrix, tile, group, rows of the matrix, first and last row, first program of the tile, programs of the
    tile, offset of the tile in the buffers of row factors.
    """
    tiles = -(-columns // width)
    chunk = _chunk(heights, tiles, device)
    entries, offset = [], 0
    for matrix, height in enumerate(heights):
        splits = -(-height // chunk)
        share = -(-height // splits)
        for group in range(tiles):
            begin = len(entries)
            for part in range(splits):
                rows = (part * share, min((part + 1) * share, height))
                entries.append((matrix, matrix * tiles + group, group, height, *rows, begin, splits, offset))
            offset += height
    return torch.tensor(entries, device=device), max(entry[7] for entry in entries)


def _chunk(heights: tuple[int, ...], tiles: int, device: torch.device) -> int:
    """Rows per program: the split that finishes first among those whose programs can all run at once.

    With more tiles than can run at once nothing is split, so nothing waits and any number will do.
    """
    tallest = max(heights)
    if device.type != "cuda":  # the interpreter runs one program after the other: none may wait
        return tallest
    processors = torch.cuda.get_device_properties(device).multi_processor_count

    def programs(chunk: int) -> int:
        return tiles * sum(-(-height // chunk) for height in heights)

    fitting = [
        chunk
        for splits in range(1, MOST_SPLITS + 1)
        if programs(chunk := -(-tallest // (splits * STRIDE)) * STRIDE) <= processors * PROGRAMS_PER_SM
    ]
    return min(fitting, key=lambda chunk: -(-programs(chunk) // processors) * chunk, default=tallest)
