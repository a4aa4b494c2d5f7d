"""What makes the difference on a model: the KL of each part that was quantized alone, beside that of all at once.

The points are those of quantizer=partly whose pattern names a part (record/parts.py); one method with one number of
bits on one original, text and protocol is an anatomy, which is a table of its own, and a heat map on the page. Parts
are no rows of a board: they are no ways of having the whole model. Beside the KL stand the means over the part's
linears of what is known of them without a text: weight error, imbalance (geometric mean) and kurtosis.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp, isfinite, log, prod
from pathlib import Path
from typing import Any

import numpy as np

from qbench.record import titles
from qbench.record.parts import Part, cells, part_of, place
from qbench.record.quality import DivergenceRecord
from qbench.record.quantization import LayerRow
from qbench.record.result import Result
from qbench.report.entries import Entry, Score, latest, read
from qbench.report.table import Table

PARTLY = "partly"
LEVELS = ("whole", "kind", "block", "linear")


@dataclass(frozen=True)
class PartRow:
    part: Part
    pattern: str
    entry: Entry
    divergence: DivergenceRecord
    layers: list[LayerRow]  # those that were quantized

    @property
    def kl(self) -> float:
        return self.divergence.kl.value

    @property
    def weights(self) -> int:
        return sum(prod(row.shape) for row in self.layers)

    def mean(self, name: str) -> float:
        """Over the linears; of the imbalance, a ratio, the geometric mean."""
        values = [getattr(row, name) for row in self.layers]
        if name == "imbalance_before":
            return exp(sum(map(log, values)) / len(values)) if min(values) > 0 else float("nan")
        return sum(values) / len(values)


@dataclass(frozen=True)
class Anatomy:
    """Rows in the order whole, kinds, blocks, linears, each as the model has them."""

    title: str
    facts: dict[str, Any]
    rows: list[PartRow]

    def of(self, level: str) -> list[PartRow]:
        return [row for row in self.rows if row.part.level == level]

    @property
    def whole(self) -> PartRow | None:
        return next(iter(self.of("whole")), None)

    @property
    def sentences(self) -> list[str]:
        return [*_additivity(self), *_dearest(self), *_goes_with(self)]


def split(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """The points that are parts of an anatomy, and all others."""
    parts = [entry for entry in entries if _is_part(entry)]
    return parts, [entry for entry in entries if not _is_part(entry)]


def _is_part(entry: Entry) -> bool:
    settings = entry.identity.quantizer
    return settings.get("name") == PARTLY and part_of(str(settings.get("only"))) is not None


def anatomies(parts: Sequence[Entry], outputs: Path) -> list[Anatomy]:
    """The anatomies that the parts make up; layers that were passed over are read from `outputs`."""
    if any(type(entry.result) is not Result for entry in parts):  # but an outline
        parts = read(outputs, {entry.result.run_id for entry in parts}).entries
    groups: dict[str, list[tuple[Entry, Score]]] = defaultdict(list)
    for entry in latest(parts):
        for score in entry.scores:
            if score.divergence is not None:
                settings = {k: v for k, v in entry.identity.quantizer.items() if k != "only"}
                key = [score.protocol, score.text, entry.identity.original, settings, entry.identity.calibration]
                key.append(entry.identity.transform)
                groups[json.dumps(key, sort_keys=True)].append((entry, score))
    found = [one for one in map(_anatomy, groups.values()) if one.rows]
    found.sort(key=lambda one: (one.title, str(one.facts)))
    return [
        replace(one, title=title)
        for one, title in zip(found, titles.tell_apart([o.title for o in found], [o.facts for o in found]), strict=True)
    ]


def _anatomy(pairs: Sequence[tuple[Entry, Score]]) -> Anatomy:
    rows = []
    for entry, score in pairs:
        pattern = str(entry.identity.quantizer["only"])
        part, quantization = part_of(pattern), entry.result.quantization
        assert part is not None
        assert quantization is not None
        assert score.divergence is not None
        if layers := [row for row in quantization.layers if row.method != "plain"]:
            rows.append(PartRow(part, pattern, entry, score.divergence, layers))
    entry, score = pairs[0]
    settings = {k: v for k, v in entry.identity.quantizer.items() if k not in ("name", "only")}
    rows.sort(key=lambda row: LEVELS.index(row.part.level))
    order = _order(rows)
    rows.sort(key=lambda row: (LEVELS.index(row.part.level), row.part.block or 0, order.get(row.part.kind or "", 0)))
    bits = f" at {settings['nbits']} bits" if settings.get("nbits") is not None else ""
    group = f", group {settings['group_size']}" if settings.get("group_size") is not None else ""
    settings |= {} if entry.identity.transform is None else {"transform": entry.identity.transform["name"]}
    facts = {"model": entry.model, "protocol": score.protocol, "dtype": entry.identity.dtype}
    facts |= {"device": entry.identity.device, **{f"quantizer.{key}": value for key, value in settings.items()}}
    return Anatomy(f"{entry.model}, {score.protocol}, part by part: {settings['method']}{bits}{group}", facts, rows)


def _order(rows: Sequence[PartRow]) -> dict[str, int]:
    """The kinds as the model has them."""
    kinds = [str(place(layer.name).kind) for row in rows for layer in row.layers]
    return {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}


def _additivity(anatomy: Anatomy) -> Iterator[str]:
    whole, said = anatomy.whole, []
    if whole is None:
        return
    for level in LEVELS[1:]:
        rows = anatomy.of(level)
        if rows and sum(row.weights for row in rows) == whole.weights:
            total = sum(row.kl for row in rows)
            times = f", {total / whole.kl:.2f} times that" if whole.kl else ""
            said.append(f"those of its {len(rows)} {level}s alone add up to {total:.4f}{times}")
    if said:
        yield f"All linears at once give a KL of {whole.kl:.4f} nats; {'; '.join(said)}."


def _dearest(anatomy: Anatomy) -> Iterator[str]:
    whole = anatomy.whole
    for level in LEVELS[1:]:
        rows = anatomy.of(level)
        if len(rows) > 1 and whole is not None and (total := sum(row.kl for row in rows)) > 0:
            first = max(rows, key=lambda row: row.kl)
            yield (
                f"The {level} that costs most is {first.pattern}: {first.kl / total:.0%} of the {level}s' sum, with "
                f"{first.weights / whole.weights:.0%} of the weights."
            )


def _goes_with(anatomy: Anatomy) -> Iterator[str]:
    """What of the weights alone would have told the order."""
    level = "linear" if len(anatomy.of("linear")) > 2 else "block"
    rows = anatomy.of(level)
    if len(rows) < 4:
        return
    known = {"weight error": "relative_error", "imbalance": "imbalance_before", "kurtosis": "kurtosis_before"}
    kl = [row.kl for row in rows]
    found = [f"{title} {rank_correlation(kl, [row.mean(name) for row in rows]):.2f}" for title, name in known.items()]
    yield f"Rank correlation with the KL over its {len(rows)} {level}s: {', '.join(found)}."


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, ties in the order in which they come; NaN where all of one are equal."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return float("nan")
    ranks = [np.argsort(np.argsort(np.asarray(values, float), kind="stable")) for values in (one, other)]
    return float(np.corrcoef(ranks)[0, 1])


Column = tuple[str, str, Callable[[PartRow], Any], str]  # key, title, value, format


def _columns(anatomy: Anatomy) -> list[Column]:
    whole = anatomy.whole

    def share(row: PartRow) -> float | None:
        return row.kl / whole.kl if whole is not None and whole.kl else None

    return [
        ("part", "part", lambda row: row.pattern, ""),
        ("level", "level", lambda row: row.part.level, ""),
        ("kl", "KL, nats", lambda row: row.kl, ".5f"),
        ("kl_low", "low", lambda row: row.divergence.kl.low, ".5f"),
        ("kl_high", "high", lambda row: row.divergence.kl.high, ".5f"),
        ("share", "of the whole's", share, ".1%"),
        ("top1_agreement", "same top token", lambda row: row.divergence.top1_agreement.value, ".4f"),
        ("linears", "linears", lambda row: len(row.layers), "d"),
        ("weights", "weights", lambda row: row.weights, ",d"),
        ("weight_error", "weight error", lambda row: row.mean("relative_error"), ".4f"),
        ("imbalance", "imbalance", lambda row: row.mean("imbalance_before"), ".2f"),
        ("kurtosis", "kurtosis", lambda row: row.mean("kurtosis_before"), ".2f"),
        ("run_id", "run", lambda row: row.entry.result.run_id, ""),
    ]


def table(anatomy: Anatomy) -> Table:
    every = _columns(anatomy)
    shown = [column for column in every if column[0] != "run_id"]
    return Table(
        title=anatomy.title,
        facts=anatomy.facts,
        notes=anatomy.sentences,
        keys=[key for key, *_ in every],
        values=[[value(row) for _, _, value, _ in every] for row in anatomy.rows],
        titles=[title for _, title, *_ in shown],
        numeric=[bool(style) for *_, style in shown],
        cells=[[_text(value(row), style) for _, _, value, style in shown] for row in anatomy.rows],
    )


def _text(value: Any, style: str) -> str:
    if value is None or (isinstance(value, float) and not isfinite(value)):
        return ""
    return format(value, style) if style else str(value)


def drawn(anatomy: Anatomy) -> dict[str, Any]:
    """What the page draws: the KL and what the rows say by kind and block, and the KL of the margins.

    `measured` is False where the KL of a cell is put together from the margins, None where there is none.
    """
    whole, measured = anatomy.whole, {row.part: row.kl for row in anatomy.rows}
    layers: dict[Part, list[LayerRow]] = defaultdict(list)
    for row in [whole] if whole is not None else anatomy.rows:
        for layer in row.layers:
            layers[place(layer.name)].append(layer)
    by_cell = cells(measured, layers.keys())
    found = []
    for part, rows in layers.items():
        of = PartRow(part, "", anatomy.rows[0].entry, anatomy.rows[0].divergence, rows)
        found.append(
            {
                "kind": part.kind,
                "block": part.block,
                "kl": None if by_cell is None else by_cell[0][part],
                "error": of.mean("relative_error"),
                "imbalance": of.mean("imbalance_before"),
                "kurtosis": of.mean("kurtosis_before"),
            }
        )
    return {
        "measured": None if by_cell is None else by_cell[1],
        "kinds": list(dict.fromkeys(part.kind for part in layers)),
        "cells": found,
        "by_kind": [{"kind": row.part.kind, "kl": row.kl} for row in anatomy.of("kind")],
        "by_block": [{"block": row.part.block, "kl": row.kl} for row in anatomy.of("block")],
    }
