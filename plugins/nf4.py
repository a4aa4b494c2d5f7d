"""NF4 and FP4: 16 fixed levels times the largest |w| of each group (QLoRA, arXiv 2305.14314, section 3).

A uniform grid spends levels evenly, but weights are close to Gaussian and crowd around zero. NF4 puts its
levels at quantiles of the standard normal distribution, so that each is used about equally often, with an exact
zero and the ends at -1 and 1. FP4 is the 4-bit float (sign, two exponent bits, one mantissa bit) that
bitsandbytes offers beside it; its +0 and -0 make 15 levels of 16 codes.

    scale[o, g] = max |W[o, i]| over the group;  codes[o, i] = the level nearest to W[o, i] / scale[o, g(i)]

W is `[out, in]`, scale `[out, groups]`; there is no zero point. bitsandbytes cuts the flattened weight into
blocks, which are these groups whenever group_size divides `in`; the codes are then the same. QLoRA's double
quantization is aux_dtype=int8, except that ours keeps a uniform 8-bit grid per 64 scales instead of an 8-bit
float per 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.quant.aux import FP16_TINY, Aux
from qbench.quant.quantizer import InputStatistics, Quantizer
from qbench.quant.rounding import group_extremes
from qbench.quant.weight import QuantizedWeight, per_group

# The table of the paper's appendix E. Computing the quantiles anew gives it only to 2e-7, and codes mean the
# same to other software only if the table is the same.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# By bit pattern, in units of 1/12, as bitsandbytes numbers them: their order is not that of the values.
FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_LEVELS = tuple(sign * m / 12 for sign in (1, -1) for m in FP4_MAGNITUDES)


@dataclass(frozen=True)
class NF4(Quantizer):
    group_size: int = 64
    aux_dtype: str = "fp16"

    levels: ClassVar[tuple[float, ...]] = NF4_LEVELS
    method: ClassVar[str] = "nf4"

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> QuantizedWeight:
        values, width = weight.float(), self.columns(weight)
        low, high = group_extremes(values, width)
        largest = torch.maximum(high, -low).clamp_min(FP16_TINY)  # an all-zero group: zero over anything is zero
        scale = Aux.compress(largest, self.aux_dtype)
        # as in round_to_nearest: codes are fitted to scales stored in int8; those in fp16 are close enough
        divisor = largest if self.aux_dtype == "fp16" else scale.dense().clamp_min(FP16_TINY)
        # times the reciprocal, as bitsandbytes does: a quotient could fall on the other side of a midpoint
        ratios = per_group(values.clone(), width, divisor.reciprocal(), torch.Tensor.mul_)
        codebook = torch.tensor(self.levels, device=weight.device)
        return QuantizedWeight.build(
            nearest(ratios, codebook),
            scale,
            nbits=4,
            group_size=width,
            codebook=codebook,
            method=self.method,
        )


@dataclass(frozen=True)
class FP4(NF4):
    levels: ClassVar[tuple[float, ...]] = FP4_LEVELS
    method: ClassVar[str] = "fp4"


def nearest(ratios: Tensor, codebook: Tensor) -> Tensor:
    """Codes (uint8, the shape of `ratios`) of the nearest levels; a tie goes to the lower level."""
    ordered, order = codebook.sort(stable=True)
    midpoints = (ordered[1:] + ordered[:-1]) / 2
    return order.to(torch.uint8)[torch.bucketize(ratios.contiguous(), midpoints, out_int32=True)]
