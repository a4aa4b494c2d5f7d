"""NVFP4: the nearest e2m1 number under an 8-bit scale per 16 input channels of a row, and one scale for all of them.

NVIDIA's two levels (arXiv 2509.25149): the blocks' scales are e4m3 numbers, and a global scale of fp32,
absmax / (6 * 448), puts the largest of them at the end of e4m3's range. The linears of a group share the global scale,
since servers multiply them as one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.format.blockfloat import NVFP4Weight
from qbench.quant.blockfloat import round_to_nvfp4
from qbench.quant.quantizer import InputStatistics, Quantizer


@dataclass(frozen=True)
class NVFP4(Quantizer):
    stacks: ClassVar[bool] = True

    def quantize(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[NVFP4Weight]:
        """Quantizes the weights `[..., out, in]` of a group under one global scale; ValueError for NaN or Inf."""
        absmax = torch.stack([weight.float().abs().amax((-2, -1)) for weight in weights]).amax(0)
        return [round_to_nvfp4(weight, absmax) for weight in weights]
