"""How surely two models differ, how many such claims a board may make, and how small a difference could be seen.

Pure functions of numbers. The tests fit the data: exact McNemar where documents are right or wrong, Student's t of the
paired interval (intervals.py) everywhere else. Within a board, whose rows are all compared with each other, p-values
are corrected by Holm's (1979) step-down method: the chance that a board of equal models tells any two of them apart is
then at most the level, whatever the models have in common.

`detectable` turns a test round. "Not distinguishable" alone says nothing, since any two models are with few enough
windows; beside it stands the smallest true difference that the same test would have found in 80 % of all cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

LEVEL, POWER = 0.05, 0.8
FEWEST = 6  # documents that change: with five, all in one direction, exact McNemar gives 0.0625


def mcnemar(gained: Any, lost: Any) -> Any:
    """Two-sided exact p-value (McNemar 1947, by the binomial) of documents that turned right and that turned wrong.

    Counts or arrays of counts of one shape. 1 where nothing changed.
    """
    fewer, changed = np.minimum(gained, lost), np.add(gained, lost)
    p = np.minimum(1.0, 2 * _special().bdtr(fewer, np.maximum(changed, 1), 0.5))
    return np.where(changed == 0, 1.0, p)[()]


def student(value: Any, error: Any, dof: Any) -> Any:
    """Two-sided p-value of a difference with its standard error, by Student's t; arrays of one shape, or numbers.

    Without an error, a difference of nothing has 1 and any other 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(np.divide(value, error))
    p = 2 * _special().stdtr(dof, -np.where(np.isnan(t), 0.0, t))
    return np.where(np.equal(value, 0), 1.0, p)[()]


def quantile(dof: Any, level: float = 0.95) -> Any:
    """Half the width of an interval of Student's t, in standard errors."""
    return _special().stdtrit(dof, (1 + level) / 2)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjusted p-values of a family `[tests]`: one that is below the level holds at that level for all together.

    Holm (1979), "A simple sequentially rejective multiple test procedure". NaN is no test, and stays NaN.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)  # NaN comes last
    tests = int(np.isfinite(p).sum())
    steps = np.maximum.accumulate(p[order[:tests]] * np.arange(tests, 0, -1))
    adjusted = np.full(p.shape, np.nan)
    adjusted[order[:tests]] = np.minimum(1.0, steps)
    return adjusted


def power_of_t(effect: Any, dof: float, level: float = LEVEL) -> Any:
    """The chance that a two-sided t test finds a true difference of `effect` standard errors."""
    special = _special()
    edge = special.stdtrit(dof, 1 - level / 2)
    wrong_side = special.nctdtr(dof, effect, -edge)  # NaN where it is too small for scipy
    return 1 - special.nctdtr(dof, effect, edge) + np.nan_to_num(wrong_side)


def detectable(error: float, dof: float, level: float = LEVEL, power: float = POWER) -> float:
    """The smallest true difference that a t test finds with this power, given the standard error of the difference.

    The error is an estimate, and may be too small by chance. So the power is the mean over all that it may have been:
    with 166 windows that makes no difference (0.5 %), with 4 it asks for a third more.
    """
    return error * _errors_to_find(dof, level, power)


@cache
def _errors_to_find(dof: float, level: float, power: float) -> float:
    nodes, weights = _nodes()
    ratio = np.sqrt(_special().chdtri(dof, 1 - nodes) / dof)  # estimated over true, at quantiles of its distribution
    return _root(lambda effect: float(weights @ power_of_t(effect * ratio, dof, level)) - power, 0.0, 4.0)


@cache
def _nodes() -> tuple[np.ndarray, np.ndarray]:
    """To integrate over (0, 1): Gauss and Legendre's 64 points, denser at both ends by x = sin(pi t / 2) ** 2."""
    t, weights = np.polynomial.legendre.leggauss(64)
    angle = 0.25 * np.pi * (t + 1)
    return np.sin(angle) ** 2, 0.25 * np.pi * np.sin(2 * angle) * weights


def power_of_mcnemar(difference: float, changed: float, documents: int, level: float = LEVEL) -> float:
    """The chance that exact McNemar finds a true difference of two accuracies.

    `changed` is the share of the documents that turn right or wrong; how many do is binomial, and so is how many of
    these are gains. `difference` is at most `changed`.
    """
    special = _special()
    center, spread = documents * changed, math.sqrt(documents * changed * (1 - changed))
    first, last = max(0, int(center - 9 * spread - 9)), min(documents, int(center + 9 * spread + 9))
    counts = np.arange(first, last + 1)
    edges = _last_rejected(counts, level)
    share = 0.5 * (1 + difference / changed)  # of the changes, those in the direction of the difference
    found = special.bdtr(edges, np.maximum(counts, 1), share) + special.bdtr(edges, np.maximum(counts, 1), 1 - share)
    logs = special.gammaln(documents + 1) - special.gammaln(counts + 1) - special.gammaln(documents - counts + 1)
    chances = np.exp(logs + special.xlogy(counts, changed) + special.xlog1py(documents - counts, -changed))
    return float((chances * np.where(edges < 0, 0.0, found)).sum())


@cache
def detectable_share(changed: float, documents: int, level: float = LEVEL, power: float = POWER) -> float | None:
    """The smallest true difference of two accuracies that exact McNemar finds with this power, of 1.

    `changed` is the share of documents that changed. Where so few change that even all in one direction would not be
    enough, as many as would be. None for so few documents that no difference is found.
    """
    changed = min(max(changed, 0.0), 1.0)
    if changed > 0 and power_of_mcnemar(changed, changed, documents, level) >= power:
        return _root(lambda d: power_of_mcnemar(d, changed, documents, level) - power, 0.0, changed, changed)
    if power_of_mcnemar(1.0, 1.0, documents, level) < power:
        return None
    return _root(lambda d: power_of_mcnemar(d, d, documents, level) - power, max(changed, 1e-12), 1.0, 1.0)


@dataclass(frozen=True)
class SharesTest:
    """Of two models' answers to the same documents, right or wrong."""

    p_value: float  # exact McNemar
    detectable: float | None
    gained: int  # documents that turned right
    lost: int


def paired_shares_test(correct: np.ndarray, baseline_correct: np.ndarray) -> SharesTest:
    """Both 0 or 1, `[documents]`."""
    gained, lost = (int(((correct == a) & (baseline_correct == 1 - a)).sum()) for a in (1, 0))
    smallest = detectable_share((gained + lost) / len(correct), len(correct))
    return SharesTest(float(mcnemar(gained, lost)), smallest, gained, lost)


def more_needed(difference: float, smallest: float, count: int) -> int | None:
    """How many windows or documents more would show this difference, whose `count` show one of `smallest`.

    A standard error falls with the root of the count. None where there is no difference to be shown.
    """
    if not difference or not math.isfinite(smallest / difference):
        return None
    return max(1, math.ceil(count * (smallest / difference) ** 2) - count)


def _last_rejected(changed: np.ndarray, level: float) -> np.ndarray:
    """Of so many changes, the largest count of the rarer direction that exact McNemar still finds; -1 for none."""
    special = _special()
    at = np.nan_to_num(np.floor(special.bdtrik(np.full(changed.shape, level / 2), np.maximum(changed, 1), 0.5)))
    found = np.full(changed.shape, -1.0)
    for step in (-1, 0, 1):  # the inverse is of a continuous extension, and may be one off
        tried = np.clip(at + step, 0, None)
        rejected = 2 * special.bdtr(tried, np.maximum(changed, 1), 0.5) < level
        found = np.where(rejected, np.maximum(tried, found), found)
    return np.where(changed == 0, -1, found)


def _root(of: Callable[[float], float], low: float, high: float, most: float = math.inf) -> float:
    """Where an increasing function crosses zero, to ten digits; `high` is doubled up to it first.

    By the Illinois method (Dowell and Jarratt 1971): false position that halves the value at an end that stays.
    """
    at_low, at_high = of(low), of(high)
    while at_high < 0 and high < most:
        low, at_low, high = high, at_high, 2 * high
        at_high = of(high)
    if at_low >= 0 or at_high <= 0:
        return low if at_low >= 0 else high
    kept = 0  # which end stayed last time
    while high - low > 1e-10 * high:
        new = (low * at_high - high * at_low) / (at_high - at_low)
        value = of(new)
        if abs(value) < 1e-12:
            return new
        if value < 0:
            low, at_low, at_high = new, value, at_high / 2 if kept == 1 else at_high
            kept = 1
        else:
            high, at_high, at_low = new, value, at_low / 2 if kept == -1 else at_low
            kept = -1
    return 0.5 * (low + high)


def _special() -> Any:
    """Not imported until a test is asked for, and never scipy.stats, which takes as long as a leaderboard."""
    from scipy import special

    return special
