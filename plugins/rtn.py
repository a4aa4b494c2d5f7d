"""RTN: round to nearest per (output row, group). No search, no data; the floor every method must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qbench.format.weight import QuantizedWeight
from qbench.quant.quantizer import InputStatistics
from qbench.quant.rotating import RotatingQuantizer
from qbench.quant.rounding import round_to_nearest


@dataclass(frozen=True)
class RTN(RotatingQuantizer):
    nbits: int = 4
    group_size: int = 64
    symmetric: bool = False
    aux_dtype: str = "fp16"

    stacks: ClassVar[bool] = True

    def quantize_basis(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[QuantizedWeight]:
        return [
            round_to_nearest(
                weight,
                nbits=self.nbits,
                group_size=self.columns(weight),
                symmetric=self.symmetric,
                aux_dtype=self.aux_dtype,
            )
            for weight in weights
        ]
