"""One measurement (an identity, under one of its protocols) over qbench versions and dates, change points named.

A change point is a record whose value really differs from the one before it. For perplexity: the paired 95 % interval
of the difference excludes zero, and the difference is at least 0.01 %: another CPU or thread count sums in another
order, which can shift every window the same way by a millionth. For bytes, bits per weight and coverage: any
difference. For seconds and memory no change is named: one measurement says nothing about their noise.
"""

from __future__ import annotations

import numpy as np

from qbench.intervals import Estimate
from qbench.record import titles
from qbench.report import naming
from qbench.report.board import Row
from qbench.report.columns import order
from qbench.report.entries import Entry, Score
from qbench.report.noise import difference, is_real
from qbench.report.table import Table

LEAST = 1e-4  # of the earlier value
EXACT = ("bits_per_weight", "model_bytes", "coverage", "weight_error")


def tables(entries: list[Entry], metric: str) -> list[Table]:
    """One table per identity, protocol and quality, oldest record first; `metric` as in `columns.SORTABLE`."""
    lines: dict[tuple[str, ...], list[tuple[Entry, Score]]] = {}
    for entry in entries:
        for score in entry.scores:
            lines.setdefault((entry.key, score.protocol, score.metric, score.text), []).append((entry, score))
    ordered = [line[1] for line in sorted(lines.items(), key=lambda line: (_title(*line[1][-1]), line[0]))]
    facts = []
    for records in ordered:
        entry, score = records[-1]
        facts.append(naming.described(entry.result) | {"scored": score.text[: titles.SHORT]})
    told = titles.tell_apart([_title(*records[-1]) for records in ordered], facts)
    return [_table(records, metric, title) for records, title in zip(ordered, told, strict=True)]


def _title(entry: Entry, score: Score) -> str:
    bits = entry.identity.quantizer.get("nbits")
    return f"{entry.model}, {entry.quantizer}{'' if bits is None else f' {bits} bits'}, {score.protocol}"


def _table(records: list[tuple[Entry, Score]], metric: str, title: str) -> Table:
    own = {"quality": lambda row: row.score.value, "delta": lambda row: row.score.number.delta}
    read = own.get(metric) or order(metric)[0]
    entry, score = records[0]
    name = score.metric if metric == "quality" else f"{score.metric}_delta" if metric == "delta" else metric
    keys = ["qbench_version", "created_utc", "run_id", name, "change", "low", "high", "change_point"]
    values = []
    for number, record in enumerate(records):
        now = read(Row(*record, None, False, "", {}))
        change, named = Estimate(np.nan, None, None), ""
        if number:
            before = records[number - 1]
            earlier = read(Row(*before, None, False, "", {}))
            if now is not None and earlier is not None:
                change = _change(metric, record, before, now, earlier)
                if _is_change(metric, change, earlier):
                    named = _name(before[0], record[0], change.value)
        shown = None if np.isnan(change.value) else change.value
        result = record[0].result
        values.append(
            [result.qbench_version, result.created_utc, result.run_id, now, shown, change.low, change.high, named]
        )
    points = [row[-1] for row in values if row[-1]]
    options = " ".join(f"{k}={v}" for k, v in naming.described(entry.result).items() if v is not None)
    return Table(
        title=title,
        facts={"model": entry.model, "protocol": score.protocol, "configuration": options},
        notes=[f"{len(points)} change point{'' if len(points) == 1 else 's'} in {len(records)} records."],
        keys=keys,
        values=values,
        titles=["qbench", "measured, UTC", "run", name, "change", "95 %", "change point"],
        numeric=[False, False, False, True, True, False, False],
        cells=[_cells(row) for row in values],
    )


def _change(
    metric: str, record: tuple[Entry, Score], before: tuple[Entry, Score], now: float, earlier: float
) -> Estimate:
    new, old = record[1].windows, before[1].windows
    if metric in ("quality", "delta") and new is not None and old is not None and new.shape == old.shape:
        draws = [record[1].draws, before[1].draws]
        return difference(new, old, record[1].number.reading, record[1].weights, draws)
    return Estimate(now - earlier, None, None)


def _is_change(metric: str, change: Estimate, earlier: float) -> bool:
    if metric in EXACT:
        return abs(change.value) > (LEAST * abs(earlier) if metric == "weight_error" else 0)
    return is_real(change) and abs(change.value) >= LEAST * abs(earlier)


def _name(before: Entry, after: Entry, change: float) -> str:
    old, new = before.result.qbench_version, after.result.qbench_version
    cause = f"qbench {old} to {new}" if old != new else "the same qbench"
    packages = [
        f"{name} {was} to {now}" for name, was, now in _differing(before.result.environment, after.result.environment)
    ]
    return f"{'up' if change > 0 else 'down'}: {', '.join([cause, *packages])}"


def _differing(before: dict, after: dict) -> list[tuple[str, object, object]]:
    """What else changed between two records: hardware and package versions."""
    found = []
    for name in ("cpu", "gpu"):
        if before.get(name) != after.get(name):
            found.append((name, before.get(name), after.get(name)))
    old, new = before.get("packages"), after.get("packages")
    if isinstance(old, dict) and isinstance(new, dict):
        found += [
            (name, old.get(name), new.get(name)) for name in sorted({*old, *new}) if old.get(name) != new.get(name)
        ]
    return found


def _cells(row: list) -> list[str]:
    version, created, run, now, change, low, high, named = row
    number = "" if now is None else f"{now:.4f}" if isinstance(now, float) else str(now)
    interval = "" if low is None else f"{low:+.4f} to {high:+.4f}"
    return [version, created, run, number, "" if change is None else f"{change:+.4f}", interval, named]
