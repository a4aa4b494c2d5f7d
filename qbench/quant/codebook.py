"""NF4 and FP4: 16 fixed levels times the largest |w| of each group; what those two methods and SINQ-NF4 share.

    scale[o, g] = max |W[o, i]| over the group;  codes[o, i] = the level nearest to W[o, i] / scale[o, g(i)]

W is `[out, in]`, or W / t with an input scale t `[in]`; scale is `[out, groups]`; there is no zero point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qbench.format.aux import FP16_TINY, Aux
from qbench.format.weight import QuantizedWeight, per_group
from qbench.quant import gpu
from qbench.quant.rounding import group_extremes

# The table of QLoRA's appendix E. Computing the quantiles anew gives it only to 2e-7, and codes mean the same to
# other software only if the table is the same.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# By bit pattern, in units of 1/12, as bitsandbytes numbers them: their order is not that of the values.
FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
PART = 2**18  # weights whose levels are looked up at a time
FP4_LEVELS = tuple(sign * m / 12 for sign in (1, -1) for m in FP4_MAGNITUDES)


def round_to_levels(
    weight: Tensor,
    levels: Sequence[float],
    *,
    group_size: int,
    aux_dtype: str = "fp16",
    input_scale: Tensor | None = None,
    method: str,
    diagnostics: Mapping[str, float] | None = None,
) -> QuantizedWeight:
    """Quantizes `weight / input_scale`, `[..., out, in]`, in fp32.

    Every value becomes one of 16 `levels` within [-1, 1], times a scale per group.
    """
    if gpu.fused(weight, group_size):
        planes, scale = _fused(weight, levels, group_size, aux_dtype, input_scale)
        return QuantizedWeight(
            tuple(weight.shape),
            4,
            group_size,
            planes,
            scale,
            input_scale=None if input_scale is None else input_scale.half(),
            codebook=torch.tensor(levels, device=weight.device),
            method=method,
            diagnostics=dict(diagnostics or {}),
        )
    values = weight.float().clone() if input_scale is None else weight.float() / input_scale.float().unsqueeze(-2)
    low, high = group_extremes(values, group_size)
    largest = torch.maximum(high, -low).clamp_min(FP16_TINY)  # an all-zero group: zero over anything is zero
    scale = Aux.compress(largest, aux_dtype)
    # as in round_to_nearest: codes are fitted to scales stored in int8; those in fp16 are close enough
    divisor = largest if aux_dtype == "fp16" else scale.dense().clamp_min(FP16_TINY)
    # times the reciprocal, as bitsandbytes does: a quotient could fall on the other side of a midpoint
    ratios = per_group(values, group_size, divisor.reciprocal(), torch.Tensor.mul_)
    codebook = torch.tensor(levels, device=weight.device)
    return QuantizedWeight.build(
        nearest(ratios, codebook),
        scale,
        nbits=4,
        group_size=group_size,
        input_scale=input_scale,
        codebook=codebook,
        method=method,
        diagnostics=diagnostics,
    )


def _fused(
    weight: Tensor, levels: Sequence[float], group_size: int, aux_dtype: str, input_scale: Tensor | None
) -> tuple[tuple[Tensor, ...], Aux]:
    """Planes and scale by kernels: one pass with aux in fp16; in int8, where scales depend on others, two."""
    from qbench.kernels import rounding as kernels

    if aux_dtype == "fp16":
        planes, largest = kernels.codebook(weight, group_size, levels, input_scale)
        return planes, Aux(largest)
    low, high = kernels.extremes(weight, group_size, input_scale)
    scale = Aux.compress(torch.maximum(high, -low).clamp_min(FP16_TINY), aux_dtype)
    divisor = scale.dense().clamp_min(FP16_TINY)
    return kernels.codebook(weight, group_size, levels, input_scale, divisor)[0], scale


def nearest(ratios: Tensor, codebook: Tensor) -> Tensor:
    """Codes (uint8, the shape of `ratios`) of the nearest levels; a tie goes to the lower level."""
    ordered, order = codebook.sort(stable=True)
    midpoints, order = (ordered[1:] + ordered[:-1]) / 2, order.to(torch.uint8)
    codes = torch.empty_like(ratios, dtype=torch.uint8, memory_format=torch.contiguous_format)
    # part by part: indices take 12 bytes a weight
    for some, chosen in zip(ratios.reshape(-1).split(PART), codes.view(-1).split(PART), strict=True):
        chosen.copy_(order[torch.bucketize(some, midpoints, out_int32=True)])
    return codes
