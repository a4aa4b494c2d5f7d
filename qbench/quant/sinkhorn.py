"""Sinkhorn-style balancing of a weight's rows and columns: what SINQ and A-SINQ share (arXiv 2509.22944, Alg. 1).

Follows the authors' released code, constants included: simultaneous (Jacobi) row and column updates, the
smallest standard deviation of the tile as target, damped steps, the best iterate kept, and a latch that freezes a
tile once its imbalance rises.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qbench.quant import gpu
from qbench.quant.diagnostics import chunks, column_tiles, spread, std

STD_RANGE = (1e-3, 1e3)  # standard deviations are clipped to it: keeps constant rows and columns finite
LOG_RANGE = (-0.3, 10.0)  # of the log scales
TARGET_EPS = 1e-6


def check_steps(iterations: int, step_min: float, step_max: float) -> None:
    """Raises ValueError for settings with which the iteration cannot run."""
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if not 0 < step_min <= 1 <= step_max:
        raise ValueError(f"0 < step_min <= 1 <= step_max must hold, got {step_min} and {step_max}")


def column_factors(
    weights: Sequence[Tensor], width: int, iterations: int, step_min: float, step_max: float
) -> list[tuple[Tensor, Tensor]]:
    """For each weight `[..., out, in]` of a group: column factors, fp32 `[..., in]`, of tiles of all rows x `width`.

    Second, the geometric mean over its tiles of the imbalance that is left, `[...]`.
    """
    settings = (width, iterations, step_min, step_max)
    alike = len({weight.dtype for weight in weights}) == 1
    if not (alike and width <= gpu.WIDEST_TILE and all(gpu.fused(weight, width) for weight in weights)):
        return [_column_factors(weight, *settings) for weight in weights]
    from qbench.kernels import sinkhorn as kernels

    found = kernels.column_factors(weights, *settings, LOG_RANGE)
    if torch.cat([left.view(-1) for _, left in found]).isnan().any():  # its variances need two passes
        for weight, (t, left) in zip(weights, found, strict=True):
            for at in left.isnan().nonzero():
                place = tuple(at.tolist())
                t[place], left[place] = _column_factors(weight[place], *settings)
    return found


def _column_factors(
    weight: Tensor, width: int, iterations: int, step_min: float, step_max: float
) -> tuple[Tensor, Tensor]:
    if weight.ndim == 3:
        t, after = zip(*(_column_factors(one, width, iterations, step_min, step_max) for one in weight), strict=True)
        return torch.stack(t), torch.stack(after)
    scales, left = [], []
    for tiles in column_tiles(weight.float(), width):
        for part in chunks(tiles):  # which stays in cache for all its rounds
            t, best = sinkhorn(part, iterations, step_min, step_max)
            scales.append(t.flatten())
            left.append(best)
    return torch.cat(scales), torch.cat(left).log().mean().exp()


def sinkhorn(tiles: Tensor, iterations: int, step_min: float, step_max: float) -> tuple[Tensor, Tensor]:
    """Balances fp32 tiles `[n, rows, columns]`; returns the column factors `[n, columns]` and I `[n]` reached.

    A round scores the current factors before it updates them, so the update of the last round is never used.
    """
    lo, hi = STD_RANGE
    n, rows, columns = tiles.shape

    def step(deviation: Tensor) -> Tensor:
        return (deviation.clamp(lo, hi) / target).clamp(step_min, step_max).log()

    row_std, column_std = std(tiles, 2), std(tiles, 1)
    target = torch.minimum(row_std.clamp(lo, hi).amin(1), column_std.clamp(lo, hi).amin(1))[:, None] + TARGET_EPS
    log_rows, log_columns = tiles.new_zeros(n, rows), tiles.new_zeros(n, columns)
    best, best_columns = spread(row_std, column_std), log_columns
    rising = torch.zeros(n, dtype=torch.bool, device=tiles.device)
    for done in range(iterations):
        if done:  # the first round scores the tiles as they are
            balanced = tiles / log_columns.exp()[:, None, :]
            balanced /= log_rows.exp()[:, :, None]
            row_std, column_std = std(balanced, 2), std(balanced, 1)
        score = spread(row_std, column_std)
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
