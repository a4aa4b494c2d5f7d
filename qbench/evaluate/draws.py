"""One point from its draws: what a protocol recorded of each variant, as the record of their mean.

A number is read off the mean over windows (documents) and draws; its interval holds both (intervals.py says how), its
difference is paired over windows. The file beside the result keeps, under its usual names, the mean over draws of what
each window adds, so that who knows nothing of draws reads the point's own number, and under `draws/NAME` what it adds
in each draw, `[windows, draws]`. Shares, percentiles and other plain numbers are the means of the draws' own; the
largest KL is the largest of all, the histogram counts the positions of all draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from qbench.evaluate.protocol import Scores
from qbench.evaluate.windowed import divergence_intervals, name_of
from qbench.intervals import (
    Drawn,
    Estimate,
    jackknife,
    p_value,
    paired_delta,
    perplexity,
    smallest,
    verdict,
    with_draws,
)
from qbench.record.quality import (
    DivergenceRecord,
    EvaluationRecord,
    MetricRecord,
    PartRecord,
    TaskRecord,
    histogram_edges,
    read_mean,
)

Records = tuple[list[EvaluationRecord], list[TaskRecord], dict[str, Scores]]


def merged(draws: Sequence[Records]) -> Records:
    """The record of a point from what its protocol recorded of each of its draws, in their order."""
    if len(draws) == 1:
        return draws[0]
    evaluations, tasks, files = [], [], {}
    for records in zip(*(draw[0] for draw in draws), strict=True):
        evaluation, kept = _evaluation(records, [d[2][r.window_nll_file] for d, r in zip(draws, records, strict=True)])
        evaluations.append(evaluation)
        files[evaluation.window_nll_file] = kept
    for records in zip(*(draw[1] for draw in draws), strict=True):
        task, kept = _task(records, [d[2][r.scores_file] for d, r in zip(draws, records, strict=True)])
        tasks.append(task)
        files[task.scores_file] = kept
    return evaluations, tasks, files


def _kept(files: Sequence[Scores], shared: Sequence[str]) -> tuple[Scores, Scores]:
    """What is to be kept, and its tables `[windows, draws]`; `shared` begins the names of what is not the variant's."""
    first = files[0]
    names = [name for name in first if not name.startswith(tuple(shared))]
    tables = {name: np.stack([file[name] for file in files], 1) for name in names}
    means = {name: table.mean(1, dtype=float) for name, table in tables.items()}
    kept = {name: means.get(name, values) for name, values in first.items()}
    return kept | {f"draws/{name}": table for name, table in tables.items()}, tables


def _evaluation(records: Sequence[EvaluationRecord], files: Sequence[Scores]) -> tuple[EvaluationRecord, Scores]:
    kept, tables = _kept(files, ("baseline", "tokens"))
    first, nll, weights = records[0], kept["quantized"], kept.get("tokens")
    delta = None
    if (baseline := kept.get("baseline")) is not None:
        delta = paired_delta(nll, baseline, weights=weights, draws=tables["quantized"])
    found = replace(
        first,
        ppl=perplexity(nll, weights),
        ppl_delta=delta and delta.value,
        ppl_delta_low=delta and delta.low,
        ppl_delta_high=delta and delta.high,
        verdict=delta and verdict(delta, higher_is_better=False),
        p_value=delta and p_value(delta),
        detectable=delta and smallest(delta),
        draws=[record.ppl for record in records],
        window_nll_file=name_of(kept),
        divergence=_divergence([record.divergence for record in records], kept, tables),
        metrics=[_metric(group, None, None) for group in _groups([record.metrics for record in records])],
    )
    return found, kept


def _task(records: Sequence[TaskRecord], files: Sequence[Scores]) -> tuple[TaskRecord, Scores]:
    kept, tables = _kept(files, ("baseline/",))
    task, metrics = records[0].task, []
    for group in _groups([record.metrics for record in records]):
        name = f"{task}/{group[0].name if ',' in group[0].name else f'{group[0].name},none'}"
        metrics.append(_metric(group, tables.get(f"quantized/{name}"), kept.get(f"baseline/{name}")))
    there = {metric.name for metric in metrics}
    undefined = {n for r in records for n in (*r.undefined_metrics, *(m.name for m in r.metrics))} - there
    truncated = max(record.truncated_prompts for record in records)
    found = replace(records[0], metrics=metrics, undefined_metrics=sorted(undefined), truncated_prompts=truncated)
    return replace(found, scores_file=name_of(kept)), kept


def _groups(metrics: Sequence[list[MetricRecord]]) -> list[list[MetricRecord]]:
    """Each metric that is a number in every draw, as it is in each."""
    by_name = [{metric.name: metric for metric in each} for each in metrics]
    return [[each[name] for each in by_name] for name in by_name[0] if all(name in each for each in by_name)]


def _metric(group: Sequence[MetricRecord], table: np.ndarray | None, baseline: np.ndarray | None) -> MetricRecord:
    """`table` `[documents, draws]` is what documents add to the number, `baseline` the same of the original."""
    first, numbers, base = group[0], [metric.value for metric in group], group[0].baseline
    inner = np.log(numbers) if first.reading == "exp mean" else np.asarray(numbers)
    value = float(read_mean(first.reading, inner.mean()))
    found = MetricRecord(
        name=first.name,
        higher_is_better=first.higher_is_better,
        value=value,
        baseline=base,
        delta=None if base is None else value - base,
        flip_rate=_mean(group),
        reading=first.reading,
        title=first.title,
        draws=numbers,
        kinds=_kinds(first, table),
        samples=first.samples and np.mean([m.samples for m in group], 0).tolist(),
        flip_rate_alone=first.flip_rate_alone,
    )
    if table is None or baseline is None or base is None or len(table) != len(baseline) or first.reading != "mean":
        return found
    delta = with_draws(jackknife(lambda mean: mean, table.mean(1) - baseline), Drawn.of(table))
    found = replace(
        found,
        delta_low=delta.low,
        delta_high=delta.high,
        verdict=None if first.verdict is None else verdict(delta, first.higher_is_better),
        p_value=p_value(delta),
        detectable=smallest(delta),
    )
    if found.flip_rate is None or found.samples is not None:  # of sampled answers the table holds means
        return found
    flips = np.abs(table - baseline[:, None])
    rate: Estimate = with_draws(jackknife(lambda mean: mean, flips.mean(1)), Drawn.of(flips))
    low, high = (None, None) if rate.low is None else (max(0.0, rate.low), min(1.0, rate.high))  # type: ignore[type-var]
    return replace(found, flip_rate_low=low, flip_rate_high=high)


def _kinds(first: MetricRecord, table: np.ndarray | None) -> dict[str, float] | None:
    if first.kinds is None or table is None:
        return None
    return dict(zip(first.kinds, read_mean(first.reading, table.mean(1)).tolist(), strict=True))


def _mean(group: Sequence[MetricRecord]) -> float | None:
    rates = [metric.flip_rate for metric in group if metric.flip_rate is not None]
    return float(np.mean(rates)) if len(rates) == len(group) else None


def _divergence(records: Sequence[DivergenceRecord | None], kept: Scores, tables: Scores) -> DivergenceRecord | None:
    known = [record for record in records if record is not None]
    if len(known) < len(records):
        return None
    first, found = known[0], {}
    for each in fields(DivergenceRecord):
        values = [getattr(record, each.name) for record in known]
        if isinstance(values[0], float):
            found[each.name] = float(np.mean(values))
    counts = np.sum([record.kl_histogram or [0] * (len(histogram_edges()) - 1) for record in known], 0)
    parts = {name: _parts([getattr(record, name) for record in known]) for name in ("by_confidence", "by_position")}
    found |= {"kl_max": max(record.kl_max for record in known), "kl_histogram": [int(count) for count in counts]}
    return replace(first, **found, **parts, **divergence_intervals(kept, tables))


def _parts(draws: Sequence[list[PartRecord]]) -> list[PartRecord]:
    """The positions of a part are the same in all draws: they go by the original's confidence, or by their place."""

    def mean(values: list[Any]) -> float | None:
        return None if None in values else float(np.mean(values))

    return [
        replace(same[0], kl=mean([p.kl for p in same]), top1_changed=mean([p.top1_changed for p in same]))
        for same in zip(*draws, strict=True)
    ]
