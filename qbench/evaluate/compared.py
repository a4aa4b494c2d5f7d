"""What a model's scores on an lm-eval task say beside the original's: a record for every metric."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from qbench.evaluate import documents
from qbench.evaluate.documents import TaskScores
from qbench.evaluate.protocol import Scores
from qbench.intervals import Estimate, jackknife, p_value, paired_shares, share, smallest, verdict
from qbench.record.quality import MetricRecord
from qbench.significance import SharesTest, paired_shares_test

if TYPE_CHECKING:
    from qbench.evaluate.lmeval import LoadedTask


def kept_scores(task: LoadedTask, whose: str, scores: TaskScores) -> Scores:
    """What is kept beside the result: per document and task, and for a group what each document adds to its number."""
    kept = {}
    for name, leaf in scores.leaves.items():
        kept |= {f"{whose}/{name}/{metric}": v for metric, v in (leaf.contributions | leaf.documents).items()}
        if leaf.answers:
            kept[f"{whose}/{name}/answers"] = documents.as_bytes(leaf.answers)
    for metric in scores.numbers if task.group is not None else ():
        added = scores.adds(metric, task.name, task.by_size(metric))
        kept |= {} if added is None else {f"{whose}/{task.name}/{metric}": added}
    return kept


def compared(task: LoadedTask, scores: TaskScores, baseline: TaskScores | None) -> tuple[list[MetricRecord], list[str]]:
    """The metrics that are numbers, with their differences to the original's, and the names of the others."""
    found, undefined = [], []
    for metric, value in scores.numbers.items():
        name, better = metric.removesuffix(",none"), task.higher_is_better(metric)
        if not math.isfinite(value):
            undefined.append(name)
            continue
        record = MetricRecord(name=name, higher_is_better=better is not False, value=value)
        if baseline is not None and math.isfinite(baseline.numbers.get(metric, math.nan)):
            delta, flips, test = _compare(task, metric, scores, baseline)
            samples, alone = scores.samples.get(metric), baseline.flips_alone(metric)
            record = replace(
                record,
                baseline=baseline.numbers[metric],
                delta=delta.value,
                delta_low=delta.low,
                delta_high=delta.high,
                verdict=None if better is None else verdict(delta, better, test and test.p_value),
                p_value=test.p_value if test else p_value(delta),
                detectable=test.detectable if test else smallest(delta),
                flip_rate=flips and flips.value,
                flip_rate_low=flips and flips.low,
                flip_rate_high=flips and flips.high,
                turned_right=test and test.gained,
                turned_wrong=test and test.lost,
                flip_rate_alone=alone,
                samples=None if samples is None else samples.tolist(),
            )
        found.append(record)
    return found, undefined


def _compare(
    task: LoadedTask, metric: str, scores: TaskScores, baseline: TaskScores
) -> tuple[Estimate, Estimate | None, SharesTest | None]:
    """The difference with its interval where what documents add is known, the flip rate, and McNemar's test."""
    difference = scores.numbers[metric] - baseline.numbers[metric]
    right, baseline_right = scores.outcomes(metric), baseline.outcomes(metric)
    flips = None
    if right is not None and baseline_right is not None:
        flips = share(int((right != baseline_right).sum()), len(right))
        if task.group is None or task.by_size(metric):  # the share of all documents that are right
            test = paired_shares_test(right, baseline_right)
            return replace(paired_shares(right, baseline_right), value=difference), flips, test
    elif (sampled := documents.flips(scores, baseline, metric)) is not None:
        rate = jackknife(lambda mean: mean, sampled)
        low, high = (None, None) if rate.low is None else (max(0.0, rate.low), min(1.0, rate.high or 0.0))
        flips = replace(rate, low=low, high=high)
    ours, theirs = (s.adds(metric, task.name, task.by_size(metric)) for s in (scores, baseline))
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return Estimate(difference, None, None), flips, None
    return replace(jackknife(lambda mean: mean, ours - theirs), value=difference), flips, None
