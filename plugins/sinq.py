"""SINQ: a second scale per input channel, found by Sinkhorn-style normalization (arXiv 2509.22944).

Outliers hurt a group-wise quantizer because one large column stretches the grid of every row it crosses.
SINQ divides them out first: within each tile of all rows x one group of columns it rescales rows and columns,
in the log domain, until their standard deviations are alike, then rounds to nearest. The column factors `t` are
stored per input channel. The row factors are not: min/max rounding per (row, group) is invariant to them
(RTN(W / t / r) * r * t = RTN(W / t) * t), so they only steer the fixed point that `t` reaches.

What rounds W / t `[out, in]` is a choice: min/max (`inner=rtn`), HQQ's zero point search (`inner=hqq`), or NF4's
levels (`codebook=nf4`, the paper's SINQ-NF4).

Follows the authors' released code, whose iteration is in quant/sinkhorn.py. Not taken over: the kurtosis gate
that silently replaces the method by RTN (added after the paper), the cast of the weights to fp16, and, with NF4,
the mean that the code subtracts from every group first: as in QLoRA, there is no zero point here. Their variant
with HQQ lets every tile search on W / t / r with a constant beta; here all rows weigh as they do in W / t, the whole
weight shares one stop, and the schedule is that of `hqq`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from qbench.errors import none_of
from qbench.format.weight import QuantizedWeight
from qbench.quant.codebook import NF4_LEVELS, round_to_levels
from qbench.quant.half_quadratic import Schedule, round_half_quadratic
from qbench.quant.quantizer import InputStatistics, Quantizer
from qbench.quant.rounding import round_to_nearest
from qbench.quant.sinkhorn import check_steps, column_factors, sinkhorn

__all__ = ["SINQ", "sinkhorn"]

INNER = ("rtn", "hqq")


@dataclass(frozen=True)
class SINQ(Quantizer):
    nbits: int = 4
    group_size: int = 64
    symmetric: bool = False
    aux_dtype: str = "fp16"
    codebook: str | None = None
    inner: str = "rtn"
    iterations: int = 16
    step_min: float = 0.7
    step_max: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.iterations, self.step_min, self.step_max)
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

    def quantize(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[QuantizedWeight]:
        """Quantizes the weights `[out, in]` of a linear group; they share nothing but one kernel launch on a GPU."""
        factors = self._factors(weights, self.columns(weights[0]))
        return [self._round(weight, t, after) for weight, (t, after) in zip(weights, factors, strict=True)]

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> QuantizedWeight:
        return self.quantize([weight], stats)[0]

    def _round(self, weight: Tensor, t: Tensor, after: float) -> QuantizedWeight:
        common = {
            "group_size": self.columns(weight),
            "aux_dtype": self.aux_dtype,
            "input_scale": t,
            "diagnostics": {"imbalance_after": after},
        }
        if self.codebook:
            return round_to_levels(weight, NF4_LEVELS, method="sinq-nf4", **common)
        if self.inner == "hqq":
            return round_half_quadratic(weight, nbits=self.nbits, schedule=Schedule(), method="sinq-hqq", **common)
        return round_to_nearest(weight, nbits=self.nbits, symmetric=self.symmetric, method="sinq", **common)

    def input_scale(self, weight: Tensor, width: int) -> tuple[Tensor, float]:
        """`t`, fp32 `[in]`, and the geometric mean over tiles of the imbalance that is left, for `[out, in]`."""
        return self._factors([weight], width)[0]

    def _factors(self, weights: Sequence[Tensor], width: int) -> list[tuple[Tensor, float]]:
        return column_factors(weights, width, self.iterations, self.step_min, self.step_max)
