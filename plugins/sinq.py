"""SINQ: a second scale per input channel, found by Sinkhorn-style normalization (arXiv 2509.22944).

Outliers hurt a group-wise quantizer because one large column stretches the grid of every row it crosses.
SINQ divides them out first: within each tile of all rows x one group of columns it rescales rows and columns,
in the log domain, until their standard deviations are alike, then rounds to nearest. The column factors `t` are
stored per input channel. The row factors are not: min/max rounding per (row, group) is invariant to them
(RTN(W / t / r) * r * t = RTN(W / t) * t), so they only steer the fixed point that `t` reaches.

With `shared_t` the linears of a group, which read the same tensor, get one t, found on all their rows stacked: what
kernels that merge them need, and the paper's no-overhead variant; each linear still stores its own copy. `t_dtype` is
how t is stored; in 8 bits, W is divided by t as stored. `kurtosis_gate` is what the authors' package does since 0.2.0
with a gate of 5: a weight whose Pearson kurtosis over all values (3 for a Gaussian) is above the gate is rounded as by
RTN, without t and whatever else was asked for, and its method in effect says `rtn`.

What rounds W / t `[out, in]` is a choice: min/max (`inner=rtn`), HQQ's zero point search (`inner=hqq`), or NF4's
levels (`codebook=nf4`, the paper's SINQ-NF4).

Follows the authors' released code, whose iteration is in quant/sinkhorn.py. Not taken over: the kurtosis gate as the
default (it came after the paper), the cast of the weights to fp16, and, with NF4, the mean that the code subtracts
from every group first: as in QLoRA, there is no zero point here. Their variant with HQQ lets every tile search on W /
t / r with a constant beta; here all rows weigh as they do in W / t, the whole weight shares one stop, and the
schedule is that of `hqq`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor

from qbench.errors import none_of
from qbench.format.aux import INPUT_SCALE_DTYPES, dense_input_scale, store_input_scale
from qbench.format.weight import QuantizedWeight
from qbench.quant.codebook import NF4_LEVELS, round_to_levels
from qbench.quant.diagnostics import kurtosis
from qbench.quant.half_quadratic import Schedule, round_half_quadratic
from qbench.quant.quantizer import InputStatistics
from qbench.quant.rotating import RotatingQuantizer
from qbench.quant.rounding import round_to_nearest
from qbench.quant.sinkhorn import check_steps, column_factors, sinkhorn

__all__ = ["SINQ", "sinkhorn"]

INNER = ("rtn", "hqq")


@dataclass(frozen=True)
class SINQ(RotatingQuantizer):
    nbits: int = 4
    group_size: int = 64
    symmetric: bool = False
    aux_dtype: str = "fp16"
    codebook: str | None = None
    inner: str = "rtn"
    iterations: int = 16
    step_min: float = 0.7
    step_max: float = 2.0
    shared_t: bool = False
    t_dtype: str = "fp16"
    kurtosis_gate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.iterations, self.step_min, self.step_max)
        if self.t_dtype not in INPUT_SCALE_DTYPES:
            raise none_of("t_dtype", self.t_dtype, INPUT_SCALE_DTYPES)
        if self.kurtosis_gate is not None and not self.kurtosis_gate > 0:
            raise ValueError(f"kurtosis_gate must be null or a positive number, got {self.kurtosis_gate}")
        if self.inner not in INNER:
            raise none_of("inner", self.inner, INNER)
        if self.codebook not in (None, "nf4"):
            raise ValueError(f"codebook must be null or nf4, got {self.codebook!r}")
        if self.codebook and self.nbits != 4:
            raise ValueError(f"codebook=nf4 has 16 levels and needs nbits=4, got nbits={self.nbits}")
        if self.codebook and self.inner != "rtn":
            raise ValueError(f"codebook=nf4 has no zero point for inner={self.inner} to search; choose one of the two")
        if self.symmetric and (self.codebook or self.inner != "rtn"):
            other = "codebook=nf4" if self.codebook else f"inner={self.inner}"
            raise ValueError(f"symmetric=true is a uniform grid without zero points; it cannot be had with {other}")

    @property
    def joint(self) -> bool:
        return self.shared_t

    @property
    def stacks(self) -> bool:  # the gate decides matrix by matrix
        return self.kurtosis_gate is None

    def quantize_basis(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[QuantizedWeight]:
        """Quantizes the weights `[..., out, in]` of a group; they share t if asked to, else one kernel launch."""
        gate, width = self.kurtosis_gate, self.columns(weights[0])
        balance = [gate is None or float(kurtosis(weight)) <= gate for weight in weights]
        balanced = list(compress(weights, balance))
        if balanced and self.shared_t:
            together = torch.cat([weight.float() for weight in balanced], -2)
            factors = iter(self._factors([together], width) * len(balanced))
        else:
            factors = iter(self._factors(balanced, width) if balanced else [])
        chosen = zip(weights, balance, strict=True)
        return [self._round(weight, *next(factors)) if yes else self._plain(weight) for weight, yes in chosen]

    def _plain(self, weight: Tensor) -> QuantizedWeight:
        common = {"group_size": self.columns(weight), "symmetric": self.symmetric, "aux_dtype": self.aux_dtype}
        return round_to_nearest(weight, nbits=self.nbits, **common)

    def _round(self, weight: Tensor, t: Tensor, after: Tensor) -> QuantizedWeight:
        if self.t_dtype == "fp16":
            return self._round_balanced(weight, t, after)
        stored = store_input_scale(t, self.t_dtype)
        return replace(self._round_balanced(weight, dense_input_scale(stored), after), input_scale=stored)

    def _round_balanced(self, weight: Tensor, t: Tensor, after: Tensor) -> QuantizedWeight:
        common = {
            "group_size": self.columns(weight),
            "aux_dtype": self.aux_dtype,
            "input_scale": t,
            "diagnostics": {"imbalance_after": after if after.ndim else float(after)},
        }
        if self.codebook:
            return round_to_levels(weight, NF4_LEVELS, method="sinq-nf4", **common)
        if self.inner == "hqq":
            return round_half_quadratic(weight, nbits=self.nbits, schedule=Schedule(), method="sinq-hqq", **common)
        return round_to_nearest(weight, nbits=self.nbits, symmetric=self.symmetric, method="sinq", **common)

    def input_scale(self, weight: Tensor, width: int) -> tuple[Tensor, float]:
        """`t`, fp32 `[in]`, and the geometric mean over tiles of the imbalance that is left, for `[out, in]`."""
        [(t, after)] = self._factors([weight], width)
        return t, float(after)

    def _factors(self, weights: Sequence[Tensor], width: int) -> list[tuple[Tensor, Tensor]]:
        return column_factors(weights, width, self.iterations, self.step_min, self.step_max)
