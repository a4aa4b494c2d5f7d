"""SINQ: a second scale per input channel, found by Sinkhorn-style normalization (arXiv 2509.22944).

Outliers hurt a group-wise quantizer because one large column stretches the grid of every row it crosses.
SINQ divides them out first: within each tile of all rows x one group of columns it rescales rows and columns,
in the log domain, until their standard deviations are alike, then rounds to nearest. The column factors `t` are
stored per input channel. The row factors are not: min/max rounding per (row, group) is invariant to them
(RTN(W / t / r) * r * t = RTN(W / t) * t), so they only steer the fixed point that `t` reaches.

Follows the authors' released code, whose iteration is in quant/sinkhorn.py. Not taken over: the kurtosis gate
that silently replaces the method by RTN (added after the paper) and the cast of the weights to fp16.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qbench.quant.quantizer import InputStatistics, Quantizer
from qbench.quant.rounding import round_to_nearest
from qbench.quant.sinkhorn import check_steps, column_factors, sinkhorn
from qbench.quant.weight import QuantizedWeight

__all__ = ["SINQ", "sinkhorn"]


@dataclass(frozen=True)
class SINQ(Quantizer):
    nbits: int = 4
    group_size: int = 64
    symmetric: bool = False
    aux_dtype: str = "fp16"
    iterations: int = 16
    step_min: float = 0.7
    step_max: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.iterations, self.step_min, self.step_max)

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> QuantizedWeight:
        width = self.columns(weight)
        t, after = self.input_scale(weight, width)
        return round_to_nearest(
            weight,
            nbits=self.nbits,
            group_size=width,
            symmetric=self.symmetric,
            aux_dtype=self.aux_dtype,
            input_scale=t,
            method="sinq",
            diagnostics={"imbalance_after": after},
        )

    def input_scale(self, weight: Tensor, width: int) -> tuple[Tensor, float]:
        """`t`, fp32 `[in]`, and the geometric mean over tiles of the imbalance that is left, for `[out, in]`."""
        return column_factors(weight, width, self.iterations, self.step_min, self.step_max)
