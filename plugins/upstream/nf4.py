"""NF4 as bitsandbytes computes it, the implementation that came with QLoRA.

Absmax scales stay what they are, without the package's double quantization, whose 8-bit floats the format of a
QuantizedWeight does not know. Weights and codes are `[out, in]`, scale is `[out, groups]`, in fp16 instead of fp32.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from qbench.errors import none_of
from qbench.format.aux import Aux
from qbench.format.weight import QuantizedWeight
from qbench.plugins.upstream import official, whole_groups
from qbench.quant.quantizer import InputStatistics, Quantizer

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class UpstreamNF4(Quantizer):
    group_size: int = 64
    version: str = "0.50.2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size not in BLOCK_SIZES:
            raise none_of("group_size", self.group_size, BLOCK_SIZES)
        self.package()

    def package(self) -> ModuleType:
        """Raises ValueError when the package is missing or of another version."""
        return official("bitsandbytes", self.version, "bitsandbytes.functional")

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> QuantizedWeight:
        groups = whole_groups(weight, self.group_size)
        with contextlib.redirect_stdout(sys.stderr):
            packed, state = self.package().quantize_4bit(
                weight.float().contiguous(), blocksize=self.group_size, quant_type="nf4"
            )
        packed = packed.flatten()
        return QuantizedWeight.build(
            torch.stack([packed >> 4, packed & 15], 1).view(weight.shape),  # the first in the high bits
            Aux.compress(state.absmax.view(groups), "fp16"),
            nbits=4,
            group_size=self.group_size,
            codebook=state.code,
            method=f"nf4 (bitsandbytes {self.version})",
        )
