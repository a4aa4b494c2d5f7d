"""What each document adds to a metric of lm-eval, through the function by which lm-eval itself aggregates it.

Most metrics are means over documents, and a document adds its own value. Others are not: a perplexity is exp of minus
the mean log-likelihood, F1, Matthews' correlation and BLEU are of all documents at once. Their difference to the
baseline is that of the two numbers, and its interval the paired jackknife's: every document is left out once, in both
models, and the number aggregated again. What a document adds (`statistics.contributions`) is kept, so that a board or
a gate compares any two models later without knowing the function.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qbench import intervals as statistics

# a function that has no closed form below runs at most so often: documents are then left out in as many blocks
BLOCKS = 100
SECONDS = 60  # and not at all if that would take longer: some tasks' functions run a model over all answers


def own_values(aggregate: Callable[[Sequence[Any]], float], items: Sequence[Any]) -> np.ndarray | None:
    """The documents' values `[documents]` if they are numbers and the metric is their mean, else None.

    A task may bring a mean of its own: it is one if it is the mean of every set of documents with a block left out.
    """
    from lm_eval.api import metrics

    if not all(isinstance(item, (int, float, np.number, np.bool_)) for item in items):
        return None
    values = np.asarray(items, float)
    if not np.isfinite(values).all():
        return None
    if aggregate in (metrics.mean, metrics.nanmean):
        return values
    if aggregate in (metrics.perplexity, metrics.median, metrics.bypass_agg):
        return None
    numbers = _left_out(aggregate, items)
    means = _left_out(np.mean, values)
    return values if numbers is not None and means is not None and np.allclose(numbers, means, rtol=1e-9) else None


def contributions(aggregate: Callable[[Sequence[Any]], float], items: Sequence[Any], value: float) -> np.ndarray | None:
    """For a metric of the given value that is no mean: `[documents]`, or `[BLOCKS]` where those are more.

    None where no interval can be had: for a median, whose jackknife is not consistent (Efron 1982), or where the
    function fails on some of the documents or would take longer than SECONDS.
    """
    from lm_eval.api import metrics

    if aggregate is metrics.median:
        return None
    if len(items) < 2:
        return np.array([value])
    closed = {
        metrics.perplexity: lambda mean, _: np.exp(-mean),
        metrics.weighted_perplexity: lambda mean, weight: np.exp(-mean / weight),
        metrics.bits_per_byte: lambda mean, weight: -mean / weight / np.log(2),
    }.get(aggregate)
    if closed is not None:
        pairs = np.asarray(items, float).reshape(len(items), -1)
        without = (pairs.sum(0) - pairs) / (len(items) - 1)
        left_out = closed(without[:, 0], without[:, -1])
    else:
        left_out = _left_out(aggregate, items)
    if left_out is None or not np.isfinite(left_out).all():
        return None
    return statistics.contributions(value, left_out)


def _left_out(aggregate: Callable[[Sequence[Any]], float], items: Sequence[Any]) -> np.ndarray | None:
    """The aggregated number without each block of documents, every BLOCKS-th from another start on."""
    blocks = min(len(items), BLOCKS)
    if blocks < 2:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a metric that is not defined on some documents alone
            numbers: list[float] = []
            started = time.monotonic()
            for block in range(blocks):
                numbers.append(float(aggregate([x for i, x in enumerate(items) if i % blocks != block])))
                if block == 0 and blocks * (time.monotonic() - started) > SECONDS:
                    return None
            return np.array(numbers)
    except Exception:  # anything at all: it is lm-eval's, or a task's own
        return None
