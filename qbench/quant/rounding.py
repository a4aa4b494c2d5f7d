"""Round to nearest on a uniform grid per (row, group): the last step of RTN, SINQ and AWQ alike.

Asymmetric (as in HQQ and the official SINQ): scale = (max - min) / (2**nbits - 1), zero = -round(min / scale),
an integer that is not clamped to the codes' range. Symmetric (as in GPTQ): scale = 2 max|w| / (2**nbits - 1)
around zero = 2**(nbits - 1); all 2**nbits codes are used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qbench.format.aux import FP16_TINY, Aux
from qbench.format.weight import QuantizedWeight, per_group
from qbench.quant import gpu

# A group whose values are all close to one number c has a zero point near -c / scale; plain formulas give Inf there.
# The range is kept from falling below |c| * (2**nbits - 1) / limit, so that the zero point is stored exactly: fp16
# holds integers up to 2048, and 64 neighbours in int8 keep a step of one as long as they span at most 255.
ZERO_LIMIT = {"fp16": 2048, "int8": 100}


def group_extremes(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Least and largest value of every group: `[..., in]` -> two `[..., groups]`."""
    if gpu.fused(weight, group_size):
        from qbench.kernels import rounding as kernels

        return kernels.extremes(weight, group_size)
    full = weight.shape[-1] // group_size * group_size
    low, high = [], []
    for blocks in (weight[..., :full].unflatten(-1, (-1, group_size)), weight[..., full:].unsqueeze(-2)):
        if blocks.numel():
            low.append(blocks.amin(-1))
            high.append(blocks.amax(-1))
    return torch.cat(low, -1), torch.cat(high, -1)


def grid(low: Tensor, high: Tensor, nbits: int, symmetric: bool, aux_dtype: str) -> tuple[Aux, Aux | None, Tensor]:
    """Scale and zero as stored, and a divisor, for groups that span fp32 `low .. high`, `[..., out, groups]`.

    The divisor is the fp32 scale to round with: codes = round(w / divisor + zero). With fp16 every group's
    grid depends on that group alone; with int8 it depends on the others of its block too.
    """
    top = 2**nbits - 1
    if symmetric:
        exact_scale = 2 * torch.maximum(high, -low) / top
        floor = torch.zeros_like(low)
    else:
        floor = torch.maximum(high.abs(), low.abs()) / ZERO_LIMIT[aux_dtype]
        exact_scale = ((high - low) / top).maximum(floor)
    scale = Aux.compress(exact_scale.clamp_min(FP16_TINY), aux_dtype)
    # an int8 block can round its smallest scale to zero: dividing by it must not give NaN or an endless zero point
    divisor = (exact_scale if aux_dtype == "fp16" else scale.dense().maximum(floor)).clamp_min(FP16_TINY)
    zero = None if symmetric else Aux.compress(-(low / divisor).round(), aux_dtype)
    return scale, zero, divisor


def round_to_nearest(
    weight: Tensor,
    *,
    nbits: int,
    group_size: int,
    symmetric: bool = False,
    aux_dtype: str = "fp16",
    input_scale: Tensor | None = None,
    method: str = "rtn",
    diagnostics: Mapping[str, float] | None = None,
) -> QuantizedWeight:
    """Quantizes `weight / input_scale`, `[..., out, in]`, on the device it is on, in fp32.

    With aux in int8 the codes are rounded against the scales as stored, so that what the storage loses is not lost
    a second time. In fp16 that loss is 2**-12 and the codes come from the fp32 scales, as published ones do.
    """
    if gpu.fused(weight, group_size):
        planes, scale, zero = _fused(weight, nbits, group_size, symmetric, aux_dtype, input_scale)
        t = None if input_scale is None else input_scale.half()
        return QuantizedWeight(
            tuple(weight.shape), nbits, group_size, planes, scale, zero, t, method=method, diagnostics=diagnostics or {}
        )
    codes, scale, zero = _round(weight, nbits, group_size, symmetric, aux_dtype, input_scale)
    return QuantizedWeight.build(
        codes.to(torch.uint8),
        scale,
        nbits=nbits,
        group_size=group_size,
        zero=zero,
        input_scale=input_scale,
        method=method,
        diagnostics=diagnostics,
    )


def _round(
    weight: Tensor, nbits: int, group_size: int, symmetric: bool, aux_dtype: str, input_scale: Tensor | None
) -> tuple[Tensor, Aux, Aux | None]:
    """Codes `[..., out, in]` as fp32, scale and zero."""
    values = weight.float() if input_scale is None else weight.float() / input_scale.float().unsqueeze(-2)
    scale, zero, divisor = grid(*group_extremes(values, group_size), nbits, symmetric, aux_dtype)
    steps = values.clone() if input_scale is None else values
    per_group(steps, group_size, divisor, torch.Tensor.div_)
    if zero is None:
        steps += 2.0 ** (nbits - 1)
    else:
        per_group(steps, group_size, zero.dense(), torch.Tensor.add_)
    return steps.round_().clamp_(0, 2**nbits - 1), scale, zero


def rounding_error(
    weight: Tensor, *, nbits: int, group_size: int, symmetric: bool, aux_dtype: str, input_scale: Tensor
) -> Tensor:
    """What `round_to_nearest` adds to a weight `[..., out, in]`: the error of the restored weight, for scale searches.

    fp32; in bf16 where the kernels compute it, since only sums over it are compared.
    """
    if gpu.fused(weight, group_size):
        from qbench.kernels import rounding as kernels

        given = None
        if aux_dtype != "fp16":
            scale, zero, divisor = grid(*kernels.extremes(weight, group_size, input_scale), nbits, symmetric, aux_dtype)
            given = scale.dense(), _centre(zero, divisor, nbits), divisor
        return kernels.uniform_error(weight, group_size, nbits, symmetric, input_scale, given)
    values, scale, zero = _round(weight, nbits, group_size, symmetric, aux_dtype, input_scale)
    # as QuantizedWeight.dequantize, step by step, but codes that only a search looks at need not be packed
    if zero is None:
        values -= 2.0 ** (nbits - 1)
    else:
        per_group(values, group_size, zero.dense(), torch.Tensor.sub_)
    per_group(values, group_size, scale.dense(), torch.Tensor.mul_)
    return values.mul_(input_scale.half().float().unsqueeze(-2)).sub_(weight)


def _fused(
    weight: Tensor, nbits: int, group_size: int, symmetric: bool, aux_dtype: str, input_scale: Tensor | None
) -> tuple[tuple[Tensor, ...], Aux, Aux | None]:
    """Planes, scale and zero by kernels: one pass with aux in fp16; in int8, where grids depend on others, two."""
    from qbench.kernels import rounding as kernels

    if aux_dtype == "fp16":
        planes, scales, zeros = kernels.uniform(weight, group_size, nbits, symmetric, input_scale)
        return planes, Aux(scales), None if zeros is None else Aux(zeros)
    scale, zero, divisor = grid(*kernels.extremes(weight, group_size, input_scale), nbits, symmetric, aux_dtype)
    middle = _centre(zero, divisor, nbits)
    return kernels.uniform_on(weight, group_size, nbits, divisor, middle, input_scale), scale, zero


def _centre(zero: Aux | None, like: Tensor, nbits: int) -> Tensor:
    return torch.full_like(like, 2.0 ** (nbits - 1)) if zero is None else zero.dense()
