"""What lm-eval's tasks gave for one model: the numbers, and what each document adds to them.

As arrays by name, which is how a reference is kept, `TASK` being what was asked for and `LEAF` one of its tasks:
`TASK|number|METRIC` `[1]`; `TASK|LEAF|number|METRIC` `[1]`; `TASK|LEAF|documents|METRIC` `[documents]`, the documents'
own values, or `TASK|LEAF|contributions|METRIC`; for rolling tasks `TASK|LEAF|log_likelihood` and `TASK|LEAF|tokens`
`[documents]`; `TASK|LEAF|size` and `TASK|truncated_prompts` `[1]`; `TASK|prompts` and `TASK|token ids`, sha256 `[32]`.
Of generated answers also `TASK|decoding` and `TASK|LEAF|answers`, JSON as bytes. Where answers are sampled several
times, all of these are means over the samples, and `TASK|samples|METRIC` `[samples]` and `TASK|LEAF|samples|METRIC`
`[documents, samples]` hold each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np

from qbench.intervals import pooled_contributions

Arrays = dict[str, np.ndarray]
SAME = "same_answer,none"  # a metric of ours, called as lm-eval calls one without a filter


@dataclass(frozen=True)
class LeafScores:
    """One task of lm-eval; metrics are `METRIC,FILTER`."""

    size: int  # documents
    numbers: dict[str, float]  # lm-eval's own
    documents: Arrays = field(default_factory=dict)  # the values of which a number is the mean, `[documents]`
    contributions: Arrays = field(default_factory=dict)  # to the numbers that are no means, `[documents]` or blocks
    log_likelihood: np.ndarray | None = None  # nats of each document, of a rolling task
    tokens: np.ndarray | None = None  # of each document, of a rolling task
    samples: Arrays = field(default_factory=dict)  # of what `documents` are the means of, `[documents, samples]`
    answers: list[Any] = field(default_factory=list)  # of each document, of each of its requests, the texts

    def adds(self, metric: str) -> np.ndarray | None:
        """What each document adds to the number; None where that is not known."""
        found = self.documents.get(metric)
        return self.contributions.get(metric) if found is None else found

    def arrays(self) -> Arrays:
        found = {f"number|{metric}": np.array([value]) for metric, value in self.numbers.items()}
        found |= {f"documents|{metric}": values for metric, values in self.documents.items()}
        found |= {f"contributions|{metric}": values for metric, values in self.contributions.items()}
        found |= {f"samples|{metric}": values for metric, values in self.samples.items()}
        found["size"] = np.array([self.size])
        if self.answers:
            found["answers"] = as_bytes(self.answers)
        if self.log_likelihood is not None and self.tokens is not None:
            found |= {"log_likelihood": self.log_likelihood, "tokens": self.tokens}
        return found

    @staticmethod
    def of(arrays: Arrays) -> LeafScores:
        return LeafScores(
            size=int(arrays["size"][0]),
            numbers={metric: value.item() for metric, value in below("number|", arrays).items()},
            documents=below("documents|", arrays),
            contributions=below("contributions|", arrays),
            log_likelihood=arrays.get("log_likelihood"),
            tokens=arrays.get("tokens"),
            samples=below("samples|", arrays),
            answers=of_bytes(arrays["answers"]) if "answers" in arrays else [],
        )


@dataclass(frozen=True)
class TaskScores:
    """One requested task or group."""

    numbers: dict[str, float]  # lm-eval's own; of a group, what it makes of its tasks'
    leaves: dict[str, LeafScores]
    prompts: np.ndarray  # sha256 of every document, prompt and target
    token_ids: np.ndarray  # sha256, of rolling tasks
    truncated_prompts: int  # documents with a prompt that lost its beginning to the window
    samples: Arrays = field(default_factory=dict)  # the numbers in each sample, `[samples]`, where there are several
    decoding: dict[str, Any] | None = None  # of a task that generates

    @property
    def documents(self) -> int:
        return sum(leaf.size for leaf in self.leaves.values())

    def arrays(self, name: str) -> Arrays:
        found = {f"{name}|number|{metric}": np.array([value]) for metric, value in self.numbers.items()}
        for leaf, scores in self.leaves.items():
            found |= {f"{name}|{leaf}|{key}": values for key, values in scores.arrays().items()}
        found |= {f"{name}|prompts": self.prompts, f"{name}|token ids": self.token_ids}
        found |= {f"{name}|samples|{metric}": values for metric, values in self.samples.items()}
        found |= {} if self.decoding is None else {f"{name}|decoding": as_bytes(self.decoding)}
        return found | {f"{name}|truncated_prompts": np.array([self.truncated_prompts])}

    @staticmethod
    def of(arrays: Arrays, name: str, leaves: Iterable[str]) -> TaskScores:
        mine = below(f"{name}|", arrays)
        return TaskScores(
            numbers={metric: value.item() for metric, value in below("number|", mine).items()},
            leaves={leaf: LeafScores.of(below(f"{leaf}|", mine)) for leaf in leaves},
            prompts=mine["prompts"],
            token_ids=mine["token ids"],
            truncated_prompts=int(mine["truncated_prompts"][0]),
            samples=below("samples|", mine),
            decoding=of_bytes(mine["decoding"]) if "decoding" in mine else None,
        )

    def adds(self, metric: str, name: str, by_size: bool) -> np.ndarray | None:
        """What each document adds to the number of the task or, with its tasks' weights, of the group `name`."""
        if name in self.leaves:
            return self.leaves[name].adds(metric)
        held = [leaf for leaf in self.leaves.values() if metric in leaf.numbers]
        weights = [leaf.size if by_size else 1 for leaf in held]
        total = sum(w * leaf.numbers[metric] for w, leaf in zip(weights, held, strict=True)) / max(sum(weights), 1)
        if not math.isclose(total, self.numbers[metric], rel_tol=1e-9, abs_tol=1e-12):
            return None  # a group that aggregates in a way of its own
        parts = [leaf.adds(metric) for leaf in held]
        known = [part for part in parts if part is not None]
        return pooled_contributions(known, weights) if known and len(known) == len(parts) else None

    def outcomes(self, metric: str) -> np.ndarray | None:
        """Right or wrong, 1 or 0, of the documents of all tasks `[documents]`, for metrics that say just that."""
        return None if self.samples else self._right("documents", metric)

    def sampled(self, metric: str) -> np.ndarray | None:
        """The same of every sample, `[documents, samples]`; None where there is one."""
        return self._right("samples", metric) if self.samples else None

    def flips_alone(self, metric: str) -> float | None:
        """How often two samples of one model disagree on whether a document is right: what sampling alone flips."""
        right = self.sampled(metric)
        if right is None:
            return None
        share, count = right.mean(1), right.shape[1]
        return float((2 * share * (1 - share)).mean() * count / (count - 1))

    def _right(self, kind: str, metric: str) -> np.ndarray | None:
        parts = [getattr(leaf, kind).get(metric) for leaf in self.leaves.values() if metric in leaf.numbers]
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts):
            return None
        values = np.concatenate(known)
        return values if np.isin(values, (0, 1)).all() else None


def together(samples: Sequence[TaskScores]) -> TaskScores:
    """Several samples of the same answers as one: what documents add, and the numbers, are the samples' means."""
    first = samples[0]
    if len(samples) == 1:
        return first
    numbers = {m: np.array([one.numbers[m] for one in samples]) for m in _in_all([one.numbers for one in samples])}
    leaves = {name: _leaf([one.leaves[name] for one in samples]) for name in first.leaves}
    means = {metric: float(values.mean()) for metric, values in numbers.items()}
    return replace(first, numbers=means, leaves=leaves, samples=numbers)


def _leaf(samples: Sequence[LeafScores]) -> LeafScores:
    def stacked(kind: str) -> Arrays:
        held = [getattr(one, kind) for one in samples]
        return {metric: np.stack([one[metric] for one in held], 1) for metric in _in_all(held)}

    documents, contributions = stacked("documents"), stacked("contributions")
    answers = zip(*(one.answers for one in samples), strict=True)
    return replace(
        samples[0],
        numbers={m: float(np.mean([s.numbers[m] for s in samples])) for m in _in_all([s.numbers for s in samples])},
        documents={metric: table.mean(1) for metric, table in documents.items()},
        contributions={metric: table.mean(1) for metric, table in contributions.items()},
        samples=documents,
        answers=[[list(chain(*each)) for each in zip(*same, strict=True)] for same in answers],
    )


def _in_all(held: Sequence[dict[str, Any]]) -> list[str]:
    return [key for key in held[0] if all(key in one for one in held)]


def flips(ours: TaskScores, theirs: TaskScores, metric: str) -> np.ndarray | None:
    """Of sampled answers, the share of a document's samples that turned right or wrong, `[documents]`."""
    one, other = ours.sampled(metric), theirs.sampled(metric)
    return None if one is None or other is None else np.abs(one - other).mean(1)


def same_answers(ours: TaskScores, theirs: TaskScores) -> tuple[TaskScores, TaskScores]:
    """Both with a metric more, whether a document's answers are the original's to the letter; 1 for the original.

    As they are where something else than an answer is asked for, or answers are sampled, which differ by chance.
    """
    pairs = [(leaf, theirs.leaves[name]) for name, leaf in ours.leaves.items()]
    if ours.samples or not all(one.answers and other.answers for one, other in pairs):
        return ours, theirs
    same = [np.array([a == b for a, b in zip(o.answers, t.answers, strict=True)], float) for o, t in pairs]
    return _with_same(ours, same), _with_same(theirs, [np.ones(len(values)) for values in same])


def _with_same(scores: TaskScores, same: Sequence[np.ndarray]) -> TaskScores:
    leaves = {
        name: replace(leaf, numbers=leaf.numbers | {SAME: float(v.mean())}, documents=leaf.documents | {SAME: v})
        for (name, leaf), v in zip(scores.leaves.items(), same, strict=True)
    }
    return replace(scores, leaves=leaves, numbers=scores.numbers | {SAME: float(np.concatenate(same).mean())})


def as_bytes(value: Any) -> np.ndarray:
    """JSON as an array, uint8 `[bytes]`."""
    return np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)


def of_bytes(array: np.ndarray) -> Any:
    return json.loads(array.tobytes())


def below(prefix: str, arrays: Arrays) -> Arrays:
    """The arrays whose name starts with the prefix, by the rest of their name."""
    return {key.removeprefix(prefix): values for key, values in arrays.items() if key.startswith(prefix)}
