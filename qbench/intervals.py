"""Uncertainty in one place: perplexities, divergences and accuracies, and what may be concluded from their differences.

Everything a protocol reports is a function of means over its windows (or documents): a perplexity is exp of a mean
NLL, a difference to the original is a function of two such means over the same windows, an RMS is the root of a mean.
`jackknife` gives all of them an interval: leave each window out once, take the spread of the results as the standard
error (Efron and Stein 1981), and scale it by Student's t with n - 1 degrees of freedom. Windows that both models see
are left out together, so that what varies with the text and not with the model cancels: that is the pairing.

By simulation (tests/test_intervals.py) these intervals hold the truth 93 to 97 % of the time from 4 windows on,
where a percentile bootstrap of the same data, even an expanded one, holds it only 75 to 93 % below 8 windows. And
they need no seed. Shares of documents have formulas of their own: Wilson, and Bonett and Price for paired ones.

**Draws.** A method that is shown calibration text, or starts from a seed, is one model of many that it could have
been. Measured N times, each time with another draw, what it scores on window w in draw d is taken as

    score[w, d] = mean + window[w] + draw[d] + rest[w, d],        all but the mean random,

the windows a sample of the text and the draws one of the calibration text (a two-way random effects model, Searle,
Casella and McCulloch 1992, chapter 4). The number is the mean over both. A difference of two models is paired over
windows, which both see, and not over draws: their draws count as independent. So its variance is the windows' own (the
jackknife of the means over draws, which holds rest / (windows x draws) already), and for each model what draws add:
the variance of its draws' numbers over N, less the part of it that is `rest`. Draws that add nothing still give a part
above zero half of the time; so it is counted where an F test at 25 % finds it, and else taken as none (Bancroft 1964),
which keeps a single test near its level with draws that matter and without. The degrees of freedom are Satterthwaite's
(1946). A board makes many tests, far out in the tails, where one part that was overlooked is enough to be wrong: there
the part always counts, as none where it is below zero, with the degrees of freedom that so few draws leave. With a
single draw nothing is known of draws, and the interval is of the windows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from qbench import significance

Verdict = Literal["better", "worse", "not distinguishable"]

POOL = 0.25  # the level of the test by which draws count: the usual one of tests that come before another


@dataclass(frozen=True)
class Estimate:
    """A number and its interval; the bounds are None when there is a single window."""

    value: float
    low: float | None
    high: float | None
    error: float | None = field(default=None, compare=False)  # standard error and its degrees of freedom,
    dof: float | None = field(default=None, compare=False)  # where the interval is Student's


@dataclass(frozen=True)
class Drawn:
    """What the draws of one model add to the variance of its number: `between` less `rest`."""

    draws: int
    between: float = 0.0  # variance of the draws' numbers over their count
    rest: float = 0.0  # of it, what is no property of a draw: window by window another
    rest_dof: int = 1
    always: bool = False  # they count without a test

    @staticmethod
    def of(adds: np.ndarray, always: bool = False) -> Drawn:
        """From what each window adds to the number in each draw, `[windows, draws]`; its mean is the number."""
        windows, draws = adds.shape
        if draws < 2:
            return Drawn(draws)
        numbers = adds.mean(0)
        between = float(numbers.var(ddof=1)) / draws
        if windows < 2:
            return Drawn(draws, between, always=always)
        rest = adds - adds.mean(1, keepdims=True) - numbers + numbers.mean()
        dof = (windows - 1) * (draws - 1)
        explained = float(np.square(rest).sum()) / dof / (windows * draws)
        return Drawn(draws, max(between, explained) if always else between, explained, dof, always)

    @property
    def adds(self) -> bool:
        """Whether they count: the draws' numbers differ by more than what varies from window to window explains."""
        if self.draws < 2 or self.always:
            return self.draws > 1
        if self.between <= self.rest:
            return False
        return not self.rest or bool(_special().fdtrc(self.draws - 1, self.rest_dof, self.between / self.rest) < POOL)


def perplexity(nll: np.ndarray, weights: np.ndarray | None = None) -> float:
    """exp of the mean NLL per window `[windows]`, weighted by the tokens (words, bytes) of each if they differ."""
    return float(np.exp(np.average(nll, weights=weights)))


def paired_delta(
    nll: np.ndarray,
    baseline_nll: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    draws: np.ndarray | None = None,
    level: float = 0.95,
) -> Estimate:
    """perplexity(nll) - perplexity(baseline_nll), with its paired interval; mean NLLs per window, `[windows]`.

    `draws` `[windows, draws]` are the NLLs that `nll` is the mean of, where it is one: the interval then holds both.
    Raises ValueError for vectors of different lengths.
    """
    if nll.shape != baseline_nll.shape or nll.ndim != 1:
        raise ValueError(f"paired windows must match, got {nll.shape} and {baseline_nll.shape}")
    weights = np.ones_like(nll) if weights is None else weights
    columns = (nll * weights, baseline_nll * weights, weights)
    estimate = jackknife(lambda q, b, w: np.exp(q / w) - np.exp(b / w), *columns, level=level)
    if draws is not None:
        estimate = with_draws(estimate, Drawn.of(exp_adds(draws, weights)), level=level)
    # to the last bit that of the two numbers that are shown
    return replace(estimate, value=perplexity(nll, weights) - perplexity(baseline_nll, weights))


def exp_adds(nll: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """What each window adds to exp of the mean NLL, to first order: `[windows, draws]` of NLLs in that shape."""
    share = np.ones(len(nll)) if weights is None else weights * len(nll) / weights.sum()
    mean = float(np.average(nll.mean(1), weights=share))
    return np.exp(mean) * (1 + share[:, None] * (nll - mean))


def with_draws(estimate: Estimate, *models: Drawn, level: float = 0.95) -> Estimate:
    """The estimate, whose error is the windows' own, with what the draws of its models add to it.

    A model of one draw adds nothing. An estimate without an interval keeps none.
    """
    adding = [model for model in models if model.adds]
    if estimate.error is None or estimate.dof is None or not adding:
        return estimate
    variance = estimate.error**2 + sum(model.between - model.rest for model in adding)
    spread = estimate.error**4 / estimate.dof
    spread += sum(m.between**2 / (m.draws - 1) + m.rest**2 / m.rest_dof for m in adding)
    error, dof = float(np.sqrt(variance)), float(variance**2 / spread)
    reach = float(_special().stdtrit(dof, (1 + level) / 2)) * error
    return Estimate(estimate.value, estimate.value - reach, estimate.value + reach, error, dof)


def jackknife(statistic: Callable[..., np.ndarray], *columns: np.ndarray, level: float = 0.95) -> Estimate:
    """`statistic` of the columns' means, each column `[windows]`, with an interval.

    `statistic` takes one mean per column, elementwise over arrays.
    """
    n = len(columns[0])
    value = float(statistic(*(column.mean() for column in columns)))
    if n < 2:
        return Estimate(value, None, None)
    left_out = statistic(*((column.sum() - column) / (n - 1) for column in columns))
    error = np.sqrt((n - 1) / n * np.square(left_out - left_out.mean()).sum())
    reach = float(_special().stdtrit(n - 1, (1 + level) / 2) * error)
    return Estimate(value, value - reach, value + reach, float(error), n - 1)


def positive_mean(
    values: np.ndarray, power: float = 1.0, level: float = 0.95, draws: np.ndarray | None = None
) -> Estimate:
    """mean(values) ** power for values that cannot be negative, `[windows]`: a divergence, or (power 1/2) an RMS.

    `draws` `[windows, draws]` are what `values` are the means of, where they are.
    The interval is made on the log scale, where such skewed quantities are closer to normal, and so never leaves the
    positive numbers. Where the mean is zero or below (rounding, for equal models) it is made on the plain scale.
    """
    n = len(values)
    if n < 2 or ((values.sum() - values) <= 0).any():
        return jackknife(lambda m: np.maximum(m, 0) ** power, values, level=level)
    log = jackknife(lambda m: power * np.log(m), values, level=level)
    if draws is not None:
        log = with_draws(log, Drawn.of(power * draws / values.mean()), level=level)
    return Estimate(float(np.exp(log.value)), float(np.exp(log.low)), float(np.exp(log.high)))


def share(successes: int, n: int, level: float = 0.95) -> Estimate:
    """successes / n with Wilson's score interval, for a flip rate or an accuracy."""
    z = float(_special().ndtri((1 + level) / 2))
    center = (successes + z**2 / 2) / (n + z**2)
    reach = z / (n + z**2) * np.sqrt(successes * (n - successes) / n + z**2 / 4)
    value = successes / n  # within the bounds, but for rounding at 0 and 1
    return Estimate(value, min(value, float(center - reach)), max(value, float(center + reach)))


def paired_shares(correct: np.ndarray, baseline_correct: np.ndarray, level: float = 0.95) -> Estimate:
    """Accuracy minus the original's on the same documents; both 0 or 1, `[documents]`.

    The interval of Bonett and Price (2012, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data"), good also when only a handful of documents changed.
    """
    n = len(correct)
    gained = int(((correct == 1) & (baseline_correct == 0)).sum())
    lost = int(((correct == 0) & (baseline_correct == 1)).sum())
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    reach = float(_special().ndtri((1 + level) / 2) * np.sqrt((up + down - (up - down) ** 2) / (n + 2)))
    return Estimate((gained - lost) / n, max(-1.0, up - down - reach), min(1.0, up - down + reach))


def contributions(value: float, left_out: np.ndarray) -> np.ndarray:
    """What each of n documents adds to a number: `[n]`, their mean is `value`, their spread its uncertainty.

    `left_out` `[n]` is the number without each document. These are Tukey's (1958) pseudo-values, moved so that their
    mean is `value`: their standard error is the jackknife's, and that of two models' differences is the paired
    jackknife's of the difference of the two numbers, whatever function of the documents the number is. For a mean
    they are the documents' own values. A document that has nothing beside it adds all.
    """
    n = len(left_out)
    return np.array([value]) if n < 2 else value + (n - 1) * (left_out.mean() - left_out)


def pooled_contributions(parts: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray | None:
    """The same for a weighted mean of several tasks' numbers, from the contributions to each, `[documents]` in all.

    Tasks that weigh as much as they have documents are one large task. Otherwise the tasks are strata: their sizes
    are fixed, and the variances of their numbers add up, each with its weight squared; the contributions are scaled
    so that the plain standard error of all of them is the root of that sum. None where a task of a single document
    has a weight of its own: its variance is not known.
    """
    sizes = np.array([len(part) for part in parts], float)
    n, share = sizes.sum(), np.asarray(weights, float) / np.sum(weights)
    if np.allclose(share, sizes / n, rtol=1e-12, atol=0):
        return np.concatenate(parts)
    if (sizes < 2).any():
        return None
    value = sum(w * part.mean() for w, part in zip(share, parts, strict=True))
    scales = n * share / sizes * np.sqrt(sizes / (sizes - 1) * (n - 1) / n)
    return np.concatenate([value + c * (part - part.mean()) for c, part in zip(scales, parts, strict=True)])


def p_value(delta: Estimate) -> float | None:
    """Of a difference whose interval is Student's: below 0.05 where the 95 % interval excludes zero."""
    return None if delta.error is None else float(significance.student(delta.value, delta.error, delta.dof))


def smallest(delta: Estimate) -> float | None:
    """The smallest true difference that would have been told, where the interval is Student's."""
    return None if delta.error is None or delta.dof is None else significance.detectable(delta.error, delta.dof)


def verdict(delta: Estimate, higher_is_better: bool, p: float | None = None) -> Verdict:
    """What a difference to the original says. Without an interval, or with zero inside of it: nothing.

    `p` decides in place of the interval where the test is one of its own (McNemar's).
    """
    if delta.low is None or delta.high is None:
        return "not distinguishable"
    if delta.low <= 0 <= delta.high if p is None else p >= significance.LEVEL:
        return "not distinguishable"
    return "better" if (delta.value > 0) == higher_is_better else "worse"


def _special() -> Any:
    """Not imported until an interval is asked for, and never scipy.stats, which takes as long as a leaderboard."""
    from scipy import special

    return special
