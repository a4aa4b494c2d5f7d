"""HQQ: half-quadratic quantization (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog).

Min/max rounding puts the zero point where the two most extreme weights of a group want it. HQQ moves it to
where most weights want it, by minimizing the sum of |W - W_q|^p with p < 1, a norm that forgives a few large
errors. `scale` stays as min/max gives it, `zero` `[out, groups]` becomes a real number; no data is needed. The
search, the official optimize_weights_proximal_v2, is in quant/half_quadratic.py, since SINQ can use it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qbench.format.weight import QuantizedWeight
from qbench.quant.half_quadratic import Schedule, round_half_quadratic
from qbench.quant.quantizer import InputStatistics
from qbench.quant.rotating import RotatingQuantizer


@dataclass(frozen=True)
class HQQ(RotatingQuantizer):
    nbits: int = 4
    group_size: int = 64
    aux_dtype: str = "fp16"
    lp_norm: float = Schedule.lp_norm
    beta: float = Schedule.beta
    kappa: float = Schedule.kappa
    iterations: int = Schedule.iterations

    stacks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.schedule()

    def schedule(self) -> Schedule:
        """Raises ValueError for settings with which the search cannot run."""
        return Schedule(self.lp_norm, self.beta, self.kappa, self.iterations)

    def quantize_basis(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[QuantizedWeight]:
        return [
            round_half_quadratic(
                weight,
                nbits=self.nbits,
                group_size=self.columns(weight),
                aux_dtype=self.aux_dtype,
                schedule=self.schedule(),
                method="hqq",
            )
            for weight in weights
        ]
