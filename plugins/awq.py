"""AWQ: scales up the weights of channels with large inputs, so that they lose less (arXiv 2306.00978).

A weight's rounding error counts in proportion to its input. Before rounding, channel i is multiplied by s[i], and
t = 1/s restores it afterwards. s = mean|x|^ratio / mean|w|^(1 - ratio); the ratio out of 0, 1/20, .., 19/20 is the
one with the least squared error of the output X W^T on a sample of inputs X `[tokens, in]`. All linears of a
group `[out, in]` share s, since in the original it is folded into the layer that feeds them.

Follows AutoAWQ with its default `duo_scaling`: the weights' part of s, of |w| relative to the largest in its group,
is not in the paper, where s = mean|x|^ratio. Differences: the error is that of the linears' own outputs and not of
the attention or MLP block around them; and t is stored instead of folded, so every linear gets one (o and down too).

`clip` then narrows each (row, group): values beyond 1, 0.95, .., 0.55 of its largest magnitude are cut off,
whichever costs the least in that group's share of the output. The original spares q and k; here no layer is special.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.format.format import Format
from qbench.format.weight import QuantizedWeight
from qbench.quant import gpu
from qbench.quant.channel_scale import T_RANGE, OutputError, calibration, calibrations, channel_scale, search
from qbench.quant.diagnostics import column_tiles
from qbench.quant.quantizer import InputStatistics, Quantizer, Statistic
from qbench.quant.rounding import grid, round_to_nearest

SHRINKS = [1 - i / 20 for i in range(10)]  # AWQ's grid of 20 steps, followed to half the range


@dataclass(frozen=True)
class AWQ(Quantizer):
    nbits: int = 4
    group_size: int = 64
    symmetric: bool = False
    aux_dtype: str = "fp16"
    ratios: int = 20
    clip: bool = False
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.INPUT_ABSMEAN, Statistic.INPUTS})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratios < 1:
            raise ValueError(f"ratios must be at least 1, got {self.ratios}")

    def quantize(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[QuantizedWeight]:
        """Quantizes the weights `[out, in]` of a linear group; ValueError without usable inputs."""
        absmean, inputs = calibration(weights, stats, "awq")
        width = self.columns(weights[0])
        dense = [weight.float() for weight in weights]
        magnitude = relative_magnitude(torch.cat(dense), width)
        loss, ratio, t = self._search(dense, absmean, magnitude, OutputError(inputs))
        if self.clip:
            dense = [self._clipped(weight, width, t, inputs) for weight in dense]
        diagnostics = dict(zip(("ratio", "loss"), torch.stack([ratio, loss]).tolist(), strict=True))
        return [self._round(weight, width, t, diagnostics) for weight in dense]

    def quantize_stacks(
        self,
        names: Sequence[Sequence[str]],
        weights: Sequence[Tensor],
        stats: Sequence[InputStatistics] | None = None,
    ) -> list[Format]:
        """On a GPU the searches of all experts at once; with `clip`, and on a CPU, expert by expert."""
        if stats is None or self.clip or not gpu.enabled(weights[0]):
            return super().quantize_stacks(names, weights, stats)
        absmean, inputs, tokens = calibrations(weights, stats, "awq")
        width = self.columns(weights[0])
        dense = [weight.float() for weight in weights]
        magnitude = torch.stack([relative_magnitude(torch.cat(each), width) for each in zip(*dense, strict=True)])
        loss, ratio, t = self._search(dense, absmean, magnitude, OutputError(inputs, tokens=tokens))
        return [self._round(weight, width, t, {"ratio": ratio, "loss": loss}) for weight in dense]

    def _search(
        self, weights: Sequence[Tensor], absmean: Tensor, magnitude: Tensor, output_error: OutputError
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, ratio and t, of one linear group or of each of a batch."""

        def scales(ratio: float | Tensor) -> Tensor:
            return channel_scale(absmean, magnitude, ratio).reciprocal().clamp(*T_RANGE)

        if gpu.enabled(weights[0]) and self.aux_dtype == "fp16":  # rows then do not depend on each other
            weights = [torch.cat(weights, -2)]
        rounding = {"group_size": self.columns(weights[0]), "symmetric": self.symmetric, "aux_dtype": self.aux_dtype}
        return search(weights, scales, self.ratios, output_error, {"nbits": self.nbits, **rounding})

    def _round(
        self, weight: Tensor, width: int, t: Tensor, diagnostics: dict[str, Any] | None = None
    ) -> QuantizedWeight:
        return round_to_nearest(
            weight,
            nbits=self.nbits,
            group_size=width,
            symmetric=self.symmetric,
            aux_dtype=self.aux_dtype,
            input_scale=t,
            method="awq",
            diagnostics=diagnostics,
        )

    def _clipped(self, weight: Tensor, width: int, t: Tensor, inputs: Tensor) -> Tensor:
        """`[out, in]` with every (row, group) cut off, in units of W / t, where the output suffers least.

        Groups are judged one by one, hence on 16-bit grids: those in int8 depend on their neighbours.
        """
        columns = []
        # scaled inputs make the error of W / t count as that of W
        for values, x in zip(column_tiles(weight / t, width), column_tiles(inputs * t, width), strict=True):
            gram = x.mT @ x  # [tiles, width, width]
            largest = values.abs().amax(-1, keepdim=True)
            least, best = torch.full_like(largest, torch.inf), largest
            for shrink in SHRINKS:
                bound = largest * shrink
                error = self._rounded(values.clamp(-bound, bound)) - values
                loss = torch.linalg.vecdot(error @ gram, error).unsqueeze(-1)
                better = loss < least
                least, best = torch.where(better, loss, least), torch.where(better, bound, best)
            columns.extend(values.clamp(-best, best))  # [out, width] each
        return torch.cat(columns, 1) * t

    def _rounded(self, tiles: Tensor) -> Tensor:
        """Tiles `[tiles, out, width]` of one group a row, rounded and restored."""
        low, high = tiles.amin(-1, keepdim=True), tiles.amax(-1, keepdim=True)
        scale, zero, divisor = grid(low, high, self.nbits, self.symmetric, "fp16")
        middle = 2.0 ** (self.nbits - 1) if zero is None else zero.dense()
        codes = (tiles / divisor).add_(middle).round_().clamp_(0, 2**self.nbits - 1)
        return codes.sub_(middle).mul_(scale.dense())


def relative_magnitude(weight: Tensor, width: int) -> Tensor:
    """Mean over rows `[in]` of |w| relative to the largest of its (row, group), for `[out, in]`."""
    sizes = [tiles.abs() for tiles in column_tiles(weight, width)]
    return torch.cat([(size / (size.amax(-1, keepdim=True) + 1e-6)).mean(1).flatten() for size in sizes])
