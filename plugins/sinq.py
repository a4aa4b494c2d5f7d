"""SINQ: a second scale per input channel, found by Sinkhorn-style normalization (arXiv 2509.22944).

Outliers hurt a group-wise quantizer because one large column stretches the grid of every row it crosses.
SINQ divides them out first: within each tile of all rows x one group of columns it rescales rows and columns,
in the log domain, until their standard deviations are alike, then rounds to nearest. The column factors `t` are
stored per input channel. The row factors are not: min/max rounding per (row, group) is invariant to them
(RTN(W / t / r) * r * t = RTN(W / t) * t), so they only steer the fixed point that `t` reaches.

Follows the authors' released code, constants included: simultaneous (Jacobi) row and column updates, the
smallest standard deviation of the tile as target, damped steps, the best iterate kept, and a latch that freezes a
tile once its imbalance rises. Not taken over: the kurtosis gate that silently replaces the method by RTN
(added after the paper) and the cast of the weights to fp16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.quant.diagnostics import column_tiles, imbalance, std
from qbench.quant.quantizer import InputStatistics, Quantizer
from qbench.quant.rounding import round_to_nearest
from qbench.quant.weight import QuantizedWeight

STD_RANGE = (1e-3, 1e3)  # standard deviations are clipped to it: keeps constant rows and columns finite
LOG_RANGE = (-0.3, 10.0)  # of the log scales
TARGET_EPS = 1e-6
CHUNK_BYTES = 4 << 20  # tiles normalized together on a CPU: a chunk stays in cache for all its rounds


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
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if not 0 < self.step_min <= 1 <= self.step_max:
            raise ValueError(f"0 < step_min <= 1 <= step_max must hold, got {self.step_min} and {self.step_max}")

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
        scales, left = [], []
        for tiles in column_tiles(weight.float(), width):
            chunk = len(tiles) if tiles.is_cuda else max(1, CHUNK_BYTES // tiles[0].nbytes)
            for part in tiles.split(chunk):
                t, best = sinkhorn(part, self.iterations, self.step_min, self.step_max)
                scales.append(t.flatten())
                left.append(best)
        return torch.cat(scales), float(torch.cat(left).log().mean().exp())


def sinkhorn(tiles: Tensor, iterations: int, step_min: float, step_max: float) -> tuple[Tensor, Tensor]:
    """Balances fp32 tiles `[n, rows, columns]`; returns the column factors `[n, columns]` and I `[n]` reached.

    A round scores the current factors before it updates them, so the update of the last round is never used.
    """
    lo, hi = STD_RANGE
    n, rows, columns = tiles.shape

    def step(deviation: Tensor) -> Tensor:
        return (deviation.clamp(lo, hi) / target).clamp(step_min, step_max).log()

    row_min = std(tiles, 2).clamp(lo, hi).amin(1)
    target = torch.minimum(row_min, std(tiles, 1).clamp(lo, hi).amin(1))[:, None] + TARGET_EPS
    log_rows, log_columns = tiles.new_zeros(n, rows), tiles.new_zeros(n, columns)
    best, best_columns = imbalance(tiles), log_columns
    rising = torch.zeros(n, dtype=torch.bool, device=tiles.device)
    for _ in range(iterations):
        balanced = tiles / log_columns.exp()[:, None, :]
        balanced /= log_rows.exp()[:, :, None]
        row_std, column_std = std(balanced, 2), std(balanced, 1)
        high = torch.maximum(row_std.amax(1), column_std.amax(1))
        low = torch.minimum(row_std.amin(1), column_std.amin(1))
        score = high / low.clamp_min(1e-12)
        better = score <= best
        best = torch.where(better, score, best)
        best_columns = torch.where(better[:, None], log_columns, best_columns)
        rising |= score > best
        if bool(rising.all()):
            break
        moving = (~rising)[:, None]
        log_columns = (log_columns + moving * step(column_std)).clamp(*LOG_RANGE)
        log_rows = (log_rows + moving * step(row_std)).clamp(*LOG_RANGE)
    return best_columns.exp(), best
