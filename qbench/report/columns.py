"""The columns of a leaderboard: one list that every format writes from, with the unit in every key and title."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qbench.record.quality import IntervalRecord
from qbench.report.board import FRONT, NEAR_FRONT, Row, Section
from qbench.report.published import Published, beside
from qbench.report.table import Table

Value = float | int | str | None


@dataclass(frozen=True)
class Column:
    key: str  # in CSV and JSON, and what --metric names
    title: str
    value: Callable[[Row], Value]
    digits: int | None = None  # after the point, in the readable formats; None for text
    descending: bool = False  # the larger, the better
    people: bool = True  # in the readable formats
    programs: bool = True  # in CSV and JSON
    show: Callable[[Row], str] | None = None  # how people read it, where that is not just the value


def _interval(row: Row) -> str:
    if row.score.number.delta_low is None or row.score.number.delta_high is None:
        return ""
    number = row.score.number
    interval = f"{number.delta_low:+.3f} to {number.delta_high:+.3f}"
    if number.verdict == "not distinguishable" and number.detectable:
        return f"{interval}, {number.detectable:.3f} would show"
    return interval


def _options(row: Row) -> str:
    return " ".join(f"{key}={value}" for key, value in row.options.items())


def command(row: Row) -> str:
    """What reproduces the row, as one line for a shell."""
    return shlex.join(["python", "-m", "qbench", *row.entry.result.command])


def _quantization(name: str, scale: float = 1.0) -> Callable[[Row], Value]:
    def read(row: Row) -> Value:
        value = getattr(row.entry.result.quantization, name)
        return value if value is None or scale == 1 else value * scale

    return read


def _divergence(name: str) -> Callable[[Row], Value]:
    """How far the next-token distributions are from the 16-bit model's: a mean over tokens, or a percentile."""

    def read(row: Row) -> Value:
        found = None if row.score.divergence is None else getattr(row.score.divergence, name)
        return found.value if isinstance(found, IntervalRecord) else found

    return read


def _part(parts: str, index: int, name: str) -> Callable[[Row], Value]:
    """The KL, or the share of changed top tokens, of the positions in one of five buckets or eight parts."""

    def read(row: Row) -> Value:
        found = [] if row.score.divergence is None else getattr(row.score.divergence, parts)
        return getattr(found[index], name) if index < len(found) else None

    return read


def _kind(name: str) -> Callable[[Row], Value]:
    """The number on one kind of text, of a mean over kinds."""
    return lambda row: (row.score.number.kinds or {}).get(name)


def _kl(row: Row) -> str:
    if row.score.divergence is None:
        return ""
    kl = row.score.divergence.kl.value
    digits = ".4f" if kl >= 1e-3 or not kl else ".1e"
    return f"{kl:{digits}}{' (silent)' if row.silent else ''}"


def _decode(row: Row) -> Value:
    speed = row.entry.result.speed
    return None if speed is None else speed.quantized.decode.tokens_per_second.median


def _decode_times(row: Row) -> Value:
    """Decode speed over the 16-bit model's, timed in the same run at the same shapes."""
    speed = row.entry.result.speed
    if speed is None or speed.baseline is None:
        return None
    before = speed.baseline.decode.tokens_per_second.median
    return speed.quantized.decode.tokens_per_second.median / before if before else None


def _flipped(row: Row) -> Value:
    """Percent of the documents whose answer turned right or wrong."""
    rate = row.score.number.flip_rate
    return None if rate is None else 100 * rate


def _flipped_alone(row: Row) -> Value:
    """The same between two samples of the original: what sampling alone flips."""
    rate = row.score.number.flip_rate_alone
    return None if rate is None else 100 * rate


def _mcnemar(row: Row) -> Value:
    return row.score.number.p_value if row.score.number.turned_right is not None else None


def _head_bits(row: Row) -> str:
    """Empty where it is 16 bit, as it is for every method that quantizes the linears alone."""
    bits = row.entry.result.quantization.head_bits  # type: ignore[union-attr]
    return "" if bits == 16 else f"{bits:.2f}"


def _draws(row: Row) -> Value:
    return row.draws if row.draws > 1 else None


def _rank(row: Row) -> str:
    if row.floor:
        return "floor"
    return "" if row.rank is None else f"{row.rank}{'=' if row.tied else ''}"


def _source(row: Row) -> str:
    """Empty for what qbench made itself, so that the column is there only beside others'."""
    return "" if row.entry.source == "ours" else row.entry.source


def _file(name: str) -> Callable[[Row], Value]:
    def read(row: Row) -> Value:
        return getattr(row.entry.file, name, None)

    return read


# what a publication may say of a row besides the section's number
PUBLISHED_BESIDES = {"model_gigabytes": ("GB", 2), "quant_seconds": ("s", 2), "flip_percent": ("flipped, %", 2)}
MARKS = {FRONT: "●", NEAR_FRONT: "○"}
LEGEND = (
    "●: no other row is as good in quality and in bits per weight. ○: beaten, but inside the noise. "
    "Rows with equal rank (=) cannot be told apart: paired tests at the 5 % level, corrected by Holm for all pairs of "
    "rows. Detectable: the smallest difference to the first of them that would be found 4 times in 5."
)

_SETTING: list[Column] = [
    Column("rank", "rank", lambda row: row.rank, show=_rank),
    Column("tied", "tied", lambda row: row.tied, people=False),
    Column("front", "best", lambda row: row.front, show=lambda row: MARKS.get(row.front, "")),
    Column("quantizer", "method", lambda row: row.entry.quantizer),
    Column("source", "made by", lambda row: row.entry.source, show=_source),
    Column("bits", "bits", lambda row: row.entry.bits, digits=0),
    Column("group_size", "group", lambda row: row.entry.identity.quantizer.get("group_size"), digits=0),
    Column("options", "differs in", _options),
]
_DIVERGENCE: list[Column] = [
    Column("kl", "KL, nats", _divergence("kl"), digits=4, show=_kl),
    Column("top1_agreement", "same top token", _divergence("top1_agreement"), digits=4, descending=True),
]
_SPREAD: list[Column] = [  # of the KL, over positions
    Column("kl_p50", "KL, median", _divergence("kl_p50"), digits=4),
    Column("kl_p90", "KL, 90 % below", _divergence("kl_p90"), digits=4, people=False),
    Column("kl_p99", "KL, 99 % below", _divergence("kl_p99"), digits=3),
    Column("kl_p999", "KL, 99.9 % below", _divergence("kl_p999"), digits=3),
    Column("silent", "silent zone", lambda row: row.silent, people=False),
    *(
        Column(f"{name}_{parts}_{i}", "", _part(f"by_{parts}", i, name), people=False)
        for parts, count in (("confidence", 5), ("position", 8))
        for name in ("kl", "top1_changed")
        for i in range(count)
    ),
]
_SIZE: list[Column] = [
    Column("bits_per_weight", "bits/weight", _quantization("bits_per_weight"), digits=3),
    Column("embedding_bits", "embedding bits", _quantization("embedding_bits"), digits=2, people=False),
    Column("head_bits", "head bits", _quantization("head_bits"), digits=2, show=_head_bits),
    Column("model_bytes", "model, bytes", _quantization("model_bytes"), digits=0, people=False),
    Column("model_megabytes", "model, MB", _quantization("model_bytes", 1e-6), digits=1, programs=False),
    Column("file_bytes", "file, bytes", _file("file_bytes"), digits=0, people=False),
]
_COST: list[Column] = [
    Column("weight_error", "weight error", lambda row: row.entry.weight_error, digits=4),
    Column("quant_seconds", "quantizing, s", _quantization("quant_seconds"), digits=1),
    Column("peak_alloc_bytes", "peak GPU memory, bytes", _quantization("peak_alloc_bytes"), digits=0, people=False),
    Column("decode_tokens_per_second", "decode, tokens/s", _decode, digits=1, descending=True),
    Column("decode_times", "times 16 bit", _decode_times, digits=2, descending=True),
    Column("coverage", "coverage", _quantization("coverage"), digits=3, descending=True, people=False),
]
_NUMBERS = [*_DIVERGENCE, *_SPREAD[:4], *_SIZE, *_COST]
_ORIGIN: list[Column] = [
    Column("qbench_version", "qbench", lambda row: row.entry.result.qbench_version, people=False),
    Column("created_utc", "measured, UTC", lambda row: row.entry.result.created_utc, people=False),
    Column("run_id", "run", lambda row: row.entry.result.run_id, people=False),
    Column("command", "command", command, people=False),
]


def columns(section: Section, published: Sequence[Published] = ()) -> list[Column]:
    """Every column of a section; the quality columns are named after its metric.

    Published numbers get columns of their own, if there is one for any row.
    """
    number = section.number
    quality = [
        Column(number.name, number.called, lambda row: row.score.value, digits=number.digits),
        Column(f"{section.metric}_delta", "to 16 bit", lambda row: row.score.number.delta, digits=3),
        Column("samples", "samples", lambda row: len(row.score.number.samples or ()) or None, digits=0),
        Column("samples_spread", "spread over samples", lambda row: row.score.number.sample_spread, digits=3),
        Column("draws", "draws", _draws, digits=0),
        Column("draws_spread", "spread over draws", lambda row: row.score.number.spread, digits=3),
        Column("detectable", "detectable", lambda row: row.detectable, digits=3),
        Column("worst_kind", "worst kind", lambda row: row.score.number.worst_kind),
        *(Column(f"{number.name}_{kind}", kind, _kind(kind), digits=3) for kind in number.kinds or ()),
    ]
    interval = [
        Column("interval", "95 %", _interval, programs=False),
        Column(f"{section.metric}_delta_low", "low", lambda row: row.score.number.delta_low, digits=3, people=False),
        Column(f"{section.metric}_delta_high", "high", lambda row: row.score.number.delta_high, digits=3, people=False),
        Column(f"{section.metric}_p_value", "p", lambda row: row.score.number.p_value, people=False),
        Column(f"{section.metric}_detectable", "d", lambda row: row.score.number.detectable, people=False),
        Column("flip_percent", "flipped, %", _flipped, digits=2),
        Column("flip_percent_alone", "of it by sampling, %", _flipped_alone, digits=2),
        Column("turned_right", "turned right", lambda row: row.score.number.turned_right, digits=0),
        Column("turned_wrong", "turned wrong", lambda row: row.score.number.turned_wrong, digits=0),
        Column("mcnemar_p", "McNemar p", _mcnemar, digits=3, programs=False),
    ]
    if any(beside(published, section, row) for row in section.rows):

        def of(row: Row, name: str) -> Value:
            return getattr(beside(published, section, row), name, None)

        def difference(row: Row) -> Value:
            theirs = beside(published, section, row)
            return None if theirs is None else row.score.value - theirs.value

        interval += [
            Column("published", "published", lambda row: of(row, "value"), digits=3),
            Column("published_difference", "ours minus it", difference, digits=3),
            Column("published_in", "where", lambda row: _join(of(row, "source"), of(row, "where"))),
        ]
    for metric, (title, digits) in PUBLISHED_BESIDES.items():
        if any(beside(published, section, row, metric) for row in section.rows):
            interval.append(
                Column(
                    f"published_{metric}",
                    f"published: {title}",
                    lambda row, metric=metric: getattr(beside(published, section, row, metric), "value", None),
                    digits=digits,
                )
            )
    return [*_SETTING, *quality, *_SIZE, *interval, *_DIVERGENCE, *_COST, *_SPREAD, *_ORIGIN]


def _join(*parts: Value) -> str:
    return ", ".join(str(part) for part in parts if part)


def table(section: Section, published: Sequence[Published] = ()) -> Table:
    """A section as every format but HTML writes it; columns that are empty in all rows are not shown to people."""
    every = columns(section, published)
    cells = {column.key: [text(column, row) for row in section.rows] for column in every if column.people}
    shown = [column for column in every if any(cells.get(column.key, ()))]
    kept = [column for column in every if column.programs]
    baseline = f"16 bit: {section.baseline:.3f}. " if section.baseline is not None else ""
    notes = [*section.sentences, baseline + LEGEND]
    for number in published:
        if (number.quantizer, number.model, number.protocol, number.metric) == (
            "none",
            section.model,
            section.protocol,
            section.metric,
        ):
            notes.append(f"16 bit, published: {number.value:.3f} ({_join(number.source, number.where)}).")
    if section.note:
        notes.append(f"Model: {section.note}.")
    return Table(
        title=section.title,
        facts={
            "model": section.model,
            "weights": section.weights,
            "dtype": section.dtype,
            "device": section.device,
            "protocol": section.protocol,
            "text": section.text,
            f"baseline_{section.metric}": section.baseline,
            "floor": section.floor,
            "floor_kl": section.floor_kl,
        },
        notes=notes,
        keys=[column.key for column in kept],
        values=[[column.value(row) for column in kept] for row in section.rows],
        titles=[column.title for column in shown],
        numeric=[column.digits is not None for column in shown],
        cells=[list(row) for row in zip(*(cells[column.key] for column in shown), strict=True)],
    )


SORTABLE = ("quality", "delta", *(column.key for column in _NUMBERS if column.programs))


def order(metric: str) -> tuple[Callable[[Row], float | None], bool]:
    """The sorting key of a metric, and whether larger is better."""
    if metric == "quality":
        return (lambda row: row.score.loss), False
    if metric == "delta":
        return _change_for_the_worse, False
    column = next(column for column in _NUMBERS if column.key == metric)
    return column.value, column.descending  # type: ignore[return-value]


def _change_for_the_worse(row: Row) -> float | None:
    delta = row.score.number.delta
    return -delta if delta is not None and row.score.higher_is_better else delta


def text(column: Column, row: Row) -> str:
    """A cell as the readable formats show it; a value of a surprising type is shown as it is."""
    if column.show is not None:
        return column.show(row)
    value: Any = column.value(row)
    if value is None:
        return ""
    if column.digits is None or isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:.{column.digits}f}" if math.isfinite(value) else str(value)
