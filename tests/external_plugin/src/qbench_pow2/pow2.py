"""Pow2: symmetric round to nearest whose scales are powers of two, so that hardware can shift instead of multiply.

The exponent nearest to the exact scale's is taken: rounding it up always would waste up to half of the grid,
rounding it down always would clip. fp16 holds powers of two from 2**-24 to 2**15 exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.format.aux import FP16_TINY, Aux
from qbench.format.weight import QuantizedWeight, per_group
from qbench.quant.quantizer import InputStatistics, Quantizer
from qbench.quant.rounding import group_extremes


@dataclass(frozen=True)
class Pow2(Quantizer):
    nbits: int = 4
    group_size: int = 64

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> QuantizedWeight:
        values, group_size, top = weight.float(), self.columns(weight), 2**self.nbits - 1
        low, high = group_extremes(values, group_size)
        exact_scale = 2 * torch.maximum(high, -low) / top  # [out, groups]
        scale = exact_scale.clamp_min(FP16_TINY).log2().round().clamp_max(15).exp2()
        steps = per_group(values.clone(), group_size, scale, torch.Tensor.div_)
        codes = (steps + 2 ** (self.nbits - 1)).round().clamp(0, top).to(torch.uint8)
        return QuantizedWeight.build(
            codes,
            Aux.compress(scale, "fp16"),
            nbits=self.nbits,
            group_size=group_size,
            method="pow2",
        )
