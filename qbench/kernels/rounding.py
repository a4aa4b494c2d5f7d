"""Rounding on the GPU: the weight is read once, and packed codes, scale and zero are written once.

Triton twins of quant/rounding.py and of NF4's table lookup, operation by operation in fp32 with IEEE division, so that
the codes are the same bit for bit. A program holds PAIRS (row, group) pairs of one matrix, `[PAIRS, WIDTH]`; pair p is
group p % groups of row p // groups, and its scale is number p of the `[out, groups]` that are stored.

A weight is `[out, in]` or a stack `[experts, out, in]` with t `[experts, in]`; all else then has that dimension, too.
No matrix of a stack shares a program with another, so that each comes out as it does alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.format.aux import FP16_MAX
from qbench.format.packing import PLANES

TILE = 4096  # weights that a program holds


@triton.jit
def nearest_integer(x):
    """Half to even, as torch.round, for |x| < 2**22: beyond 2**23 fp32 has no fractions to keep."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quotient(a, b):
    """IEEE a / b: Triton's own `/` may be two units off, enough to move a code on a tie."""
    a, b = tl.broadcast(a, b)
    return tl.div_rn(a, b)


@triton.jit
def uniform_grid(low, high, NBITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """quant.rounding.grid for scales stored in fp16: the divisor and the zero, fp32 of the shape of `low`."""
    top = tl.full(low.shape, (1 << NBITS) - 1, tl.float32)
    if SYMMETRIC:
        exact = quotient(2 * tl.maximum(high, -low), top)
    else:
        exact = quotient(high - low, top)
        exact = tl.maximum(exact, tl.maximum(tl.abs(high), tl.abs(low)) / 2048)  # ZERO_LIMIT["fp16"]
    divisor = tl.maximum(exact, 5.9604644775390625e-08)  # FP16_TINY
    # |low| / divisor is at most 2048, by the line above; a symmetric grid has no use for it
    zero = tl.full(low.shape, 1 << (NBITS - 1), tl.float32) if SYMMETRIC else -nearest_integer(quotient(low, divisor))
    return divisor, zero


@triton.jit
def pair_tile(weight, matrix_stride, row_stride, pairs, columns, groups,
              PAIRS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):  # fmt: skip
    """Loads this program's pairs: `values, inside, exists, pair, row, first, channel`.

    Which of their elements exist, which pairs do, their numbers and rows counted over the whole stack, the first column
    of each, and the places of their channels in `[matrices, in]`.
    """
    matrix = tl.program_id(1)
    local = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    row = local // groups
    first = (local - row * groups) * WIDTH
    inner = tl.arange(0, PAD)
    exists = local < pairs
    inside = exists[:, None] & (inner < WIDTH)[None, :] & (first[:, None] + inner[None, :] < columns)
    start = weight + matrix.to(tl.int64) * matrix_stride + row.to(tl.int64) * row_stride + first
    values = tl.load(start[:, None] + inner[None, :], mask=inside, other=0.0).to(tl.float32)
    channel = matrix * columns + first[:, None] + inner[None, :]
    return values, inside, exists, matrix * pairs + local, matrix * (pairs // groups) + row, first, channel


@triton.jit
def store_plane(plane, values, row, first, exists, row_bytes, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Packs `values` `[PAIRS, PAD]` of BITS bits, low bits first, into the rows of `plane`."""
    PER: tl.constexpr = 8 // BITS
    split = tl.reshape(values, [values.shape[0], values.shape[1] // PER, PER])
    packed = tl.sum(split << (tl.arange(0, PER) * BITS)[None, None, :], 2)
    byte = tl.arange(0, values.shape[1] // PER)
    begin = first // PER
    within = (begin[:, None] + byte[None, :] < row_bytes) & (byte * PER < WIDTH)[None, :] & exists[:, None]
    target = plane + (row.to(tl.int64) * row_bytes + begin)[:, None] + byte[None, :]
    tl.store(target, packed.to(tl.uint8), mask=within)


@triton.jit
def store_codes(low_plane, high_plane, codes, row, first, exists, columns, NBITS: tl.constexpr, WIDTH: tl.constexpr):
    """The planes of quant/packing.py: 3 = 2 + 1 bits, the others are one plane."""
    if NBITS == 3:
        store_plane(low_plane, codes & 3, row, first, exists, (columns + 3) // 4, 2, WIDTH)
        store_plane(high_plane, codes >> 2, row, first, exists, (columns + 7) // 8, 1, WIDTH)
    else:
        PER: tl.constexpr = 8 // NBITS
        store_plane(low_plane, codes, row, first, exists, (columns + PER - 1) // PER, NBITS, WIDTH)


@triton.jit
def extremes_of(values, inside):
    return tl.min(tl.where(inside, values, float("inf")), 1), tl.max(tl.where(inside, values, float("-inf")), 1)


@triton.jit
def report_unusable(flag, values, scale, inside, exists):
    """Sets the flag where torch would raise: a weight is NaN (min and max skip those), or a scale beyond fp16."""
    bad = tl.max(tl.where(inside & (values != values), 1, 0)) + tl.max(tl.where(exists & ~(scale <= 65504.0), 1, 0))
    if bad > 0:
        tl.store(flag, 1)


@triton.jit
def _extremes(weight, t, low, high, matrix_stride, row_stride, pairs, columns, groups, SCALED: tl.constexpr,
              PAIRS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):  # fmt: skip
    values, inside, exists, pair, _, _, channel = pair_tile(
        weight, matrix_stride, row_stride, pairs, columns, groups, PAIRS, WIDTH, PAD
    )
    if SCALED:
        values = quotient(values, tl.load(t + channel, mask=inside, other=1.0))
    least, most = extremes_of(values, inside)
    broken = tl.max(tl.where(inside & (values != values), 1, 0), 1) > 0
    tl.store(low + pair, tl.where(broken, float("nan"), least), mask=exists)
    tl.store(high + pair, tl.where(broken, float("nan"), most), mask=exists)


@triton.jit
def _uniform(weight, t, stored_t, low_plane, high_plane, scale, zero, divisor_given, zero_given, error, flag,
             matrix_stride, row_stride, pairs, columns, groups, NBITS: tl.constexpr,
             SYMMETRIC: tl.constexpr, SCALED: tl.constexpr, GIVEN: tl.constexpr, ERROR: tl.constexpr,
             PAIRS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):  # fmt: skip
    raw, inside, exists, pair, row, first, channel = pair_tile(
        weight, matrix_stride, row_stride, pairs, columns, groups, PAIRS, WIDTH, PAD
    )
    values = raw
    if SCALED:
        values = quotient(raw, tl.load(t + channel, mask=inside, other=1.0))
    if GIVEN:
        divisor = tl.load(divisor_given + pair, mask=exists, other=1.0)
        middle = tl.load(zero_given + pair, mask=exists, other=0.0)
        kept = tl.load(scale + pair, mask=exists, other=0.0).to(tl.float32)
    else:
        low, high = extremes_of(values, inside)
        divisor, middle = uniform_grid(low, high, NBITS, SYMMETRIC)
        report_unusable(flag, values, divisor, inside, exists)
        kept = divisor.to(tl.float16).to(tl.float32)
        if not ERROR:
            tl.store(scale + pair, divisor.to(tl.float16), mask=exists)
            if not SYMMETRIC:
                tl.store(zero + pair, middle.to(tl.float16), mask=exists)
    steps = quotient(values, divisor[:, None]) + middle[:, None]
    codes = nearest_integer(tl.minimum(tl.maximum(steps, 0.0), (1 << NBITS) - 1))
    if ERROR:
        restored = (codes - middle[:, None]) * kept[:, None]
        if SCALED:
            restored = restored * tl.load(stored_t + channel, mask=inside, other=1.0).to(tl.float32)
        where = error + row.to(tl.int64)[:, None] * columns + first[:, None] + tl.arange(0, PAD)[None, :]
        tl.store(where, (restored - raw).to(error.dtype.element_ty), mask=inside)
    else:
        codes = tl.where(inside, codes, 0.0).to(tl.int32)
        store_codes(low_plane, high_plane, codes, row, first, exists, columns, NBITS, WIDTH)


@triton.jit
def _codebook(weight, t, plane, scale, divisor_given, midpoints, names, flag,
              matrix_stride, row_stride, pairs, columns, groups, SCALED: tl.constexpr, GIVEN: tl.constexpr,
              PAIRS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):  # fmt: skip
    values, inside, exists, pair, row, first, channel = pair_tile(
        weight, matrix_stride, row_stride, pairs, columns, groups, PAIRS, WIDTH, PAD
    )
    if SCALED:
        values = quotient(values, tl.load(t + channel, mask=inside, other=1.0))
    if GIVEN:
        divisor = tl.load(divisor_given + pair, mask=exists, other=1.0)
    else:
        divisor = tl.maximum(tl.max(tl.abs(values), 1), 5.9604644775390625e-08)  # FP16_TINY
        report_unusable(flag, values, divisor, inside, exists)
        tl.store(scale + pair, divisor.to(tl.float16), mask=exists)
    ratios = values * quotient(tl.full(divisor.shape, 1.0, tl.float32), divisor)[:, None]
    rank = tl.zeros(values.shape, tl.int32)
    for k in tl.static_range(15):
        rank += (ratios > tl.load(midpoints + k)).to(tl.int32)
    # the level's number, looked up in a table of sixteen nibbles
    codes = ((names >> (4 * rank).to(tl.int64)) & 15).to(tl.int32)
    store_codes(plane, plane, tl.where(inside, codes, 0), row, first, exists, columns, 4, WIDTH)


def extremes(weight: Tensor, width: int, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Least and largest value of every group of `weight / input_scale` `[out, in]`: two fp32 `[out, groups]`."""
    low, high = (_aux(weight, width, torch.float32) for _ in range(2))
    t = weight if input_scale is None else input_scale.contiguous()
    _launch(_extremes, weight, width, weight, t, low, high, SCALED=input_scale is not None)
    return low, high


def uniform(
    weight: Tensor, width: int, nbits: int, symmetric: bool, input_scale: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    """Rounds `weight / input_scale` on its min/max grids: planes, scale and zero (None if symmetric), both in fp16.

    Raises ValueError if a weight is not finite or a scale is beyond fp16.
    """
    planes, scale = _planes(weight, nbits), _aux(weight, width, torch.float16)
    zero = None if symmetric else torch.empty_like(scale)
    flag = torch.zeros(1, dtype=torch.int32, device=weight.device)
    t = weight if input_scale is None else input_scale.contiguous()
    _launch(
        _uniform, weight, width, weight, t, t, planes[0], planes[-1], scale, scale if zero is None else zero, scale,
        scale, scale, flag, NBITS=nbits, SYMMETRIC=symmetric, SCALED=input_scale is not None, GIVEN=False, ERROR=False,
    )  # fmt: skip
    _check(flag)
    return planes, scale, zero


def uniform_on(
    weight: Tensor, width: int, nbits: int, divisor: Tensor, zero: Tensor, input_scale: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The planes of codes for grids that are given, fp32 `[out, groups]`: round(w / divisor + zero)."""
    planes = _planes(weight, nbits)
    t = weight if input_scale is None else input_scale.contiguous()
    divisor, zero = divisor.contiguous(), zero.contiguous()
    _launch(
        _uniform, weight, width, weight, t, t, planes[0], planes[-1], divisor, divisor, divisor, zero, divisor,
        divisor, NBITS=nbits, SYMMETRIC=False, SCALED=input_scale is not None, GIVEN=True, ERROR=False,
    )  # fmt: skip
    return planes


def uniform_error(
    weight: Tensor,
    width: int,
    nbits: int,
    symmetric: bool,
    input_scale: Tensor,
    grid: tuple[Tensor, Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What rounding `weight / input_scale` and restoring it would add to the weight, bf16 `[out, in]`, in one pass.

    `grid` is scale, zero and divisor where they are known, fp32 `[out, groups]`; otherwise they are the min/max ones.
    Nobody waits to hear of a scale beyond fp16: the error is then no number, and to round with it raises ValueError.
    """
    out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device) if out is None else out
    flag = torch.zeros(1, dtype=torch.int32, device=weight.device)
    scale, zero, divisor = (flag, flag, flag) if grid is None else (part.contiguous() for part in grid)
    _launch(
        _uniform, weight, width, weight, input_scale.contiguous(), input_scale.half().contiguous(), flag, flag, scale,
        zero, divisor, zero, out, flag,
        NBITS=nbits, SYMMETRIC=symmetric, SCALED=True, GIVEN=grid is not None, ERROR=True,
    )  # fmt: skip
    return out


def codebook(
    weight: Tensor,
    width: int,
    levels: Sequence[float],
    input_scale: Tensor | None = None,
    divisor: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Codes of the 16 `levels` nearest to w / max|w| of the group, w of `weight / input_scale` `[out, in]`.

    Returns planes, and the scale in fp16 `[out, groups]`. A `divisor`, fp32 `[out, groups]`, takes the place of max|w|,
    and the scale is then not set. Raises ValueError as `uniform` does.
    """
    planes, scale = _planes(weight, 4), _aux(weight, width, torch.float16)
    flag = torch.zeros(1, dtype=torch.int32, device=weight.device)
    midpoints, names = _table(tuple(levels), weight.device)
    _launch(
        _codebook, weight, width, weight, weight if input_scale is None else input_scale.contiguous(), planes[0], scale,
        scale if divisor is None else divisor.contiguous(), midpoints, names, flag,
        SCALED=input_scale is not None, GIVEN=divisor is not None, tile=TILE // 2,
    )  # fmt: skip
    _check(flag)
    return planes, scale


@functools.lru_cache
def _table(levels: tuple[float, ...], device: torch.device) -> tuple[Tensor, int]:
    """The midpoints between the levels in order, and the levels' numbers as nibbles of one 64-bit integer."""
    ordered, order = torch.tensor(levels).sort(stable=True)
    names = sum(int(name) << (4 * rank) for rank, name in enumerate(order))
    return ((ordered[1:] + ordered[:-1]) / 2).to(device), names - (1 << 64 if names >> 63 else 0)


def _launch(kernel, weight: Tensor, width: int, *tensors, tile: int = TILE, **constants) -> None:
    stack = weight if weight.ndim == 3 else weight.unsqueeze(0)
    matrices, rows, columns = stack.shape
    groups = -(-columns // width)
    pad = max(8, triton.next_power_of_2(width))
    pairs = max(1, tile // pad)
    warps = 4 if pad <= 4096 else 8
    with torch.cuda.device_of(weight):
        kernel[(triton.cdiv(rows * groups, pairs), matrices)](
            *tensors, stack.stride(0), stack.stride(1), rows * groups, columns, groups,
            **constants, PAIRS=pairs, WIDTH=width, PAD=pad, num_warps=warps,
        )  # fmt: skip


def _planes(weight: Tensor, nbits: int) -> tuple[Tensor, ...]:
    *rows, columns = weight.shape
    sizes = [-(-columns * bits // 8) for bits in PLANES[nbits]]
    return tuple(torch.empty(*rows, size, dtype=torch.uint8, device=weight.device) for size in sizes)


def _aux(weight: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    *rows, columns = weight.shape
    return torch.empty(*rows, -(-columns // width), dtype=dtype, device=weight.device)


def _check(flag: Tensor) -> None:
    if int(flag):
        raise ValueError(f"a scale or zero point is not a finite number below {FP16_MAX:.0f}")
