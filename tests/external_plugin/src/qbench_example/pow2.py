"""Pow2: round to nearest with scales that are powers of two, so that hardware can shift instead of multiply.

The exponent nearest to the exact scale's is taken: rounding it up always would waste up to half of the grid,
rounding it down always would clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.format.weight import per_group
from qbench.quant.quantizer import InputStatistics, Quantizer
from qbench.quant.rounding import group_extremes
from qbench_example.block_float import LEAST, MOST, BlockFloat


@dataclass(frozen=True)
class Pow2(Quantizer):
    nbits: int = 4
    group_size: int = 64

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> BlockFloat:
        values, group_size, top = weight.float(), self.columns(weight), 2**self.nbits - 1
        low, high = group_extremes(values, group_size)
        exact_scale = 2 * torch.maximum(high, -low) / top  # [out, groups]
        exponent = exact_scale.clamp_min(2.0**LEAST).log2().round().clamp_max(MOST)
        steps = per_group(values.clone(), group_size, exponent.exp2(), torch.Tensor.div_)
        codes = (steps + 2 ** (self.nbits - 1)).round().clamp(0, top)
        return BlockFloat.build(codes, exponent, nbits=self.nbits, group_size=group_size, method="pow2")
