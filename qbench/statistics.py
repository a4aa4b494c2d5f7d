"""Uncertainty of a perplexity and of its difference to the baseline's, from per-window NLLs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000


@dataclass(frozen=True)
class Delta:
    """A difference of perplexities; the bounds are None when there is a single window."""

    value: float
    low: float | None
    high: float | None


def perplexity(window_nll: np.ndarray) -> float:
    """exp of the mean NLL; windows have equal lengths, so their means weigh alike."""
    return float(np.exp(np.mean(window_nll)))


def paired_delta(window_nll: np.ndarray, baseline_nll: np.ndarray, seed: int, level: float = 0.95) -> Delta:
    """perplexity(window_nll) - perplexity(baseline_nll), with a paired bootstrap interval over windows.

    Both models see the same windows, and most of what varies from window to window is the text, not the model: so
    windows are drawn in pairs, which makes the interval far tighter than two separate ones. The percentiles are
    widened for small samples as in Hesterberg (2015, "expanded percentile"): with few windows the plain
    percentile interval is too narrow. Raises ValueError for vectors of different lengths.
    """
    if window_nll.shape != baseline_nll.shape or window_nll.ndim != 1:
        raise ValueError(f"paired windows must match, got {window_nll.shape} and {baseline_nll.shape}")
    n = len(window_nll)
    value = perplexity(window_nll) - perplexity(baseline_nll)
    if n < 2:
        return Delta(value, None, None)
    drawn = np.random.default_rng(seed).integers(0, n, size=(RESAMPLES, n))
    deltas = np.exp(window_nll[drawn].mean(1)) - np.exp(baseline_nll[drawn].mean(1))
    tail = stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 - level) / 2, n - 1))
    low, high = np.quantile(deltas, [tail, 1 - tail])
    return Delta(value, float(low), float(high))
