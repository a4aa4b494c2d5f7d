"""Orders entries without ranking inside the noise, and marks the best trade-offs.

A section holds measurements of one original (weights, code, precision, kind of device) under one protocol, scored on
the same tokens: only those numbers compare. Names do not make a section; two of one name are told apart by their
titles. Within a section
- a rank is shared by every row that cannot be told from the row that leads the rank: their difference is not
  significant in the paired test at the 5 % level, corrected by Holm over all pairs of the section, with windows and
  draws both random (noise.py); or it is no larger than the floor;
- the floor is what rounding noise does to the original (`quantizer=noise`), where it was measured: the bound of its
  interval that is further from zero. Its own row has no rank. A row whose KL is within SILENT times the floor's lies in
  the silent zone, where a KL says nothing of tasks (arXiv 2606.19558);
- the front is every row that no other beats: none is at least as good in quality and in bits per weight and better in
  one of them. A beaten row is marked NEAR_FRONT if its difference to the best row that is no larger is not
  significant.

A row whose number is none (NaN, infinite) or whose scores are lost has no rank, and changes no other row's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qbench.record import titles
from qbench.record.quality import MetricRecord
from qbench.report import naming, sentences
from qbench.report.entries import Entry, Score
from qbench.report.noise import Paired, Told

FRONT, NEAR_FRONT, BEATEN = "front", "noise", ""
FLOOR = "noise"  # the method whose row is the floor
SILENT = 10.0  # the paper gives no number: this is our choice


@dataclass(frozen=True)
class Row:
    entry: Entry
    score: Score
    rank: int | None  # 1 is best; None when there are no windows to compare
    tied: bool  # another row has the same rank
    front: str  # FRONT, NEAR_FRONT (inside the noise of a better row) or BEATEN
    options: dict[str, Any]  # the settings in which the section's rows differ, besides method, bits and group
    detectable: float | None = None  # the smallest difference to the row that leads the rank that would be told
    silent: bool = False  # so near the floor that its KL does not predict tasks
    draws: int = 1  # of calibration text or seed

    @property
    def floor(self) -> bool:
        return self.entry.quantizer == FLOOR

    @property
    def method(self) -> str:
        """As a sentence calls it: `sinq at 4 bits, group 64`."""
        if self.entry.quantizer == "none":
            return "the original"
        group = self.entry.identity.quantizer.get("group_size")
        options = "".join(f" {key}={value}" for key, value in self.options.items())
        return f"{self.entry.quantizer} at {self.entry.bits} bits{f', group {group}' if group else ''}{options}"


@dataclass(frozen=True)
class Section:
    model: str
    protocol: str
    number: MetricRecord  # one of its rows': all have its name, title and reading
    text: str
    weights: str  # fingerprint of the original
    dtype: str
    device: str
    baseline: float | None  # quality of the unquantized model
    note: str
    rows: list[Row]
    title: str = ""  # model and protocol, and what tells the section from others of these names
    floor: float | None = None  # the number's difference that rounding noise makes; None where it was not measured
    floor_kl: float | None = None
    sentences: tuple[str, ...] = ()  # what may be quoted

    @property
    def metric(self) -> str:
        return self.number.name


def sections(entries: Sequence[Entry], order: Callable[[Row], float | None], descending: bool = False) -> list[Section]:
    """Sections by original, protocol and text, rows sorted by `order`; rows without that number come last."""
    groups: dict[tuple[Any, ...], list[tuple[Entry, Score]]] = {}
    for entry in entries:
        for score in entry.scores:
            key = (score.protocol, score.metric, score.text, *entry.identity.original)
            groups.setdefault(key, []).append((entry, score))

    def place(row: Row) -> tuple[bool, float, bool, float]:
        value = order(row)
        if value is None or not np.isfinite(value):
            return (True, 0.0, *_last_if_none(row.score.loss))
        return (False, -value if descending else value, *_last_if_none(row.score.loss))

    found = []
    for key, pairs in groups.items():
        entry, score = pairs[-1]
        baselines = [score.number.baseline for _, score in pairs if score.number.baseline is not None]
        floor, floor_kl = _floors(pairs)
        rows, told = _rank(pairs, floor, floor_kl)
        section = Section(
            model=entry.model,
            protocol=score.protocol,
            number=score.number,
            text=score.text,
            weights=entry.identity.weights,
            dtype=entry.identity.dtype,
            device=entry.identity.device,
            baseline=baselines[-1] if baselines else None,
            note=entry.result.model.note if entry.result.model else "",
            rows=sorted(rows, key=place),
            floor=floor,
            floor_kl=floor_kl,
            sentences=tuple(sentences.of(rows, told, floor, floor_kl)),
        )
        found.append((section.model, key, section))
    return _titled([section for *_, section in sorted(found, key=lambda each: each[:2])])


def _titled(found: list[Section]) -> list[Section]:
    words = titles.short(section.weights for section in found)
    facts = [
        {
            "weights": words[section.weights],
            "model.trust_remote_code": section.rows[0].entry.identity.remote_code,
            "dtype": section.dtype,
            "device": section.device,
            "text": f"{_text_source(section)}@{section.text[: titles.SHORT]}",
        }
        for section in found
    ]
    told = titles.tell_apart([f"{section.model}, {section.protocol}" for section in found], facts)
    return [replace(section, title=title) for section, title in zip(found, told, strict=True)]


def _text_source(section: Section) -> str:
    return str(naming.described(section.rows[0].entry.result).get("task.text")).rpartition("@")[0]


def _last_if_none(value: float) -> tuple[bool, float]:
    """A key to sort by: a NaN compares with nothing, so as itself it would disorder the others too."""
    return (True, 0.0) if np.isnan(value) else (False, value)


def _floors(pairs: Sequence[tuple[Entry, Score]]) -> tuple[float | None, float | None]:
    """How far rounding noise moves the number, and its KL; of several rows, the furthest. None: not measured."""
    scores = [score for entry, score in pairs if entry.quantizer == FLOOR]
    numbers = [score.number for score in scores]
    bounds = [abs(x) for n in numbers for x in (n.delta, n.delta_low, n.delta_high) if x is not None]
    kls = [score.divergence.kl for score in scores if score.divergence is not None]
    return max(bounds, default=None), max((kl.value if kl.high is None else kl.high for kl in kls), default=None)


def _rank(
    pairs: list[tuple[Entry, Score]], floor: float | None, floor_kl: float | None
) -> tuple[list[Row], sentences.Ranked | None]:
    """The rows, best first, and what the tests said of those that have a rank."""
    pairs = sorted(pairs, key=lambda pair: _last_if_none(pair[1].loss))
    usable = [i for i, (entry, score) in enumerate(pairs) if _has_scores(score) and entry.quantizer != FLOOR]
    tokens = {i: pairs[i][1].weights for i in usable}
    if any(not _same_windows(pairs[usable[0]][1], pairs[i][1]) for i in usable):
        usable = []  # one protocol, one text, other windows: not comparable, whoever wrote that
    place = {i: at for at, i in enumerate(usable)}
    scores, draws = [pairs[i][1].windows for i in usable], [pairs[i][1].draws for i in usable]
    reading, told = pairs[0][1].number.reading, None
    if scores:
        told = Told.of(Paired(np.stack(scores), reading, tokens[usable[0]], draws=draws), floor)  # type: ignore[arg-type]

    def differ(first: int, second: int) -> bool:
        if told is None or first not in place or second not in place:
            return pairs[first][1].value != pairs[second][1].value  # no tests: the numbers are all there is
        return told.apart(place[first], place[second])

    ranks: dict[int, int] = {}
    detectable: dict[int, float | None] = {}
    leader = None
    for number, i in enumerate(usable, 1):
        if leader is None or differ(i, leader):
            leader = i
            ranks[i] = number
        else:
            ranks[i] = ranks[leader]
            detectable[i] = told.detectable(place[i], place[leader]) if told else None
    holders = Counter(ranks.values())
    fronts = _front(pairs, differ)
    varying = _varying([entry for entry, _ in pairs])
    rows = []
    for i, (entry, score) in enumerate(pairs):
        tied, kl = i in ranks and holders[ranks[i]] > 1, score.divergence and score.divergence.kl.value
        row = Row(entry, score, ranks.get(i), tied, fronts[i], _options(entry, varying), detectable.get(i))
        near = floor_kl is not None and kl is not None and not row.floor and 0 < kl <= SILENT * floor_kl
        rows.append(replace(row, silent=near, draws=len(score.number.draws or [0])))
    return rows, None if told is None else sentences.Ranked(tuple(rows[i] for i in usable), told)


def _has_scores(score: Score) -> bool:
    """Whether intervals can be made: the number and all of its scores per window are there and finite."""
    return score.windows is not None and bool(np.isfinite(score.value) and np.isfinite(score.windows).all())


def _same_windows(one: Score, other: Score) -> bool:
    """Whether two scores are of as many windows, of the same lengths."""
    assert one.windows is not None
    assert other.windows is not None
    if len(one.windows) != len(other.windows) or (one.weights is None) != (other.weights is None):
        return False
    return one.weights is None or np.array_equal(one.weights, other.weights)  # type: ignore[arg-type]


def _front(pairs: list[tuple[Entry, Score]], differ: Callable[[int, int], bool]) -> list[str]:
    quality = np.array([score.loss for _, score in pairs])
    bits = np.array([entry.result.quantization.bits_per_weight for entry, _ in pairs])  # type: ignore[union-attr]
    marks = []
    noise = np.array([entry.quantizer == FLOOR for entry, _ in pairs])
    for i in range(len(pairs)):
        no_worse = (quality <= quality[i]) & (bits <= bits[i]) & ~noise
        if not np.isfinite(quality[i]) or noise[i]:
            marks.append(BEATEN)
        elif not (no_worse & ((quality < quality[i]) | (bits < bits[i]))).any():
            marks.append(FRONT)
        else:
            best = int(np.flatnonzero(no_worse)[np.argmin(quality[no_worse])])
            marks.append(BEATEN if differ(i, best) else NEAR_FRONT)
    return marks


def _varying(entries: Sequence[Entry]) -> dict[str, set[str]]:
    """Quantizer -> its keys in which its entries differ; "" -> the other keys, in which any entries differ.

    A quantizer's setting that is not there is a value (None). Another group's is not: calibration-free methods have
    no calibration text, which does not make that of the others a difference between them.
    """
    seen: dict[str, dict[str, set[str]]] = {"": {}}
    count = Counter(entry.quantizer for entry in entries)
    holders: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        for key, value in naming.described(entry.result).items():
            owner = entry.quantizer if key.startswith(("quantizer.", "transform.")) else ""
            seen.setdefault(owner, {}).setdefault(key, set()).add(repr(value))
            holders[owner, key] += 1
    return {
        owner: {
            key for key, values in keys.items() if len(values) > 1 or (owner and holders[owner, key] < count[owner])
        }
        for owner, keys in seen.items()
    }


SHOWN_ELSEWHERE = {"quantizer.name", "transform.name", "quantizer.nbits", "quantizer.group_size"}


def _options(entry: Entry, varying: dict[str, set[str]]) -> dict[str, Any]:
    """What is null in one of the rows is not shown in it: the others show what they have set."""
    keys = (varying.get("", set()) | varying.get(entry.quantizer, set())) - SHOWN_ELSEWHERE
    settings = naming.described(entry.result)
    return {key.removeprefix("quantizer."): settings[key] for key in sorted(keys) if settings.get(key) is not None}
