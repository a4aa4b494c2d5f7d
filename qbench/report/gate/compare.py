"""Compares what was measured with the gate file, check by check, and says what got worse and by how much.

A quality regresses when the paired 95 % interval of its difference lies beyond the allowance: a drop inside the noise
is no regression, and a real but tiny one is none either. Everything that is counted must be equal: bytes, bits per
weight, the method in effect on every layer. What is deterministic up to rounding has a small relative limit: every
layer's weight error, every balanced layer's imbalance. One layer gone wrong moves a perplexity by less than the noise,
but not its own error. What got better by as much is a note: `--update` writes it to the gate file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qbench.record import titles
from qbench.record.result import Result
from qbench.report.entries import Entry, Recorded, Score, latest
from qbench.report.gate.file import GateFile, GateLayer, GatePoint, Limits, Measured, label
from qbench.report.noise import difference

Verdict = Literal["pass", "note", "regressed", "failed", "missing"]
ALIKE = 2  # settings in which a point may differ from a missing one and still be worth naming


@dataclass(frozen=True)
class Finding:
    """The outcome of one check of one point; the message says what is there and what should be."""

    point: str
    check: str
    verdict: Verdict
    message: str


def compare(gate_file: GateFile, recorded: Recorded) -> list[Finding]:
    """Every check of every point of the gate file, and a note for each point that the gate file does not know."""
    findings: list[Finding] = []
    known = {point.identity.key for point in gate_file.points}
    strangers = [entry for entry in recorded.entries if entry.key not in known]
    for point in gate_file.points:
        entry, failed = _find(point, recorded)
        if entry is not None:
            outcomes = list(_outcomes(point, entry, gate_file.limits))
        elif failed is not None:
            outcomes = [("point", "failed", f"it failed: {failed.error}")]
        else:
            outcomes = [("point", "missing", _why_missing(point, strangers))]
        findings += [Finding(point.label, check, verdict, message) for check, verdict, message in outcomes]
    for entry in latest(strangers):
        findings.append(
            Finding(label(entry.result.command), "point", "note", "not in the gate file; --update would add it")
        )
    return findings


Outcome = tuple[str, Verdict, str]


def _find(point: GatePoint, recorded: Recorded) -> tuple[Entry | None, Result | None]:
    """The latest record of the point: the entry, or the failure that is later than any."""
    key = point.identity.key
    fitting = [entry for entry in recorded.entries if entry.key == key]
    failures = [result for result in recorded.failed if result.identity.key == key]
    entry, failed = (fitting or [None])[-1], (failures or [None])[-1]
    if entry is not None and failed is not None and failed.created_utc > entry.result.created_utc:
        return None, failed
    return entry, None if entry is not None else failed


def _why_missing(point: GatePoint, strangers: Sequence[Entry]) -> str:
    """What was measured of the same method that is in no point's place, if one or two things alone are different."""
    wanted = point.identity.flat()
    nearest: dict[str, Any] | None = None
    for entry in strangers:
        if entry.quantizer != wanted["quantizer.name"]:
            continue
        found = entry.identity.flat()
        differ = {key: found.get(key) for key in wanted | found if found.get(key) != wanted.get(key)}
        if len(differ) <= ALIKE and (nearest is None or len(differ) < len(nearest)):
            nearest = differ
    if nearest is None:
        return "it was not measured"
    told = ", ".join(f"{k}={_set(k, v)} instead of {_set(k, wanted.get(k))}" for k, v in sorted(nearest.items()))
    return f"it was not measured, but another point was: {told}"


def _set(key: str, value: Any) -> str:
    """A setting as it is told; hashes by their start."""
    return "null" if value is None else str(value)[: titles.SHORT] if key.endswith("sha256") else str(value)


def _outcomes(point: GatePoint, entry: Entry, limits: Limits) -> Iterator[Outcome]:
    now = GatePoint.of(entry)
    for score in point.scores:
        yield _quality(score, now.scores, limits, entry.scores)
    yield _methods(point, now)
    yield _bytes(point, now)
    yield _equal("bits per weight", point.bits_per_weight, now.bits_per_weight)
    verdict: Verdict = (
        "pass" if now.coverage == point.coverage else "note" if now.coverage > point.coverage else "regressed"
    )
    yield "coverage", verdict, f"{point.coverage:.4%} to {now.coverage:.4%}"
    yield _grown("weight error", point, now, limits.weight_error, lambda layer: layer.relative_error)
    if any(layer.imbalance is not None for layer in point.layers.values()):
        yield _grown("imbalance", point, now, limits.imbalance, lambda layer: layer.imbalance)
    for check, ratio, before, after in (
        ("seconds", limits.seconds_ratio, point.quant_seconds, now.quant_seconds),
        ("memory", limits.memory_ratio, point.peak_alloc_bytes, now.peak_alloc_bytes),
    ):
        if ratio is not None and before is not None:
            worse = after is None or after > ratio * before
            yield check, "regressed" if worse else "pass", f"{before} to {after}; the limit is {ratio} times"


def _quality(score: Measured, measured: Sequence[Measured], limits: Limits, recorded: Sequence[Score]) -> Outcome:
    """`measured` are those of the `recorded` scores that have their windows."""
    check = f"{score.metric}, {score.protocol}"
    now = next((m for m in measured if (m.protocol, m.metric) == (score.protocol, score.metric)), None)
    if now is None:
        value = next((s.value for s in recorded if (s.protocol, s.metric) == (score.protocol, score.metric)), None)
        if value is None:
            return check, "missing", "the point has no such score"
        if not np.isfinite(value):
            return check, "regressed", f"{score.value:.5g} to {value}"
        return check, "missing", "the file of its windows cannot be read, so nothing can be paired; measure it again"
    if now.text != score.text or len(now.windows) != len(score.windows):
        return check, "missing", "the text, its tokens or its windows changed, so nothing can be paired; see --update"
    change = difference(
        np.array(now.windows),
        np.array(score.windows),
        score.reading,
        None if score.weights is None else np.array(score.weights),
    )
    sign = -1 if score.higher_is_better else 1
    allowed = limits.quality * abs(score.value)
    told = f"{score.value:.5g} to {now.value:.5g}"
    if change.low is None or change.high is None:  # one window: all there is
        worst = best = sign * change.value
    else:
        told += f", {change.value:+.3g} (95 %: {change.low:+.3g} to {change.high:+.3g})"
        worst, best = sorted((sign * change.low, sign * change.high))
    told += f"; allowed {allowed:.3g}"
    if worst > allowed:
        return check, "regressed", told
    return check, "note" if best < -allowed else "pass", told


def _methods(point: GatePoint, now: GatePoint) -> Outcome:
    gone = point.layers.keys() - now.layers.keys()
    if gone:
        return (
            "method",
            "regressed",
            f"{len(gone)} of {len(point.layers)} layers are not quantized any more: {_some(gone)}",
        )
    other = [name for name, layer in point.layers.items() if now.layers[name].method != layer.method]
    if other:
        was, is_ = point.layers[other[0]].method, now.layers[other[0]].method
        return "method", "regressed", f"{len(other)} of {len(point.layers)} layers ran {is_}, not {was}: {_some(other)}"
    new = now.layers.keys() - point.layers.keys()
    if new:
        return "method", "note", f"{len(new)} layers are new: {_some(new)}"
    return (
        "method",
        "pass",
        ", ".join(sorted({layer.method for layer in point.layers.values()})) or "no layers recorded",
    )


def _bytes(point: GatePoint, now: GatePoint) -> Outcome:
    if (now.packed_bytes, now.model_bytes) == (point.packed_bytes, point.model_bytes):
        return "bytes", "pass", f"{point.packed_bytes} packed, {point.model_bytes} in all"
    told = f"packed {point.packed_bytes} to {now.packed_bytes} ({now.packed_bytes - point.packed_bytes:+d})"
    if now.packed_bytes == point.packed_bytes:
        told = f"in all {point.model_bytes} to {now.model_bytes} ({now.model_bytes - point.model_bytes:+d})"
    both = point.layers.keys() & now.layers.keys()
    other = sorted(name for name in both if now.layers[name].packed_bytes != point.layers[name].packed_bytes)
    if other:
        was, is_ = point.layers[other[0]].packed_bytes, now.layers[other[0]].packed_bytes
        told += f" in {len(other)} of {len(both)} layers, such as {other[0]}: {was} to {is_}"
    return "bytes", "regressed", told


def _equal(check: str, before: float, after: float) -> Outcome:
    return check, "pass" if before == after else "regressed", f"{before:.7g} to {after:.7g}"


def _grown(
    check: str, point: GatePoint, now: GatePoint, limit: float, read: Callable[[GateLayer], float | None]
) -> Outcome:
    """The layers whose number grew by more than the limit, or that have none any more."""
    grown: dict[str, float] = {}
    fallen, compared = 0, 0
    for name, layer in point.layers.items():
        before = read(layer)
        if before is None or name not in now.layers:
            continue
        compared += 1
        after = read(now.layers[name])
        if after is None or not np.isfinite(after):
            grown[name] = np.inf
        elif before == 0:
            grown |= {name: np.inf} if after > 0 else {}
        elif after / before - 1 > limit:
            grown[name] = after / before - 1
        else:
            fallen += after / before - 1 < -limit
    if grown:
        worst = max(grown, key=grown.__getitem__)
        before, after = read(point.layers[worst]), read(now.layers[worst])
        told = (
            f"{len(grown)} of {compared} layers, most of all {worst}: {before} to {'none' if after is None else after}"
        )
        return (
            check,
            "regressed",
            f"{told} ({grown[worst]:+.2%}, limit {limit:.2%})" if np.isfinite(grown[worst]) else told,
        )
    if fallen:
        return check, "note", f"{fallen} of {compared} layers got better by more than {limit:.2%}"
    return check, "pass", f"{compared} layers within {limit:.2%}"


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:2]) + (", ..." if len(ordered) > 2 else "")
