"""`quantizer=none`: the variant in which nothing is quantized, evaluated like any other.

Its difference to the original and its KL are 0 and its top-1 agreement is 1, exactly and in every precision, or a
measure is wrong. Its coverage is 0, and its linears cost what 16 bit cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from qbench.format.weight import QuantizedWeight
from qbench.quant.quantizer import InputStatistics, Quantizer

BITS_PER_WEIGHT = 16.0


@dataclass(frozen=True)
class Original(Quantizer):
    """Has no settings, and is never handed a weight: whoever quantizes a model leaves it alone for this one."""

    def for_layer(self, name: str) -> Quantizer | None:
        return None

    def quantize(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[QuantizedWeight]:
        raise TypeError("quantizer=none quantizes nothing: the model is to be left as it is")
