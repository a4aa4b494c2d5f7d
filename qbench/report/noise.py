"""Which of many models can be told apart, from their scores on the same windows or documents.

The intervals are those of `qbench.intervals.paired_delta`, the paired jackknife's. A thousand models need one
`[models, windows]` array of left-one-out values, and any two of them then compare in microseconds.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from qbench.intervals import Estimate
from qbench.record.quality import Reading, read_mean


def is_real(difference: Estimate) -> bool:
    """Whether the interval excludes zero; never without an interval, or with one that is no number."""
    return difference.low is not None and difference.high is not None and (difference.low > 0 or difference.high < 0)


class Paired:
    """Scores of several models on the same windows, ready to be compared two by two."""

    def __init__(
        self, scores: np.ndarray, reading: Reading, weights: np.ndarray | None = None, level: float = 0.95
    ) -> None:
        """`scores`: `[models, windows]`, of which each model's number is the mean, or exp of it, as `reading` says.

        `weights` `[windows]`: tokens of each window, where they differ.
        """
        n = scores.shape[1]
        weights = np.ones(n) if weights is None else weights
        totals = (scores * weights).sum(1, keepdims=True)
        self.values = read_mean(reading, totals[:, 0] / weights.sum())
        self.reach = None
        if n > 1:
            self.left_out = read_mean(reading, (totals - scores * weights) / (weights.sum() - weights))
            self.reach = float(special.stdtrit(n - 1, (1 + level) / 2)) * np.sqrt((n - 1) / n)

    def difference(self, first: int, second: int) -> Estimate:
        """Value of the first minus value of the second."""
        value = float(self.values[first] - self.values[second])
        if self.reach is None:
            return Estimate(value, None, None)
        left_out = self.left_out[first] - self.left_out[second]
        reach = float(self.reach * np.sqrt(np.square(left_out - left_out.mean()).sum()))
        return Estimate(value, value - reach, value + reach)


def difference(first: np.ndarray, second: np.ndarray, reading: Reading, weights: np.ndarray | None = None) -> Estimate:
    """The difference of two models from their scores on the same windows, each `[windows]`."""
    return Paired(np.stack([first, second]), reading, weights).difference(0, 1)
