"""GPTQ's column loop on the GPU: one launch for a whole block of columns of every linear group in a batch.

Rows do not depend on each other, so a program takes ROWS of them through the block, `[BLOCK, ROWS]` in registers, with
everything a column needs in one place: its grid (taken from its group when the loop arrives there), its codes, its
error, and the correction of the columns after it. What is left for the columns beyond the block is one matrix product
of the errors it returns. Weights are `[batch, in, rows]` as in plugins/gptq.py, so that a column is contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.kernels.rounding import nearest_integer, quotient, uniform_grid

LARGEST_BLOCK = 128  # columns that a program holds
ROWS = 16  # of a program, which is one warp: few, since 4096 rows must fill 132 multiprocessors


@triton.jit
def column(values, index, j):
    """Row j of `values` `[BLOCK, ROWS]`, that is a column of the weight: registers cannot be indexed."""
    return tl.sum(tl.where(index[:, None] == j, values, 0.0), 0)


@triton.jit
def _sweep_block(
    values, original, unit, codes, errors, lows, highs, divisors, zeros, scales, members,
    start, count, size, columns, rows, width, groups, given_groups,
    NBITS: tl.constexpr, SYMMETRIC: tl.constexpr, GIVEN: tl.constexpr, ORIGINAL: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    one = tl.program_id(1).to(tl.int64)  # of the batch
    values += one * columns * rows
    original += one * columns * rows
    codes += one * columns * rows
    unit += one * columns * columns
    errors += one * size * rows
    lows += one * groups * rows
    highs += one * groups * rows
    if GIVEN:
        divisors += one * given_groups * rows
        zeros += one * given_groups * rows
        scales += one * given_groups * rows
        members += one * columns
    index = tl.arange(0, BLOCK)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    inside = index < count
    at = (start + index).to(tl.int64)[:, None] * rows + row[None, :]
    block = tl.load(values + at, mask=inside[:, None] & here[None, :], other=0.0)
    divisor = tl.full([ROWS], 1.0, tl.float32)
    zero = tl.zeros([ROWS], tl.float32)
    scale = divisor
    # the factor's row and the weight's column that come next are on their way while this column is worked on
    factors = unit + start.to(tl.int64) * columns + start + index
    coming = tl.load(factors, mask=inside, other=0.0)
    weights = original + start.to(tl.int64) * rows + row
    coming_weight = tl.load(weights, mask=here, other=0.0)
    for j in range(count):
        factor = tl.where(index > j, coming, 0.0)
        factors += columns
        coming = tl.load(factors, mask=inside & (index > j) & (j + 1 < count), other=0.0)
        if ORIGINAL:
            weight = coming_weight
            weights += rows
            coming_weight = tl.load(weights, mask=here & (j + 1 < count), other=0.0)
        if GIVEN:
            group = tl.load(members + start + j).to(tl.int64) * rows
            divisor = tl.load(divisors + group + row, mask=here, other=1.0)
            zero = tl.load(zeros + group + row, mask=here, other=0.0)
            scale = tl.load(scales + group + row, mask=here, other=1.0)
        elif j % width == 0:
            group_columns = ((index >= j) & (index < j + width) & inside)[:, None]
            low = tl.min(tl.where(group_columns, block, float("inf")), 0)
            high = tl.max(tl.where(group_columns, block, float("-inf")), 0)
            divisor, zero = uniform_grid(low, high, NBITS, SYMMETRIC)
            scale = divisor.to(tl.float16).to(tl.float32)
            group = ((start + j) // width).to(tl.int64) * rows
            tl.store(lows + group + row, low, mask=here)
            tl.store(highs + group + row, high, mask=here)
        value = column(block, index, j)
        steps = quotient(value, divisor) + zero
        code = nearest_integer(tl.minimum(tl.maximum(steps, 0.0), (1 << NBITS) - 1))
        restored = (code - zero) * scale
        if ORIGINAL:  # noqa: SIM108  not a value of Triton's: one branch is compiled
            error = weight - restored
        else:
            error = restored - value
        block += factor[:, None] * error[None, :]
        tl.store(codes + (start + j).to(tl.int64) * rows + row, code.to(tl.uint8), mask=here)
        tl.store(errors + j * rows + row, error, mask=here)


def sweep_block(
    values: Tensor,
    original: Tensor | None,
    unit: Tensor,
    codes: Tensor,
    errors: Tensor,
    start: int,
    stop: int,
    width: int,
    nbits: int,
    symmetric: bool,
    extremes: tuple[Tensor, Tensor],
    fixed: tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Columns `start` to `stop` of a batch of weights, fp32 `[batch, in, rows]`, as corrected so far: `values`.

    Writes `codes` and, per column of the block, `errors` `[batch, columns, rows]`. Column j's error times `unit[j, k]`
    is added to column k after it; `unit` `[batch, in, in]` is a unit upper factor. With `original` weights, errors are
    what these lost, original - rounded, and `unit` is R~ of quant/cholesky.py; else rounded - value, and its inverse.

    Grids are `fixed`, divisor, zero and scale `[batch, groups, rows]` with the group of every column, int32
    `[batch, in]`; without, the block is made of whole groups of `width` columns, which take their own and leave their
    `extremes`, low and high `[batch, groups, rows]`. All are contiguous.
    """
    batch, columns, rows = values.shape
    grids, members = ((values,) * 3, values) if fixed is None else fixed
    with torch.cuda.device_of(values):
        _sweep_block[(triton.cdiv(rows, ROWS), batch)](
            values, values if original is None else original, unit, codes, errors, *extremes, *grids, members,
            start, stop - start, errors.shape[1], columns, rows, width, extremes[0].shape[1], grids[0].shape[1],
            NBITS=nbits, SYMMETRIC=symmetric, GIVEN=fixed is not None, ORIGINAL=original is not None,
            BLOCK=max(16, triton.next_power_of_2(stop - start)), ROWS=ROWS, num_warps=1,
        )  # fmt: skip
