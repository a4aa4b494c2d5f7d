"""A-SINQ: SINQ's column factors, corrected for how large each channel's inputs are (arXiv 2509.22944, section 2.4).

SINQ balances the weights alone; AWQ looks at the inputs. Here both act in turn. Sinkhorn on the raw weights
`[out, in]` gives mu `[in]`; the balanced W / mu is multiplied by AWQ's channel scale s and rounded to nearest;
t = mu / s is stored. s = mean|x|^ratio / mean|w|^(1 - ratio); the ratio out of 0, 1/20, .., 19/20 is the one with
the least mean |error| of the output X W^T on a sample of inputs X `[tokens, in]` (the paper's; "l2" squares it).

Follows the authors' code, in which s has a weights' part that the paper's Eq. 6 lacks (`weight_part=False` is Eq. 6,
whose first candidate is SINQ itself; docs/methods.md compares them). Every linear has a ratio of its own, also within
a group that reads the same tensor, and nothing is clipped. Not taken over: their five built-in calibration prompts
(all calibrated methods get the same tokens here), the kurtosis gate and fp16 arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qbench.errors import none_of
from qbench.format.format import Format
from qbench.format.weight import QuantizedWeight
from qbench.quant import gpu
from qbench.quant.channel_scale import T_RANGE, OutputError, calibration, calibrations, channel_scale, search
from qbench.quant.quantizer import InputStatistics, Quantizer, Statistic
from qbench.quant.rounding import round_to_nearest
from qbench.quant.sinkhorn import check_steps, column_factors

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
    weight_part: bool = True
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.INPUT_ABSMEAN, Statistic.INPUTS})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.iterations, self.step_min, self.step_max)
        if self.ratios < 1:
            raise ValueError(f"ratios must be at least 1, got {self.ratios}")
        if self.loss not in LOSSES:
            raise none_of("loss", self.loss, LOSSES)

    def quantize(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[QuantizedWeight]:
        """Quantizes the weights `[out, in]` of a linear group; ValueError without usable inputs."""
        absmean, inputs = calibration(weights, stats, "asinq")
        found = self._search_each(weights, absmean, OutputError(inputs, self.loss))
        return [replace(one, diagnostics={k: float(v) for k, v in one.diagnostics.items()}) for one in found]

    def quantize_stacks(
        self,
        names: Sequence[Sequence[str]],
        weights: Sequence[Tensor],
        stats: Sequence[InputStatistics] | None = None,
    ) -> list[Format]:
        """On a GPU the searches of all experts at once; on a CPU expert by expert."""
        if stats is None or not gpu.enabled(weights[0]):
            return super().quantize_stacks(names, weights, stats)
        absmean, inputs, tokens = calibrations(weights, stats, "asinq")
        return self._search_each(weights, absmean, OutputError(inputs, self.loss, tokens))

    def _search_each(
        self, weights: Sequence[Tensor], absmean: Tensor, output_error: OutputError
    ) -> list[QuantizedWeight]:
        """Of weights `[..., out, in]`, which share their inputs and nothing else."""
        factors = column_factors(weights, self.columns(weights[0]), self.iterations, self.step_min, self.step_max)
        return [
            self._search(weight.float(), mu, after, absmean, output_error)
            for weight, (mu, after) in zip(weights, factors, strict=True)
        ]

    def _search(
        self, weight: Tensor, mu: Tensor, after: Tensor, absmean: Tensor, output_error: OutputError
    ) -> QuantizedWeight:
        width = self.columns(weight)
        magnitude = weight.abs().mean(-2) if self.weight_part else torch.ones_like(mu)
        rounding = {
            "nbits": self.nbits,
            "group_size": width,
            "symmetric": self.symmetric,
            "aux_dtype": self.aux_dtype,
        }

        def scales(ratio: float | Tensor) -> Tensor:
            return (mu / channel_scale(absmean, magnitude, ratio)).clamp(*T_RANGE)

        loss, ratio, t = search([weight], scales, self.ratios, output_error, rounding)
        diagnostics = {"ratio": ratio, "loss": loss, "imbalance_after": after}
        return round_to_nearest(weight, input_scale=t, method="asinq", diagnostics=diagnostics, **rounding)
