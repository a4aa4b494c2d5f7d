"""FP8: the nearest e4m3 number, an 8-bit float, under a scale per tensor, per row or per block of 128 x 128.

The scale maps the largest magnitude to 448, the largest e4m3 (arXiv 2209.05433). One scale per row is llm-compressor's
FP8_DYNAMIC, one per tensor its FP8, blocks are those of DeepSeek-V3 (arXiv 2412.19437, section 3.3). Only weights are
rounded here: kernels that also round the inputs lose more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qbench.errors import none_of
from qbench.format.blockfloat import FP8Weight
from qbench.quant.blockfloat import round_to_fp8
from qbench.quant.quantizer import InputStatistics, Quantizer

SCALES = ("tensor", "channel", "block")
BLOCK = (128, 128)


@dataclass(frozen=True)
class FP8(Quantizer):
    scale: str = "channel"

    stacks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in SCALES:
            raise none_of("scale", self.scale, SCALES)

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> FP8Weight:
        rows, columns = weight.shape[-2:]
        return round_to_fp8(weight, {"tensor": (rows, columns), "channel": (1, columns), "block": BLOCK}[self.scale])
