"""What lm-eval's tasks gave for one model: the numbers, and what each document adds to them.

As arrays by name, which is how a reference is kept, `TASK` being what was asked for and `LEAF` one of its tasks:
`TASK|number|METRIC` `[1]`; `TASK|LEAF|number|METRIC` `[1]`; `TASK|LEAF|documents|METRIC` `[documents]`, the documents'
own values, or `TASK|LEAF|contributions|METRIC`; for rolling tasks `TASK|LEAF|log_likelihood` and `TASK|LEAF|tokens`
`[documents]`; `TASK|LEAF|size` and `TASK|truncated_prompts` `[1]`; `TASK|prompts` and `TASK|token ids`, sha256 `[32]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from qbench.intervals import pooled_contributions

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class LeafScores:
    """One task of lm-eval; metrics are `METRIC,FILTER`."""

    size: int  # documents
    numbers: dict[str, float]  # lm-eval's own
    documents: Arrays = field(default_factory=dict)  # the values of which a number is the mean, `[documents]`
    contributions: Arrays = field(default_factory=dict)  # to the numbers that are no means, `[documents]` or blocks
    log_likelihood: np.ndarray | None = None  # nats of each document, of a rolling task
    tokens: np.ndarray | None = None  # of each document, of a rolling task

    def adds(self, metric: str) -> np.ndarray | None:
        """What each document adds to the number; None where that is not known."""
        found = self.documents.get(metric)
        return self.contributions.get(metric) if found is None else found

    def arrays(self) -> Arrays:
        found = {f"number|{metric}": np.array([value]) for metric, value in self.numbers.items()}
        found |= {f"documents|{metric}": values for metric, values in self.documents.items()}
        found |= {f"contributions|{metric}": values for metric, values in self.contributions.items()}
        found["size"] = np.array([self.size])
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
        )


@dataclass(frozen=True)
class TaskScores:
    """One requested task or group."""

    numbers: dict[str, float]  # lm-eval's own; of a group, what it makes of its tasks'
    leaves: dict[str, LeafScores]
    prompts: np.ndarray  # sha256 of every document, prompt and target
    token_ids: np.ndarray  # sha256, of rolling tasks
    truncated_prompts: int  # documents with a prompt that lost its beginning to the window

    @property
    def documents(self) -> int:
        return sum(leaf.size for leaf in self.leaves.values())

    def arrays(self, name: str) -> Arrays:
        found = {f"{name}|number|{metric}": np.array([value]) for metric, value in self.numbers.items()}
        for leaf, scores in self.leaves.items():
            found |= {f"{name}|{leaf}|{key}": values for key, values in scores.arrays().items()}
        found |= {f"{name}|prompts": self.prompts, f"{name}|token ids": self.token_ids}
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
        parts = [leaf.documents.get(metric) for leaf in self.leaves.values() if metric in leaf.numbers]
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts):
            return None
        values = np.concatenate(known)
        return values if np.isin(values, (0, 1)).all() else None


def below(prefix: str, arrays: Arrays) -> Arrays:
    """The arrays whose name starts with the prefix, by the rest of their name."""
    return {key.removeprefix(prefix): values for key, values in arrays.items() if key.startswith(prefix)}
