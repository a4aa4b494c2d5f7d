"""What a section of a board says, in sentences that a person can quote: each holds its numbers and its evidence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qbench import significance
from qbench.report.noise import Told

if TYPE_CHECKING:
    from qbench.report.board import Row

MOST = 3  # ties that are told in words; the table has them all
GROWS = 1.25  # times the KL at a window's end over that at its beginning, from which it is worth a sentence


@dataclass(frozen=True)
class Ranked:
    """The rows that have a rank, best first, as `told` counts them."""

    rows: tuple[Row, ...]
    told: Told


def of(rows: Sequence[Row], ranked: Ranked | None, floor: float | None, floor_kl: float | None) -> Iterator[str]:
    """Of one section: who is best, what cannot be told apart and what it would take, and what bounds all of it."""
    if ranked is not None and len(ranked.rows) > 1 and ranked.told.comparisons:
        yield from _best(ranked)
        yield from _ties(ranked)
        yield from _correction(ranked)
    yield from _floor(rows, floor, floor_kl)
    if silent := [row.method for row in rows if row.silent]:
        lie = "lies" if len(silent) == 1 else "lie"
        yield (
            f"{_listed(silent)} {lie} in the silent zone: a KL this near the floor's does not predict tasks "
            "(arXiv 2606.19558)."
        )
    yield from _place(rows)
    yield from _kinds(rows)
    yield from _asked(rows[0])


def _best(ranked: Ranked) -> Iterator[str]:
    first = ranked.rows[0]
    at = next((i for i, row in enumerate(ranked.rows) if row.rank != first.rank), None)
    if at is None:
        return
    other, digits = ranked.rows[at], first.score.number.digits
    paired, sign = ranked.told.paired, -1 if first.score.higher_is_better else 1
    wins = int((sign * (paired.scores[at] - paired.scores[0]) > 0).sum())
    found = paired.difference(at, 0)
    low, high = sorted((sign * (found.low or 0), sign * (found.high or 0)))
    yield (
        f"{first.method} is better than {other.method} on {wins} of {_count(ranked)}: {first.score.value:.{digits}f} "
        f"against {other.score.value:.{digits}f}, a difference of {abs(found.value):.{digits}f} "
        f"({low:.{digits}f} to {high:.{digits}f})."
    )


def _ties(ranked: Ranked) -> Iterator[str]:
    """Of each rank that several share, the row that leads it and the one after it."""
    pairs = [(i - 1, i) for i in range(1, len(ranked.rows)) if ranked.rows[i].rank == ranked.rows[i - 1].rank]
    led = [(a, b) for a, b in pairs if a == 0 or ranked.rows[a - 1].rank != ranked.rows[a].rank]
    for first, second in led[:MOST]:
        one, other = ranked.rows[first], ranked.rows[second]
        digits, told = one.score.number.digits, ranked.told
        difference = abs(float(told.paired.values[first] - told.paired.values[second]))
        smallest = told.detectable(first, second)
        draws = max(one.draws, other.draws)
        text = f"{one.method} and {other.method} cannot be told apart with these {_count(ranked)}"
        text += f" and {draws} draws" if draws > 1 else ""
        if not difference:
            yield f"{text}: their numbers are equal."
            continue
        text += f": they differ by {difference:.{digits}f}"
        if difference <= told.floor:
            yield f"{text}, no more than rounding noise does ({told.floor:.{digits}g})."
        elif smallest is None:
            yield f"{text}, and so few would show no difference at all."
        else:
            needed = _more(ranked, first, second, difference, smallest)
            yield f"{text}, and only {smallest:.{digits}f} would be found 4 times in 5; {needed}."
    if len(led) > MOST:
        yield f"{len(led) - MOST} more ranks are shared."


def _more(ranked: Ranked, first: int, second: int, difference: float, smallest: float) -> str:
    """What would show the difference: the windows' part of the variance falls with windows, the draws' with draws."""
    paired, units = ranked.told.paired, _units(ranked)
    if not difference:
        return "nothing would"
    if paired.binary[first] and paired.binary[second]:
        return f"{significance.more_needed(difference, smallest, paired.windows):,} more {units} would"
    whole, windows = paired.difference(first, second), paired.of_windows(first, second)
    assert whole.error is not None
    assert windows.error is not None
    wanted = (whole.error * difference / smallest) ** 2
    of_draws = whole.error**2 - windows.error**2
    if wanted > of_draws:
        count = math.ceil(paired.windows * windows.error**2 / (wanted - of_draws)) - paired.windows
        return f"{max(1, count):,} more {units} would"
    draws = max(ranked.rows[i].draws for i in (first, second))
    if wanted > windows.error**2:
        count = math.ceil(draws * of_draws / (wanted - windows.error**2)) - draws
        return f"{max(1, count):,} more draws would, and no number of {units}"
    return f"it takes more draws and more {units}"


def _correction(ranked: Ranked) -> Iterator[str]:
    m = ranked.told.comparisons
    if m > 1:
        yield f"{len(ranked.rows)} rows are {m} comparisons: the ranks hold for all of them at the 5 % level (Holm)."


def _floor(rows: Sequence[Row], floor: float | None, floor_kl: float | None) -> Iterator[str]:
    if floor is None:
        return
    row = next(row for row in rows if row.floor)
    precision, title = row.entry.identity.dtype, row.score.number.called.replace("_", " ")
    kl = "" if floor_kl is None else f" and gives a KL of {floor_kl:.2g} nats"
    yield f"Rounding noise of {precision} alone moves the {title} by up to {floor:.2g}{kl}; nothing below is ranked."


def _place(rows: Sequence[Row]) -> Iterator[str]:
    """The row whose KL grows most along the window."""
    grown = []
    for row in rows:
        parts = [] if row.score.divergence is None else row.score.divergence.by_position
        kls = [part.kl for part in parts if part.kl is not None]
        if len(kls) > 1 and kls[0] > 0 and not row.floor and kls[-1] >= GROWS * kls[0]:
            grown.append((kls[-1] / kls[0], row, kls, parts))
    if grown:
        times, row, kls, parts = max(grown, key=lambda each: each[0])
        yield (
            f"Damage grows with context: the KL of {row.method} is {kls[-1]:.4f} from token {parts[-1].low:.0f} on, "
            f"{times:.1f} times that of the first {parts[0].high:.0f}."
        )


def _kinds(rows: Sequence[Row]) -> Iterator[str]:
    """Of a mean over kinds of text, on which of them each row is worst; rows of one worst kind together."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if (worst := row.score.number.worst_kind) is not None and not row.floor and row.score.value:
            groups.setdefault(worst, []).append(row)
    for kind, same in groups.items():
        told = [f"{row.method} ({(row.score.number.kinds or {})[kind] / row.score.value:.1f})" for row in same]
        yield f"Worst on {kind}, in times of the mean over all kinds: {_listed(told)}."


def _asked(row: Row) -> Iterator[str]:
    """How the answers of a section were generated, and how its questions were put; of one row, since all share it."""
    for task in row.entry.result.tasks:
        if task.protocol != row.score.protocol or task.documents_sha256 != row.score.text:
            continue
        if (decoding := task.decoding) is not None:
            yield _decoded(decoding)
        if task.chat is not None:
            shots = f", {task.num_fewshot} shots as turns" if task.num_fewshot and task.chat.multiturn else ""
            said = "".join(f", {key}={value}" for key, value in task.chat.arguments.items())
            system = "" if task.system_instruction is None else f", system message {task.system_instruction!r}"
            yield f"Asked through the chat template {task.chat.template_sha256[:8]}{shots}{said}{system}."


def _decoded(decoding: dict[str, Any]) -> str:
    seeds, longest = decoding.get("seeds") or [], decoding.get("max_gen_toks")
    words = "greedily"
    if decoding.get("do_sample"):
        words = f"by sampling, seeds {', '.join(map(str, seeds))}"
    told = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "num_beams"} & decoding.keys()
    settings = [f"{key} {decoding[key]}" for key in sorted(told) if decoding[key] is not None and decoding[key] != 0]
    settings += [f"{key} {value} of the model's own" for key, value in (decoding.get("model") or {}).items()]
    most = "as many tokens as each task allows" if longest is None else f"at most {longest} tokens"
    stops = ", ".join(repr(stop) for stop in decoding.get("until") or ())
    return (
        f"Answers are generated {words}{''.join(f', {setting}' for setting in settings)}, {most}, "
        f"{decoding.get('batch_size')} together{f', up to {stops}' if stops else ''}."
    )


def _units(ranked: Ranked) -> str:
    if ranked.rows[0].score.number.kinds:
        return "kinds of text"
    return "windows" if ranked.rows[0].score.number.reading == "exp mean" else "documents"


def _count(ranked: Ranked) -> str:
    return f"{ranked.told.paired.windows} {_units(ranked)}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
