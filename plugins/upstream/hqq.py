"""HQQ as its authors' package computes it (pip: hqq), with the solver that the package uses by default.

That solver works in fp32 on a CPU and in fp16 on a GPU. Its zero points are the ones two updates past the best
(see quant/half_quadratic.py). Weights and codes are `[out, in]`, scale and zero `[out, groups]`, groups along `in`.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from qbench.format.aux import Aux
from qbench.format.weight import QuantizedWeight
from qbench.plugins.upstream import official, whole_groups
from qbench.quant.quantizer import InputStatistics, Quantizer


@dataclass(frozen=True)
class UpstreamHQQ(Quantizer):
    nbits: int = 4
    group_size: int = 64
    version: str = "0.2.8.post1"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.package()

    def package(self) -> ModuleType:
        """Raises ValueError when the package is missing or of another version."""
        return official("hqq", self.version, "hqq.core.quantize", " termcolor")

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> QuantizedWeight:
        width = self.columns(weight)
        groups = whole_groups(weight, width)
        settings = {"nbits": self.nbits, "group_size": width, "axis": 1, "bitpack": False}
        with contextlib.redirect_stdout(sys.stderr):
            codes, meta = self.package().Quantizer.quantize(weight.float(), **settings, device=str(weight.device))
        return QuantizedWeight.build(
            codes.to(torch.uint8).view(weight.shape),
            Aux.compress(meta["scale"].float().view(groups), "fp16"),
            nbits=self.nbits,
            group_size=width,
            zero=Aux.compress(meta["zero"].float().view(groups), "fp16"),
            method=f"hqq (official {self.version})",
        )
