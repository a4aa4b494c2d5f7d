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

TILE = 4096  # weights that a program holds


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
def _describe(weight, low_plane, high_plane, scale, zero, t, codebook, found, matrix_stride, row_stride, height,
              columns, groups, NBITS: tl.constexpr, ZERO: tl.constexpr, SCALED: tl.constexpr, CODEBOOK: tl.constexpr,
              PACKED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):  # fmt: skip
    group, matrix = tl.program_id(0), tl.program_id(1)
    inner = tl.arange(0, PAD)
    column = group * WIDTH + inner
    there = (inner < WIDTH) & (column < columns)
    width = tl.sum(there.to(tl.float32))
    count = width * height
    weight += matrix.to(tl.int64) * matrix_stride
    channel = matrix * columns + column
    column_sum = tl.zeros([ROWS, PAD], tl.float32)
    highest, lowest = tl.zeros([ROWS], tl.float32), tl.full([ROWS], float("inf"), tl.float32)
    total, scaled_total = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    error, norm = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    factor = tl.full([PAD], 1.0, tl.float32)
    if SCALED:
        factor = tl.load(t + channel, mask=there, other=1.0)
    for start in tl.range(0, height, ROWS):
        row = start + tl.arange(0, ROWS)
        exists = row < height
        inside = exists[:, None] & there[None, :]
        at = weight + row.to(tl.int64)[:, None] * row_stride + column[None, :]
        m = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        own = tl.sum(m, 1)
        deviation = tl.where(inside, m - (own / width)[:, None], 0.0)
        variance = tl.sum(deviation * deviation, 1) / tl.maximum(width - 1, 1)
        highest = tl.maximum(highest, variance)
        lowest = tl.minimum(lowest, tl.where(exists, variance, float("inf")))
        column_sum += m
        total += own
        norm += tl.sum(m * m, 1)
        if SCALED:
            scaled_total += tl.sum(m / factor[None, :], 1)
        if PACKED:
            everywhere = matrix * height + row
            r = restored(
                low_plane, high_plane, scale, zero, t, codebook, everywhere, tl.broadcast_to(column[None, :], m.shape),
                everywhere * groups + group, channel[None, :], exists, inside, columns, NBITS, ZERO, SCALED, CODEBOOK,
            )  # fmt: skip
            missed = tl.where(inside, m - r, 0.0)
            error += tl.sum(missed * missed, 1)

    column_mean = tl.sum(column_sum, 0) / height
    mean, scaled_mean = tl.sum(total) / count, tl.sum(scaled_total) / count
    column_squares = tl.zeros([ROWS, PAD], tl.float32)
    two, three, four = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    scaled_two, scaled_three = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    scaled_four = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, height, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < height)[:, None] & there[None, :]
        at = weight + row.to(tl.int64)[:, None] * row_stride + column[None, :]
        m = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        deviation = tl.where(inside, m - column_mean[None, :], 0.0)
        column_squares += deviation * deviation
        deviation = tl.where(inside, m - mean, 0.0)
        square = deviation * deviation
        two += tl.sum(square, 1)
        three += tl.sum(square * deviation, 1)
        four += tl.sum(square * square, 1)
        if SCALED:
            deviation = tl.where(inside, m / factor[None, :] - scaled_mean, 0.0)
            square = deviation * deviation
            scaled_two += tl.sum(square, 1)
            scaled_three += tl.sum(square * deviation, 1)
            scaled_four += tl.sum(square * square, 1)
    variance = tl.sum(column_squares, 0) / tl.maximum(height - 1, 1)

    found += (matrix * groups + group) * 13
    tl.store(found, tl.maximum(tl.max(highest), tl.max(tl.where(there, variance, 0.0))))
    tl.store(found + 1, tl.minimum(tl.min(lowest), tl.min(tl.where(there, variance, float("inf")))))
    tl.store(found + 2, count)
    tl.store(found + 3, mean)
    tl.store(found + 4, tl.sum(two))
    tl.store(found + 5, tl.sum(three))
    tl.store(found + 6, tl.sum(four))
    tl.store(found + 7, scaled_mean)
    tl.store(found + 8, tl.sum(scaled_two))
    tl.store(found + 9, tl.sum(scaled_three))
    tl.store(found + 10, tl.sum(scaled_four))
    tl.store(found + 11, tl.sum(error))
    tl.store(found + 12, tl.sum(norm))


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
    found = torch.empty(matrices, groups, 13, device=weight.device)
    tensors, constants = _unused(weight) if packed is None else _parts(packed)
    if t is not None:
        tensors[4], constants["SCALED"] = t.contiguous(), True
    with torch.cuda.device_of(weight):
        _describe[(groups, matrices)](
            weight, *tensors, found, weight.stride(0), weight.stride(1), rows, columns, groups,
            **constants, PACKED=packed is not None, ROWS=max(2, TILE // pad), WIDTH=width, PAD=pad, num_warps=8,
        )  # fmt: skip
    high, low, count, mean, two, three, four, *scaled, error, norm = found.double().unbind(2)
    before = _kurtosis(count, mean, two, three, four)
    error, norm = error.sum(1).sqrt(), norm.sum(1).sqrt()
    return {
        "relative_error": torch.where(norm > 0, error / norm, error),
        "imbalance_before": (high.sqrt() / low.sqrt().clamp_min(1e-12)).log().mean(1).exp(),
        "kurtosis_before": before,
        "kurtosis_after": before if t is None else _kurtosis(count, *scaled),
    }


def _kurtosis(count: Tensor, mean: Tensor, two: Tensor, three: Tensor, four: Tensor) -> Tensor:
    """Pearson kurtosis `[experts]` of all values, from the moments `[experts, tiles]` of tiles around their means."""
    total = count.sum(1, keepdim=True)
    off = mean - (count * mean).sum(1, keepdim=True) / total
    variance = (two + count * off**2).sum(1) / total[:, 0]
    fourth = (four + 4 * off * three + 6 * off**2 * two + count * off**4).sum(1) / total[:, 0]
    return torch.where(variance > 0, fourth / variance**2, 0.0)


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
