"""Sinkhorn balancing on the GPU: the rounds of quant/sinkhorn.py for every tile of a linear group in one launch.

A weight of the group is `[out, in]` or a stack `[experts, out, in]`.

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

Columns are added up part by part, and the parts of a tile depend on its matrix' height alone. A program takes one part
or several: so a matrix has the same factors to the bit, alone or in a stack, on many multiprocessors or few.

Variances from one pass cancel where a row or column lies far from zero compared with its spread (a constant row, say).
Such a tile is given up at once, its score NaN, and left to the reference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # weights that a program works on at once
WARPS = 8
VECTOR = 1024  # rows whose factors are updated at once
STAGES = 3  # loads of so many steps of the row loop are under way at once
PROGRAMS_PER_SM = 2  # of 8 warps with at most 128 registers a thread: the registers of a multiprocessor
PART = 512  # rows, a multiple of a step's
MOST_PARTS = 32  # of a tile: those of taller ones have more rows
OFF_CENTRE = 64 / 65  # share of the sum of squares that the mean makes up, beyond which one pass is not exact enough


@triton.jit
def damped(factor, deviation, target, step_min, step_max, least, most):
    """The next factor: one damped step that takes the deviation towards the target."""
    step = tl.minimum(tl.maximum(deviation, 1e-3), 1e3) / target  # STD_RANGE
    return tl.minimum(tl.maximum(factor * tl.minimum(tl.maximum(step, step_min), step_max), least), most)


@triton.jit
def _cut(weight, tiles, rows, columns, matrix_stride, row_stride, column_stride, matrix_size,
         ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):  # fmt: skip
    """Copies `[rows, columns]` to `[groups, rows, PAD]`, so that a tile is read in one piece in every round."""
    weight += tl.program_id(2).to(tl.int64) * matrix_stride
    tiles += tl.program_id(2).to(tl.int64) * matrix_size
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
    columns, slots, iterations, step_min, step_max, least, most,
    WIDTH: tl.constexpr, PAD: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    VECTOR: tl.constexpr, OFF_CENTRE: tl.constexpr,
):  # fmt: skip
    entry = plan + tl.program_id(0) * 11
    matrix, tile, group = tl.load(entry), tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    rows, share = tl.load(entry + 3).to(tl.int32), tl.load(entry + 4).to(tl.int32)
    part, parts_end = tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32)
    first_slot, parts, splits = tl.load(entry + 7), tl.load(entry + 8).to(tl.int32), tl.load(entry + 9).to(tl.int32)
    before = tl.load(entry + 10)  # rows of the tiles before this one
    first, last = part * share, tl.minimum(parts_end * share, rows)
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
        side = partial + (step % 2) * slots * (2 * PAD + 3)
        off_centre = tl.zeros([ROWS], tl.float32)
        for own in range(part, parts_end):
            column_sum = tl.zeros([ROWS, PAD], tl.float32)
            column_squares = tl.zeros([ROWS, PAD], tl.float32)
            stop = tl.minimum((own + 1) * share, rows)
            for start in tl.range(own * share, stop, ROWS, num_stages=STAGES):
                row = start + tl.arange(0, ROWS)
                here = row < stop
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
            slot = side + (first_slot + own) * (2 * PAD + 3)
            tl.store(slot + tl.arange(0, PAD), tl.sum(column_sum, 0))
            tl.store(slot + PAD + tl.arange(0, PAD), tl.sum(column_squares, 0))
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
        highest, lowest, worst = tl.max(high), tl.min(low), tl.max(off_centre)
        for own in range(part, parts_end):
            slot = side + (first_slot + own) * (2 * PAD + 3) + 2 * PAD
            tl.store(slot, highest)
            tl.store(slot + 1, lowest)
            tl.store(slot + 2, worst)
        tl.debug_barrier()
        tl.atomic_add(arrived + tile, 1, sem="release", scope="gpu")
        everyone = splits * (step + 1)
        while tl.atomic_add(arrived + tile, 0, sem="acquire", scope="gpu") < everyone:
            while tl.load(arrived + tile, volatile=True) < everyone:  # waits without emptying the cache
                pass
        tl.debug_barrier()
        there = tl.arange(0, PARTS) < parts
        slot = side + (first_slot + tl.arange(0, PARTS)) * (2 * PAD + 3)
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
    if part == 0:
        tl.store(factors + matrix * columns + column, best_t, mask=inside)
        tl.store(scores + tile, best)


def column_factors(
    weights: Sequence[Tensor], width: int, iterations: int, step_min: float, step_max: float, log_range: tuple
) -> list[tuple[Tensor, Tensor]]:
    """quant.sinkhorn.column_factors for every weight `[..., out, in]` of a group that shares `in` and dtype.

    t `[..., in]` and the imbalance left `[...]`. A matrix with a row or column too far from zero for one pass has NaN
    in place of the latter.
    """
    columns, device = weights[0].shape[-1], weights[0].device
    stacks = [weight if weight.ndim == 3 else weight.unsqueeze(0) for weight in weights]
    groups = -(-columns // width)
    pad = max(16, triton.next_power_of_2(width))
    tiles = _tiles(stacks, groups, width, pad)
    plan = _plan(tuple((len(stack), stack.shape[1]) for stack in stacks), columns, width, device)
    programs, matrices = len(plan.entries), sum(map(len, stacks))
    inverse_rows = torch.ones(len(tiles), device=device)
    factors = torch.empty(matrices, columns, device=device)
    scores = torch.empty(matrices, groups, device=device)
    options: dict[str, Any] = {"maxnreg": 128} if device.type == "cuda" else {}
    if plan.splits > 1:
        options["launch_cooperative_grid"] = True
    with torch.cuda.device_of(tiles):
        _balance[(programs,)](
            tiles, plan.entries, torch.ones(programs, pad, device=device), inverse_rows, torch.empty_like(inverse_rows),
            torch.empty(2, plan.slots, 2 * pad + 3, device=device),
            torch.zeros(matrices * groups, dtype=torch.int32, device=device), factors, scores,
            columns, plan.slots, iterations, step_min, step_max, math.exp(log_range[0]), math.exp(log_range[1]),
            WIDTH=width, PAD=pad, PARTS=triton.next_power_of_2(plan.parts), ROWS=max(16, TILE // pad), STAGES=STAGES,
            VECTOR=VECTOR, OFF_CENTRE=OFF_CENTRE, num_warps=WARPS, **options,
        )  # fmt: skip
    left = scores.double().log().mean(1).exp().float()  # of zeros it is zero, of NaN it is NaN
    counts = [len(stack) for stack in stacks]
    found = zip(weights, factors.split(counts), left.split(counts), strict=True)
    return [(t, after) if weight.ndim == 3 else (t[0], after[0]) for weight, t, after in found]


def _tiles(stacks: Sequence[Tensor], groups: int, width: int, pad: int) -> Tensor:
    """All tiles, `[rows, pad]` each, matrix by matrix and group by group; columns that pad one are zero."""
    columns = stacks[0].shape[-1]
    make = torch.empty if pad == width and columns % width == 0 else torch.zeros
    sizes = [groups * len(stack) * stack.shape[1] for stack in stacks]
    tiles = make(sum(sizes), pad, dtype=stacks[0].dtype, device=stacks[0].device)
    for stack, part in zip(stacks, tiles.split(sizes), strict=True):
        matrices, rows, _ = stack.shape
        grid = triton.cdiv(rows, 16), triton.cdiv(columns, 256), matrices
        with torch.cuda.device_of(stack):
            _cut[grid](
                stack, part, rows, columns, *stack.stride(), groups * rows * pad,
                ROWS=16, COLUMNS=256, WIDTH=width, PAD=pad,
            )  # fmt: skip
    return tiles


@dataclass(frozen=True)
class Plan:
    """What each program does, int64 `[programs, 11]`.

    A row: matrix, tile, group, rows of the matrix, rows of a part, first and last part of the program, first slot of
    the tile, parts of the tile, programs of the tile, offset of the tile in the buffers of row factors.
    """

    entries: Tensor
    slots: int  # parts of all tiles
    parts: int  # of the tile that has the most
    splits: int  # programs of that tile


@functools.lru_cache
def _plan(heights: tuple[tuple[int, int], ...], columns: int, width: int, device: torch.device) -> Plan:
    """`heights` are the number of matrices and the rows of each, stack by stack."""
    tiles = -(-columns // width)
    every = [rows for count, rows in heights for _ in range(count)]
    take = _parts_per_program(every, tiles, device)
    entries, offset, slots = [], 0, 0
    for matrix, height in enumerate(every):
        share = part_rows(height)
        parts = -(-height // share)
        for group in range(tiles):
            for first in range(0, parts, take):
                own = (share, first, min(first + take, parts), slots, parts, -(-parts // take), offset)
                entries.append((matrix, matrix * tiles + group, group, height, *own))
            offset, slots = offset + height, slots + parts
    return Plan(torch.tensor(entries, device=device), slots, max(e[8] for e in entries), max(e[9] for e in entries))


def part_rows(height: int) -> int:
    """Rows of a part of a tile that has `height`: parts as even as multiples of 64 rows can be."""
    parts = min(MOST_PARTS, -(-height // PART))
    return -(-height // (64 * parts)) * 64


def _parts_per_program(heights: Sequence[int], tiles: int, device: torch.device) -> int:
    """The split that finishes first among those whose programs can all run at once.

    With more tiles than can run at once nothing is split, so nothing waits and any number will do.
    """
    parts = {height: -(-height // part_rows(height)) for height in set(heights)}
    most = max(parts.values())
    if device.type != "cuda":  # the interpreter runs one program after the other: none may wait
        return most
    processors = torch.cuda.get_device_properties(device).multi_processor_count

    def programs(take: int) -> int:
        return tiles * sum(-(-parts[height] // take) for height in heights)

    fitting = [take for take in range(1, most + 1) if programs(take) <= processors * PROGRAMS_PER_SM]
    return min(fitting, key=lambda take: -(-programs(take) // processors) * take, default=most)
