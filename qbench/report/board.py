"""Orders entries without ranking inside the noise, and marks the best trade-offs.

A section holds one model under one protocol, scored on the same tokens: only those numbers compare. Within it
- a rank is shared by every row whose paired 95 % interval to the row that leads the rank contains zero;
- the front is every row that no other beats: none is at least as good in quality and in bits per weight and better in
  one of them. A beaten row whose interval to the best row of its size or less contains zero is on the front as far as
  the noise lets anyone see, and marked so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qbench.report.entries import Entry, Score
from qbench.report.noise import Paired, is_real

FRONT, NEAR_FRONT, BEATEN = "front", "noise", ""


@dataclass(frozen=True)
class Row:
    entry: Entry
    score: Score
    rank: int | None  # 1 is best; None when there are no windows to compare
    tied: bool  # another row has the same rank
    front: str  # FRONT, NEAR_FRONT (inside the noise of a better row) or BEATEN
    options: dict[str, Any]  # the settings in which the section's rows differ, besides method, bits and group


@dataclass(frozen=True)
class Section:
    model: str
    protocol: str
    metric: str
    text: str
    baseline: float | None  # quality of the unquantized model
    note: str
    rows: list[Row]

    @property
    def title(self) -> str:
        return f"{self.model}, {self.protocol}"


def sections(entries: Sequence[Entry], order: Callable[[Row], float | None], descending: bool = False) -> list[Section]:
    """Sections by model and protocol, rows sorted by `order`; rows without that number come last."""
    groups: dict[tuple[str, ...], list[tuple[Entry, Score]]] = {}
    for entry in entries:
        for score in entry.scores:
            groups.setdefault((entry.model, score.protocol, score.metric, score.text), []).append((entry, score))
    found = []
    for (model, protocol, metric, text), pairs in sorted(groups.items()):
        rows = _rank(pairs)

        def place(row: Row) -> tuple[bool, float, float]:
            value = order(row)
            if value is None or not np.isfinite(value):
                return (True, 0.0, row.score.loss)
            return (False, -value if descending else value, row.score.loss)

        rows.sort(key=place)
        baselines = [score.baseline for _, score in pairs if score.baseline is not None]
        notes = [entry.result.model.note for entry, _ in pairs if entry.result.model]
        found.append(
            Section(
                model, protocol, metric, text, baselines[-1] if baselines else None, notes[-1] if notes else "", rows
            )
        )
    return found


def _rank(pairs: list[tuple[Entry, Score]]) -> list[Row]:
    pairs = sorted(pairs, key=lambda pair: pair[1].loss)  # a NaN sorts anywhere: it has no windows either
    usable = [i for i, (_, score) in enumerate(pairs) if score.windows is not None]
    lengths = {len(pairs[i][1].windows) for i in usable}  # type: ignore[arg-type]
    if len(lengths) > 1:  # one protocol, one text, two lengths: not comparable, whoever wrote that
        usable = []
    place = {i: at for at, i in enumerate(usable)}
    score = pairs[0][1]
    scores = [pairs[i][1].windows for i in usable]
    paired = Paired(np.stack(scores), score.metric, score.weights) if scores else None  # type: ignore[arg-type]

    def differ(first: int, second: int) -> bool:
        if paired is None or first not in place or second not in place:
            return pairs[first][1].value != pairs[second][1].value  # no intervals: the numbers are all there is
        return is_real(paired.difference(place[first], place[second]))

    ranks: dict[int, int] = {}
    leader = None
    for number, i in enumerate(usable, 1):
        if leader is None or differ(i, leader):
            leader = i
            ranks[i] = number
        else:
            ranks[i] = ranks[leader]
    holders = Counter(ranks.values())
    fronts = _front(pairs, differ)
    varying = _varying([entry for entry, _ in pairs])
    return [
        Row(entry, score, ranks.get(i), holders[ranks.get(i)] > 1, fronts[i], _options(entry, varying))
        for i, (entry, score) in enumerate(pairs)
    ]


def _front(pairs: list[tuple[Entry, Score]], differ: Callable[[int, int], bool]) -> list[str]:
    quality = np.array([score.loss for _, score in pairs])
    bits = np.array([entry.result.quantization.bits_per_weight for entry, _ in pairs])  # type: ignore[union-attr]
    marks = []
    for i in range(len(pairs)):
        no_worse = (quality <= quality[i]) & (bits <= bits[i])
        if not np.isfinite(quality[i]):
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
        for key, value in entry.settings.items():
            owner = entry.quantizer if key.startswith("quantizer.") else ""
            seen.setdefault(owner, {}).setdefault(key, set()).add(repr(value))
            holders[owner, key] += 1
    return {
        owner: {
            key for key, values in keys.items() if len(values) > 1 or (owner and holders[owner, key] < count[owner])
        }
        for owner, keys in seen.items()
    }


SHOWN_ELSEWHERE = {"quantizer.name", "quantizer.nbits", "quantizer.group_size", "model.name"}


def _options(entry: Entry, varying: dict[str, set[str]]) -> dict[str, Any]:
    keys = (varying.get("", set()) | varying.get(entry.quantizer, set())) - SHOWN_ELSEWHERE
    return {key.removeprefix("quantizer."): entry.settings[key] for key in sorted(keys) if key in entry.settings}
