"""NF4 and FP4: 16 fixed levels times the largest |w| of each group (QLoRA, arXiv 2305.14314, section 3).

A uniform grid spends levels evenly, but weights are close to Gaussian and crowd around zero. NF4 puts its
levels at quantiles of the standard normal distribution, so that each is used about equally often, with an exact
zero and the ends at -1 and 1. FP4 is the 4-bit float (sign, two exponent bits, one mantissa bit) that
bitsandbytes offers beside it; its +0 and -0 make 15 levels of 16 codes.

The rounding is in quant/codebook.py, since SINQ-NF4 shares it. bitsandbytes cuts the flattened weight `[out, in]`
into blocks, which are our groups whenever group_size divides `in`; the codes are then the same. QLoRA's double
quantization is aux_dtype=int8, except that ours keeps a uniform 8-bit grid per 64 scales instead of an 8-bit
float per 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qbench.format.weight import QuantizedWeight
from qbench.quant.codebook import FP4_LEVELS, NF4_LEVELS, round_to_levels
from qbench.quant.quantizer import InputStatistics
from qbench.quant.rotating import RotatingQuantizer


@dataclass(frozen=True)
class NF4(RotatingQuantizer):
    group_size: int = 64
    aux_dtype: str = "fp16"

    stacks: ClassVar[bool] = True
    levels: ClassVar[tuple[float, ...]] = NF4_LEVELS
    method: ClassVar[str] = "nf4"

    def quantize_basis(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[QuantizedWeight]:
        common = {"aux_dtype": self.aux_dtype, "method": self.method}
        return [round_to_levels(weight, self.levels, group_size=self.columns(weight), **common) for weight in weights]


@dataclass(frozen=True)
class FP4(NF4):
    levels: ClassVar[tuple[float, ...]] = FP4_LEVELS
    method: ClassVar[str] = "fp4"
