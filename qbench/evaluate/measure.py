"""A point's evaluation, whatever its protocol: read, prepare, score the baseline (once) and the model, and say it.

Both kinds of protocol, windows of a text and lm-eval's own tasks, answer the same four calls, see `Evaluation`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from qbench import __version__
from qbench.config import RuntimeConfig, TaskConfig
from qbench.evaluate import hflm, lmeval, windows
from qbench.evaluate.harness import TaskEvaluation
from qbench.evaluate.text import Pages, Text
from qbench.evaluate.windowed import Scores, WindowedEvaluation
from qbench.record.quality import EvaluationRecord, TaskRecord
from qbench.record.store import Store, identity

Source = Text | Pages | lmeval.TaskSource


class Evaluation(Protocol):
    """A protocol with its text, ready to score any model. Scores are arrays by name, per window or document."""

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def ids(self) -> np.ndarray | None:
        """Of the windows, `[windows, tokens]`; None where they are made while it is scored."""
        ...

    def score_baseline(self, model: Any) -> Scores: ...

    def score(self, model: Any, baseline: Scores | None) -> Scores: ...

    def records(
        self, scores: Scores, baseline: Scores | None, baseline_cached: bool
    ) -> tuple[list[EvaluationRecord], list[TaskRecord], dict[str, Scores]]: ...


def read(task: TaskConfig, runtime: RuntimeConfig) -> Source:
    """What the task scores, with its `sha256`; raises RequestError for a wrong task or a text that cannot be had."""
    windows.check(task, runtime)
    return lmeval.read(task) if task.protocol == "lmeval" else windows.read(task)


def check_length(source: Source, task: TaskConfig) -> None:
    """Raises RequestError, before any tokenizer is loaded, for a text that is too short whatever the tokenizer."""
    if not isinstance(source, lmeval.TaskSource):
        windows.check_length(source, task)


def prepare(source: Source, tokenizer: Any, task: TaskConfig, runtime: RuntimeConfig) -> Evaluation:
    """Raises RequestError when the text does not fit the protocol, or lm-eval cannot load a task as it is asked for."""
    if isinstance(source, lmeval.TaskSource):
        hflm.check(tokenizer, task)
        tasks = lmeval.load(source)
        hflm.check_room((leaf for loaded in tasks for leaf in loaded.leaves.values()), task.window)
        return TaskEvaluation(tasks, tokenizer, task, runtime, source.sha256)
    return WindowedEvaluation(windows.cut(source, tokenizer, task), source, task, runtime)


def baseline(
    evaluation: Evaluation, model: Any, fingerprint: str, environment: dict[str, Any], store: Store
) -> tuple[Scores, bool]:
    """The unquantized model's scores, and whether they were at hand: the same model, protocol and machine share them.

    Raises RequestError when the file kept for this model holds another one's.
    """
    where = {k: environment.get(k) for k in ("device", "dtype", "packages", "gpu", "cpu")}
    key = identity(fingerprint, evaluation.identity, where, __version__)
    about = {"model": fingerprint, "protocol": str(evaluation.identity["protocol"])}
    with store.lock(f"baseline-{key}", "the baseline"):
        scores = store.load_baseline(key, about)
        if scores is not None:
            return scores, True
        scores = evaluation.score_baseline(model)
        store.save_baseline(key, scores, about)
    return scores, False
