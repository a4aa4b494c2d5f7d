"""SINQ as its authors' package computes it (pip: sinq), entered at its optimizer.

Above that, the package rewrites the method name "sinq" to one with 8-bit scales; the paper's tables have 16 bits.
It works in fp32 on a CPU and in fp16 on a GPU. It stores W ~= (codes - zero) * s1 * s2 with s2 = our `t` `[in]`; the
row factors of its normalization are part of s1. Its SINQ-NF4 also keeps a mean per group, which the format of a
QuantizedWeight does not know beside a codebook, and is not offered here.

Since release 0.2.0 it replaces SINQ by plain rounding for a weight whose kurtosis is above 5. That is kept, it is
what the package does, and the row of such a layer says rtn; kurtosis_threshold=null turns it off, as in the paper.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from qbench.format.aux import Aux
from qbench.format.weight import QuantizedWeight
from qbench.plugins.upstream import official, whole_groups
from qbench.quant.quantizer import InputStatistics, Quantizer

NARROWEST = 16  # input channels of a tile
# the wheel holds a module that patches transformers whenever Python starts, for every user of the environment
BESIDE = ", then delete the sitecustomize.py that it puts into site-packages"


@dataclass(frozen=True)
class UpstreamSINQ(Quantizer):
    nbits: int = 4
    group_size: int = 64
    kurtosis_threshold: float | None = 5.0
    version: str = "0.2.0"

    def __post_init__(self) -> None:
        super().__post_init__()
        if -1 < self.group_size < NARROWEST:
            raise ValueError(f"group_size must be at least {NARROWEST}, or -1, got {self.group_size}")
        self.package()

    def package(self) -> ModuleType:
        """Raises ValueError when the package is missing or of another version."""
        os.environ.setdefault("SINQ_AUTO_PATCH", "0")
        return official("sinq", self.version, "sinq.optimize", BESIDE)

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> QuantizedWeight:
        width, package = self.columns(weight), self.package()
        groups = whole_groups(weight, width)
        tiles = weight.float().reshape(-1, width)
        unused = torch.ones(len(tiles), 1, device=weight.device)  # HQQ's first guess, which the method discards
        steps = {"lp_norm": 0.7, "beta": 10.0, "kappa": 1.01, "iters": 20}  # of that search, likewise
        with contextlib.redirect_stdout(sys.stderr):
            kurtosis = float(package.kurtosis(tiles))
            codes, scale, zero, t, _ = package.optimize_weights_proximal(
                tensor=tiles,
                layer_activations=None,
                scale=unused,
                zero=unused,
                min_max=[0, 2**self.nbits - 1],
                axis=1,
                device=str(weight.device),  # only the string "cpu" gives fp32
                opt_params=steps | {"kurtosis_threshold": self.kurtosis_threshold},
                shape=weight.shape,
                tiling_mode="1D",
                method="sinq_nogemlite",
            )
        gated = self.kurtosis_threshold is not None and kurtosis > self.kurtosis_threshold
        return QuantizedWeight.build(
            codes.to(torch.uint8).view(weight.shape),
            Aux.compress(scale.float().view(groups), "fp16"),
            nbits=self.nbits,
            group_size=width,
            zero=Aux.compress(zero.float().view(groups), "fp16"),
            input_scale=t.float().flatten(),
            method=f"rtn (official sinq {self.version})" if gated else f"sinq (official {self.version})",
        )
