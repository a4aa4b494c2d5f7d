"""MXFP4 and MXFP8: the nearest e2m1 or e4m3 number under a power of two that 32 input channels of a row share.

The formats and the rule for the shared exponent are those of the OCP's Microscaling Formats (MX) v1.0 (arXiv
2310.10537): floor(log2 of the largest magnitude), less that of the largest element. Magnitudes above it, up to 8/6 of
the largest e2m1, are cut off; `exponent=ceil` takes the next power of two where that would happen, and `even` where the
largest magnitude rounds up to a power of two (quant/blockfloat.py). gpt-oss is published in MXFP4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qbench.errors import none_of
from qbench.format.blockfloat import FP8Weight, MXFP4Weight
from qbench.quant.blockfloat import EXPONENTS, round_to_mxfp4, round_to_mxfp8
from qbench.quant.quantizer import InputStatistics, Quantizer


@dataclass(frozen=True)
class MXFP4(Quantizer):
    exponent: str = "floor"

    stacks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exponent not in EXPONENTS:
            raise none_of("exponent", self.exponent, EXPONENTS)

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> MXFP4Weight | FP8Weight:
        return round_to_mxfp4(weight, self.exponent)


@dataclass(frozen=True)
class MXFP8(MXFP4):
    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> FP8Weight:
        return round_to_mxfp8(weight, self.exponent)
