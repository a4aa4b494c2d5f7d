"""A-SINQ: SINQ's column factors, corrected for how large each channel's inputs are (arXiv 2509.22944, section 2.4).

SINQ balances the weights alone; AWQ looks at the inputs. Here both act in turn. Sinkhorn on the raw weights
`[out, in]` gives mu `[in]`; the balanced W / mu is multiplied by AWQ's channel scale s and rounded to nearest;
t = mu / s is stored. s = mean|x|^ratio / mean|w|^(1 - ratio); the ratio out of 0, 1/20, .., 19/20 is the one with
the least mean |error| of the output X W^T on a sample of inputs X `[tokens, in]` (the paper's; "l2" squares it).

Follows the authors' code rather than the paper's Eq. 6, which lacks the weights' part of s: every linear has a ratio
of its own, also within a group that reads the same tensor, and nothing is clipped. Not taken over: their five
built-in calibration prompts (all calibrated methods get the same tokens here), the kurtosis gate and fp16 arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from qbench.quant.channel_scale import T_RANGE, OutputError, calibration, channel_scale
from qbench.quant.quantizer import InputStatistics, Quantizer, Statistic
from qbench.quant.rounding import round_to_nearest
from qbench.quant.sinkhorn import check_steps, column_factors
from qbench.quant.weight import QuantizedWeight

LOSSES = ("l1", "l2")


@dataclass(frozen=True)
class ASINQ(Quantizer):
    nbits: int = 4
    group_size: int = 64
    symmetric: bool = False
    aux_dtype: str = "fp16"
    iterations: int = 16
    step_min: float = 0.7
    step_max: float = 2.0
    ratios: int = 20
    loss: str = "l1"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.INPUT_ABSMEAN, Statistic.INPUTS})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.iterations, self.step_min, self.step_max)
        if self.ratios < 1:
            raise ValueError(f"ratios must be at least 1, got {self.ratios}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")

    def quantize(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[QuantizedWeight]:
        """Quantizes the weights `[out, in]` of a linear group; ValueError without usable inputs."""
        absmean, inputs = calibration(weights, stats, "asinq")
        output_error = OutputError(inputs, self.loss)  # the group shares its inputs, and nothing else
        return [self._search(weight.float(), absmean, output_error) for weight in weights]

    def _search(self, weight: Tensor, absmean: Tensor, output_error: OutputError) -> QuantizedWeight:
        width = self.columns(weight)
        mu, after = column_factors(weight, width, self.iterations, self.step_min, self.step_max)
        magnitude = weight.abs().mean(0)

        def attempt(ratio: float) -> QuantizedWeight:
            t = (mu / channel_scale(absmean, magnitude, ratio)).clamp(*T_RANGE)
            rounded = round_to_nearest(
                weight,
                nbits=self.nbits,
                group_size=width,
                symmetric=self.symmetric,
                aux_dtype=self.aux_dtype,
                input_scale=t,
                method="asinq",
            )
            loss = output_error(rounded.dequantize().sub_(weight))
            return replace(rounded, diagnostics={"ratio": ratio, "loss": loss, "imbalance_after": after})

        return min((attempt(i / self.ratios) for i in range(self.ratios)), key=lambda q: q.diagnostics["loss"])
