"""Which of many models can be told apart, from their scores on the same windows or documents.

The intervals are those of `qbench.intervals.paired_delta`, the paired jackknife's with what draws add, and the tests
are of the same errors, but for answers that are right or wrong, which exact McNemar compares. A thousand models need
one `[models, windows]` array of left-one-out values, and any two of them then compare in microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qbench import significance
from qbench.intervals import Drawn, Estimate, exp_adds, with_draws
from qbench.record.quality import Reading, read_mean


def is_real(difference: Estimate) -> bool:
    """Whether the interval excludes zero; never without an interval, or with one that is no number."""
    return difference.low is not None and difference.high is not None and (difference.low > 0 or difference.high < 0)


class Paired:
    """Scores of several models on the same windows, ready to be compared two by two."""

    def __init__(
        self,
        scores: np.ndarray,
        reading: Reading,
        weights: np.ndarray | None = None,
        level: float = 0.95,
        draws: Sequence[np.ndarray | None] | None = None,
    ) -> None:
        """`scores`: `[models, windows]`, of which each model's number is the mean, or exp of it, as `reading` says.

        `weights` `[windows]`: tokens of each window, where they differ. `draws`: of each model the scores in each of
        its draws, `[windows, draws]`, whose mean `scores` holds; None for a model of a single one.
        """
        n = scores.shape[1]
        self.level, self.windows = level, n
        tables = [None] * len(scores) if draws is None else draws
        many = len(scores) > 2  # comparisons, of which none may be wrong (intervals.py)
        self.drawn = [Drawn(1) if t is None else Drawn.of(_adds(t, reading, weights), many) for t in tables]
        single = np.array([table is None for table in tables])
        self.binary = single & np.isin(scores, (0, 1)).all(1) & (reading == "mean") & (weights is None)
        self.scores = scores
        weights = np.ones(n) if weights is None else weights
        totals = (scores * weights).sum(1, keepdims=True)
        self.values = read_mean(reading, totals[:, 0] / weights.sum())
        self.left_out = None
        if n > 1:
            self.left_out = read_mean(reading, (totals - scores * weights) / (weights.sum() - weights))

    def difference(self, first: int, second: int) -> Estimate:
        """Value of the first minus value of the second."""
        return with_draws(self.of_windows(first, second), self.drawn[first], self.drawn[second], level=self.level)

    def of_windows(self, first: int, second: int) -> Estimate:
        """The same as if the draws were all that there could be: the interval is of the windows alone."""
        value = float(self.values[first] - self.values[second])
        if self.left_out is None:
            return Estimate(value, None, None)
        error = float(self._errors(self.left_out[first] - self.left_out[second]))
        reach = float(significance.quantile(self.windows - 1, self.level)) * error
        return Estimate(value, value - reach, value + reach, error, self.windows - 1)

    def _errors(self, left_out: np.ndarray) -> np.ndarray:
        """Standard errors of differences, from their values without each window, `[..., windows]`."""
        spread = np.square(left_out - left_out.mean(-1, keepdims=True)).sum(-1)
        return np.sqrt((self.windows - 1) / self.windows * spread)

    def p_values(self) -> np.ndarray:
        """Of every pair, two-sided, `[models, models]`; NaN of a model and itself, and with a single window."""
        count = len(self.values)
        p = np.full((count, count), np.nan)
        if self.left_out is None:
            return p
        between, rest = (np.array([getattr(d, k) if d.adds else 0.0 for d in self.drawn]) for k in ("between", "rest"))
        draws, rest_dof = (np.array([getattr(d, k) for d in self.drawn]) for k in ("draws", "rest_dof"))
        spreads = between**2 / np.maximum(draws - 1, 1) + rest**2 / rest_dof  # Satterthwaite's terms (intervals.py)
        for i in range(count - 1):
            others = slice(i + 1, count)
            errors = self._errors(self.left_out[others] - self.left_out[i])
            variance = errors**2 + (between - rest)[others] + (between - rest)[i]
            terms = errors**4 / (self.windows - 1) + spreads[others] + spreads[i]
            dof = np.divide(variance**2, terms, out=np.full(len(terms), float(self.windows - 1)), where=terms > 0)
            p[i, others] = significance.student(self.values[others] - self.values[i], np.sqrt(variance), dof)
        for i in np.flatnonzero(self.binary):
            others = np.flatnonzero(self.binary & (np.arange(count) > i))
            right, lost = self.scores[others], self.scores[i] == 1
            gained = ((right == 1) & ~lost).sum(1)
            p[i, others] = significance.mcnemar(gained, ((right == 0) & lost).sum(1))
        lower = np.tril_indices(count, -1)
        p[lower] = p.T[lower]
        return p

    def detectable(self, first: int, second: int, level: float = significance.LEVEL) -> float | None:
        """The smallest true difference of the two that the test finds 4 times in 5 at this level."""
        if self.binary[first] and self.binary[second]:
            changed = float((self.scores[first] != self.scores[second]).mean())
            return significance.detectable_share(changed, self.windows, level)
        found = self.difference(first, second)
        return (
            None if found.error is None or found.dof is None else significance.detectable(found.error, found.dof, level)
        )


@dataclass(frozen=True)
class Told:
    """What a board's tests say of its pairs, all together: `[models, models]` of adjusted p-values, NaN for none."""

    paired: Paired
    adjusted: np.ndarray
    floor: float  # a difference that is no larger is none

    @staticmethod
    def of(paired: Paired, floor: float | None = None) -> Told:
        """Corrected by Holm over all pairs: at the 5 % level, all that is told is told with 95 % confidence."""
        p = paired.p_values()
        upper = np.triu_indices(len(p), 1)
        adjusted = np.full(p.shape, np.nan)
        adjusted[upper] = significance.holm(p[upper])
        adjusted.T[upper] = adjusted[upper]
        return Told(paired, adjusted, floor or 0.0)

    @cached_property
    def comparisons(self) -> int:
        return int(np.isfinite(self.adjusted).sum()) // 2

    @property
    def level(self) -> float:
        """Of one comparison, such that all hold together: Holm's first step, which is the hardest."""
        return significance.LEVEL / max(1, self.comparisons)

    def apart(self, first: int, second: int) -> bool:
        difference = abs(self.paired.values[first] - self.paired.values[second])
        return bool(self.adjusted[first, second] < significance.LEVEL and difference > self.floor)

    def detectable(self, first: int, second: int) -> float | None:
        found = self.paired.detectable(first, second, self.level)
        return None if found is None else max(found, self.floor)


def _adds(table: np.ndarray, reading: Reading, weights: np.ndarray | None) -> np.ndarray:
    if reading == "exp mean":
        return exp_adds(table, weights)
    return table if weights is None else table * (weights * len(table) / weights.sum())[:, None]


def difference(
    first: np.ndarray,
    second: np.ndarray,
    reading: Reading,
    weights: np.ndarray | None = None,
    draws: Sequence[np.ndarray | None] | None = None,
) -> Estimate:
    """The difference of two models from their scores on the same windows, each `[windows]`."""
    return Paired(np.stack([first, second]), reading, weights, draws=draws).difference(0, 1)
