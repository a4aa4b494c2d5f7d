"""Several windowed evaluations as one, whose windows are the rows of one pass: those of the kinds of `task=domains`.

Each part keeps its own record, under its own protocol, as if it were evaluated alone. Beside them stands one record of
means over the parts: of the KL, and of the NLL (so that exp of it is the geometric mean of the parts' perplexities).
There a part is what a document is elsewhere, so the intervals say how the mean would move with other kinds of text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from qbench.errors import PointError
from qbench.evaluate.protocol import Scores
from qbench.evaluate.score import NonFiniteError, WindowAsks, WindowReader
from qbench.evaluate.windowed import WindowedEvaluation, name_of
from qbench.intervals import jackknife, p_value, smallest, verdict
from qbench.record.quality import EvaluationRecord, MetricRecord, Reading, TaskRecord, read_mean


@dataclass(frozen=True)
class JoinedEvaluation:
    """Parts by name, in order; `protocol` is the name of the record over all of them, `task` the name of the task."""

    parts: dict[str, WindowedEvaluation]
    protocol: str
    task: str
    longest: int  # tokens of the longest window

    @property
    def identity(self) -> dict[str, Any]:
        parts = [part.identity for part in self.parts.values()]
        return {"protocol": ", ".join([self.protocol, *(part["protocol"] for part in parts)]), "parts": parts}

    @property
    def ids(self) -> np.ndarray:
        """`[windows, tokens]`; a window that is shorter than the longest repeats its last token."""
        every = [part.ids for part in self.parts.values()]
        return np.concatenate([np.pad(i, ((0, 0), (0, self.longest - i.shape[1])), mode="edge") for i in every])

    def asks(self) -> JoinedAsks:
        return JoinedAsks({name: part.asks() for name, part in self.parts.items()})

    def score_baseline(self, model: Any) -> Scores:
        return _joined((name, part.score_baseline(model)) for name, part in self.parts.items())

    def score(self, model: Any, baseline: Scores | None) -> Scores:
        """Scores as each part's, by `PART/NAME`. Raises PointError for NaN or Inf."""
        return _joined((name, part.score(model, baseline and _of(name, baseline))) for name, part in self.parts.items())

    def records(
        self, scores: Scores, baseline: Scores | None, baseline_cached: bool
    ) -> tuple[list[EvaluationRecord], list[TaskRecord], dict[str, Scores]]:
        """A record a part, and the one over all of them."""
        found: dict[str, EvaluationRecord] = {}
        files: dict[str, Scores] = {}
        for name, part in self.parts.items():
            [found[name]], _, kept = part.records(_of(name, scores), baseline and _of(name, baseline), baseline_cached)
            files |= kept
        kept = {}
        metrics = [self._mean(*each, kept) for each in _numbers(found)]
        file = name_of(kept)
        texts = [record.token_ids_sha256 for record in found.values()]
        first = next(iter(found.values()))
        record = TaskRecord(
            protocol=self.protocol,
            task=self.task,
            version="",
            documents=len(found),
            documents_sha256=hashlib.sha256("".join(texts).encode()).hexdigest(),
            num_fewshot=None,
            max_length=self.longest,
            bos_policy=first.bos_policy,
            text_source=", ".join(found),
            baseline_cached=baseline_cached,
            metrics=metrics,
            scores_file=file,
        )
        return [*found.values()], [record], files | {file: kept}

    def _mean(
        self, name: str, title: str, reading: Reading, ours: np.ndarray, theirs: np.ndarray | None, kept: Scores
    ) -> MetricRecord:
        """The number over all parts, from what each adds to it, `[parts]`, which goes into `kept`."""
        kept[f"quantized/{self.task}/{name},none"] = ours
        value = float(read_mean(reading, ours.mean()))
        kinds = dict(zip(self.parts, read_mean(reading, ours).tolist(), strict=True))
        number = {"name": name, "higher_is_better": False, "reading": reading, "title": title, "kinds": kinds}
        if theirs is None:
            return MetricRecord(value=value, **number)
        kept[f"baseline/{self.task}/{name},none"] = theirs
        baseline = float(read_mean(reading, theirs.mean()))
        delta = jackknife(lambda q, b: read_mean(reading, q) - read_mean(reading, b), ours, theirs)
        return MetricRecord(
            value=value,
            baseline=baseline,
            delta=value - baseline,
            delta_low=None if delta.low is None else min(delta.low, value - baseline),
            delta_high=None if delta.high is None else max(delta.high, value - baseline),
            verdict=verdict(delta, higher_is_better=False),
            p_value=p_value(delta),
            detectable=smallest(delta),
            **number,
        )


def _numbers(
    found: dict[str, EvaluationRecord],
) -> Iterator[tuple[str, str, Reading, np.ndarray, np.ndarray | None]]:
    """Name, title, reading, and what each part adds to the variant's number and to the original's, `[parts]`."""
    records = [*found.values()]
    if all(record.divergence is not None for record in records):
        kl = np.asarray([record.divergence.kl.value for record in records])  # type: ignore[union-attr]
        yield "kl_mean", f"KL, nats, mean of {len(records)} kinds", "mean", kl, np.zeros_like(kl)
    known = all(record.baseline_ppl is not None for record in records)
    nll, base = np.log([r.ppl for r in records]), np.log([r.baseline_ppl for r in records]) if known else None
    yield "ppl", f"perplexity, geometric mean of {len(records)} kinds", "exp mean", nll, base


def _joined(scores: Iterator[tuple[str, Scores]]) -> Scores:
    return {f"{name}/{key}": values for name, part in scores for key, values in part.items()}


def _of(name: str, scores: Scores) -> Scores:
    return {key.removeprefix(f"{name}/"): values for key, values in scores.items() if key.startswith(f"{name}/")}


@dataclass
class JoinedAsks:
    """The batches of each part in turn; windows of two parts never share a batch, so their lengths may differ."""

    parts: dict[str, WindowAsks]

    @property
    def compares(self) -> bool:
        return all(part.compares for part in self.parts.values())

    @property
    def batches(self) -> Sequence[np.ndarray]:
        return [batch for part in self.parts.values() for batch in part.batches]

    def reader(self, original: Scores | None) -> JoinedReader:
        return JoinedReader(self)


class JoinedReader:
    def __init__(self, asks: JoinedAsks) -> None:
        self.readers: dict[str, WindowReader] = {name: part.reader(None) for name, part in asks.parts.items()}
        self.place = [(name, b) for name, part in asks.parts.items() for b in range(len(part.batches))]

    def see(self, batch: int, row: int, logits: Tensor, original: Tensor | None) -> None:
        """As in asks.py."""
        name, own = self.place[batch]
        try:
            self.readers[name].see(own, row, logits, original)
        except NonFiniteError as error:
            raise PointError(f"{error}, of the {name} text") from None

    def scores(self) -> Scores:
        return _joined((name, reader.scores()) for name, reader in self.readers.items())
