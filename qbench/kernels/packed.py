"""Reads packed weights of the format dual-scale on the GPU: written out dense, or compared with what they stand for.

    restore(stack, out)                 W [..., out, in] in out's dtype, as QuantizedWeight.dequantize, to the bit
    describe(weight, width, t, stack)   sums over tiles of all rows x one group: what a result's rows are made of

A weight is `[out, in]` or a stack `[experts, out, in]`, and is read once or twice, where plain torch makes a dozen
passes in fp32 over it. Planes, scale, zero and t are numbered as in rounding.py: pair = row * groups + group, counted
over the stack.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.format.aux import Aux, dense_input_scale
from qbench.format.weight import QuantizedWeight

TILE = 4096  # weights that a program holds, to write them out
STEP = 1024  # the same, to describe them: as many sums of each kind stay in registers
FIELDS = ("relative_error", "imbalance_before", "kurtosis_before", "kurtosis_after")
KINDS = tl.constexpr(12)  # of numbers that a tile is described by


@triton.jit
def bits_of(plane, row, column, inside, row_bytes, BITS: tl.constexpr):
    PER: tl.constexpr = 8 // BITS
    byte = tl.load(plane + row.to(tl.int64)[:, None] * row_bytes + column // PER, mask=inside, other=0)
    return (byte.to(tl.int32) >> (column % PER * BITS)) & ((1 << BITS) - 1)


@triton.jit
def restored(
    low_plane, high_plane, scale, zero, t, codebook, row, column, pair, channel, exists, inside, columns,
    NBITS: tl.constexpr, ZERO: tl.constexpr, SCALED: tl.constexpr, CODEBOOK: tl.constexpr,
):  # fmt: skip
    """What the codes stand for, fp32 of the shape of `column`; the order of operations is dequantize's."""
    if NBITS == 3:
        codes = bits_of(low_plane, row, column, inside, (columns + 3) // 4, 2)
        codes += bits_of(high_plane, row, column, inside, (columns + 7) // 8, 1) << 2
    else:
        codes = bits_of(low_plane, row, column, inside, (columns * NBITS + 7) // 8, NBITS)
    if CODEBOOK:
        values = tl.load(codebook + codes, mask=inside, other=0.0)
    else:
        values = codes.to(tl.float32)
        if ZERO:
            values -= tl.load(zero + pair, mask=exists, other=0.0).to(tl.float32)[:, None]
        else:
            values -= 1 << (NBITS - 1)
    values *= tl.load(scale + pair, mask=exists, other=0.0).to(tl.float32)[:, None]
    if SCALED:
        values *= tl.load(t + channel, mask=inside, other=1.0)
    return values


@triton.jit
def _restore(low_plane, high_plane, scale, zero, t, codebook, out, matrix_stride, row_stride, column_stride,
             pairs, columns, groups, NBITS: tl.constexpr, ZERO: tl.constexpr, SCALED: tl.constexpr,
             CODEBOOK: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):  # fmt: skip
    matrix = tl.program_id(1)
    local = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    exists, row, inner = local < pairs, local // groups, tl.arange(0, PAD)
    column = ((local - row * groups) * WIDTH)[:, None] + inner[None, :]
    inside = exists[:, None] & (inner < WIDTH)[None, :] & (column < columns)
    values = restored(
        low_plane, high_plane, scale, zero, t, codebook, matrix * (pairs // groups) + row, column,
        matrix * pairs + local, matrix * columns + column, exists, inside, columns, NBITS, ZERO, SCALED, CODEBOOK,
    )  # fmt: skip
    out += matrix.to(tl.int64) * matrix_stride
    target = out + row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64) * column_stride
    tl.store(target, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def moments(mean_of, two, three, four, there, width, height):
    """Mean of a tile and its sums of powers around it, from those of its columns around theirs, `[PAD]`."""
    mean = tl.sum(tl.where(there, mean_of, 0.0)) / width
    off = tl.where(there, mean_of - mean, 0.0)
    square = off * off
    second = tl.sum(two + height * square)
    third = tl.sum(three + 3 * off * two + height * square * off)
    return mean, second, third, tl.sum(four + 4 * off * three + 6 * square * two + height * square * square)


@triton.jit
def _describe(weight, low_plane, high_plane, scale, zero, t, codebook, found, matrix_stride, row_stride, height,
              columns, groups, NBITS: tl.constexpr, ZERO: tl.constexpr, SCALED: tl.constexpr, CODEBOOK: tl.constexpr,
              PACKED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):  # fmt: skip
    """One tile: the first walk over its rows gives their variances, the columns' means and the error; the second the
    columns' sums of powers around their means. Sums stay apart until the end, since those across threads are slow.
    """
    group, matrix = tl.program_id(0), tl.program_id(1)
    inner = tl.arange(0, PAD)
    column = group * WIDTH + inner
    there = (inner < WIDTH) & (column < columns)
    width = tl.sum(there.to(tl.float32))
    weight += matrix.to(tl.int64) * matrix_stride
    channel = matrix * columns + column

    column_sum, error = tl.zeros([ROWS, PAD], tl.float32), tl.zeros([ROWS, PAD], tl.float32)
    highest, lowest = tl.zeros([ROWS], tl.float32), tl.full([ROWS], float("inf"), tl.float32)
    for start in tl.range(0, height, ROWS):
        row = start + tl.arange(0, ROWS)
        exists = row < height
        inside = exists[:, None] & there[None, :]
        at = weight + row.to(tl.int64)[:, None] * row_stride + column[None, :]
        m = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        deviation = tl.where(inside, m - (tl.sum(m, 1) / width)[:, None], 0.0)
        variance = tl.sum(deviation * deviation, 1)
        highest = tl.maximum(highest, variance)
        lowest = tl.minimum(lowest, tl.where(exists, variance, float("inf")))
        column_sum += m
        if PACKED:
            everywhere = matrix * height + row
            r = restored(
                low_plane, high_plane, scale, zero, t, codebook, everywhere, tl.broadcast_to(column[None, :], m.shape),
                everywhere * groups + group, channel[None, :], exists, inside, columns, NBITS, ZERO, SCALED, CODEBOOK,
            )  # fmt: skip
            missed = tl.where(inside, m - r, 0.0)
            error += missed * missed

    mean_of = tl.sum(column_sum, 0) / height
    two, three = tl.zeros([ROWS, PAD], tl.float32), tl.zeros([ROWS, PAD], tl.float32)
    four = tl.zeros([ROWS, PAD], tl.float32)
    for start in tl.range(0, height, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < height)[:, None] & there[None, :]
        at = weight + row.to(tl.int64)[:, None] * row_stride + column[None, :]
        m = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        deviation = tl.where(inside, m - mean_of[None, :], 0.0)
        square = deviation * deviation
        two += square
        three += square * deviation
        four += square * square
    second, third, fourth = tl.sum(two, 0), tl.sum(three, 0), tl.sum(four, 0)

    per_row = 1 / tl.maximum(width - 1, 1.0)  # a single value has no spread, and its divisor is then 1
    variance = second / tl.maximum(height - 1, 1)
    found += (matrix * groups + group) * KINDS
    tl.store(found, tl.maximum(tl.max(highest) * per_row, tl.max(tl.where(there, variance, 0.0))))
    tl.store(found + 1, tl.minimum(tl.min(lowest) * per_row, tl.min(tl.where(there, variance, float("inf")))))
    tl.store(found + 2, width * height)
    tl.store(found + 3, tl.sum(tl.sum(error, 1)))
    mean, all_two, all_three, all_four = moments(mean_of, second, third, fourth, there, width, height)
    tl.store(found + 4, mean)
    tl.store(found + 5, all_two)
    tl.store(found + 6, all_three)
    tl.store(found + 7, all_four)
    if SCALED:
        c = 1 / tl.load(t + channel, mask=there, other=1.0)
        mean, all_two, all_three, all_four = moments(
            mean_of * c, second * c * c, third * c * c * c, fourth * c * c * c * c, there, width, height
        )
    tl.store(found + 8, mean)
    tl.store(found + 9, all_two)
    tl.store(found + 10, all_three)
    tl.store(found + 11, all_four)


@triton.jit
def kurtosis(at, there, count):
    """Of all values of a matrix, from the mean and the sums of powers of its tiles, four numbers each at `at`."""
    mean, two = tl.load(at, mask=there, other=0.0).to(tl.float64), tl.load(at + 1, mask=there, other=0.0).to(tl.float64)
    three = tl.load(at + 2, mask=there, other=0.0).to(tl.float64)
    four = tl.load(at + 3, mask=there, other=0.0).to(tl.float64)
    total = tl.sum(count)
    off = mean - tl.sum(count * mean) / total
    square = off * off
    variance = tl.sum(two + count * square) / total
    fourth = tl.sum(four + 4 * off * three + 6 * square * two + count * square * square) / total
    return tl.where(variance > 0, fourth / (variance * variance), 0.0)


@triton.jit
def _combine(found, numbers, groups, PAD: tl.constexpr):
    """The numbers of a matrix from those of its tiles: relative error, imbalance, kurtosis before and after."""
    group = tl.arange(0, PAD)
    there = group < groups
    at = found + (tl.program_id(0) * groups + group) * KINDS
    high = tl.load(at, mask=there, other=1.0).to(tl.float64)
    low = tl.load(at + 1, mask=there, other=1.0).to(tl.float64)
    count = tl.load(at + 2, mask=there, other=0.0).to(tl.float64)
    missed = tl.sum(tl.load(at + 3, mask=there, other=0.0).to(tl.float64))
    mean = tl.load(at + 4, mask=there, other=0.0).to(tl.float64)
    norm = tl.sum(tl.load(at + 5, mask=there, other=0.0).to(tl.float64) + count * mean * mean)
    ratio = tl.sqrt(high) / tl.maximum(tl.sqrt(low), 1e-12)
    numbers += tl.program_id(0) * 4
    tl.store(numbers, tl.sqrt(tl.where(norm > 0, missed / norm, missed)))
    tl.store(numbers + 1, tl.exp(tl.sum(tl.where(there, tl.log(ratio), 0.0)) / groups))
    tl.store(numbers + 2, kurtosis(at + 4, there, count))
    tl.store(numbers + 3, kurtosis(at + 8, there, count))


def readable(weight: QuantizedWeight) -> bool:
    """Whether the kernels can tell what the codes stand for: in the weight's own basis and order, codes one by one."""
    codebook = weight.codebook
    return weight.rotation is None and weight.permutation is None and (codebook is None or codebook.ndim == 1)


def restore(packed: QuantizedWeight, out: Tensor) -> None:
    """Writes the weights `[..., out, in]` of a `readable` one into `out`, of the same shape and any strides."""
    stack = out if out.ndim == 3 else out.unsqueeze(0)
    matrices, rows, columns = stack.shape
    width = packed.group_size
    groups = -(-columns // width)
    pad = max(8, triton.next_power_of_2(width))
    pairs = max(1, TILE // pad)
    tensors, constants = _parts(packed)
    with torch.cuda.device_of(out):
        _restore[(triton.cdiv(rows * groups, pairs), matrices)](
            *tensors, stack, *stack.stride(), rows * groups, columns, groups,
            **constants, PAIRS=pairs, WIDTH=width, PAD=pad, num_warps=4 if pad <= 4096 else 8,
        )  # fmt: skip


def describe(weight: Tensor, width: int, t: Tensor | None, packed: QuantizedWeight | None) -> dict[str, Tensor]:
    """What a row says of each matrix of a stack `[experts, out, in]`, fp64 `[experts]`, by the names of its fields.

    Tiles have `width` columns. `kurtosis_after` is that of `weight / t`, fp32 `[experts, in]`; `relative_error` is 0
    where no `packed` is given, which must be `readable`.
    """
    matrices, rows, columns = weight.shape
    groups = -(-columns // width)
    pad = max(8, triton.next_power_of_2(width))
    found = torch.empty(matrices, groups, KINDS.value, device=weight.device)
    numbers = torch.empty(matrices, 4, dtype=torch.float64, device=weight.device)
    tensors, constants = _unused(weight) if packed is None else _parts(packed)
    constants["PACKED"] = packed is not None
    if t is not None:
        tensors[4], constants["SCALED"] = t.contiguous(), True
    with torch.cuda.device_of(weight):
        _describe[(groups, matrices)](
            weight, *tensors, found, weight.stride(0), weight.stride(1), rows, columns, groups,
            **constants, ROWS=max(2, STEP // pad), WIDTH=width, PAD=pad, num_warps=4 if pad <= 4096 else 8,
        )  # fmt: skip
        _combine[(matrices,)](found, numbers, groups, PAD=triton.next_power_of_2(groups), num_warps=1)
    return dict(zip(FIELDS, numbers.unbind(1), strict=True))


def _parts(packed: QuantizedWeight) -> tuple[list[Tensor], dict]:
    """Planes, scale, zero, t and codebook as the kernels take them, and what they must know of them."""

    def dense(aux: Aux) -> Tensor:
        return aux.stored.contiguous() if aux.step is None else aux.dense()

    scale, t = dense(packed.scale), packed.input_scale
    tensors = [
        packed.planes[0],
        packed.planes[-1],
        scale,
        scale if packed.zero is None else dense(packed.zero),
        scale if t is None else dense_input_scale(t).contiguous(),
        scale if packed.codebook is None else packed.codebook,
    ]
    has = {"ZERO": packed.zero is not None, "SCALED": t is not None, "CODEBOOK": packed.codebook is not None}
    return tensors, {"NBITS": packed.nbits, **has}


def _unused(weight: Tensor) -> tuple[list[Tensor], dict]:
    return [weight] * 6, {"NBITS": 4, "ZERO": False, "SCALED": False, "CODEBOOK": False}
