"""What a protocol is: the rules by which a model is scored, named, with the settings that `task=` chooses.

A protocol is a frozen dataclass whose fields are the keys below `task` (but for `task.protocol`, its registered name).
The walk of a point through it, each step before anything that takes longer:

    check(runtime)       settings that no text could satisfy
    read()               the text, whose sha256 becomes part of the point's identity
    write(source, ...)   only of a protocol whose text the original makes: that text, as written.py keeps it
    check_length(source) a text that is too short, whatever the tokenizer
    prepare(...)         an Evaluation: what is scored, tokenized where that is done beforehand

A protocol of several texts, or of rows of several lengths, says `scored_tokens(source)`, about how many tokens go
through the model, None where the text decides; estimates ask for it.

The built-in ones are in protocols/, one a file. A third party's is registered under `qbench.protocols`, brings
`task/NAME.yaml`, and is tested by qbench.testing.protocols. What it finds, it records as perplexities
(EvaluationRecord) or as numbers of any other kind (TaskRecord with one MetricRecord each, which says how the number
is read off what its documents add).
"""

from __future__ import annotations

import typing
from dataclasses import asdict
from typing import Any

import numpy as np

from qbench.config import RuntimeConfig
from qbench.evaluate.asks import Asks
from qbench.record.identity import PERMISSIONS, SOURCE_OF_TEXT
from qbench.record.quality import EvaluationRecord, TaskRecord

# arrays by name, the first axis of each that of windows or documents; kept as a safetensors file
Scores = dict[str, np.ndarray]


class Corpus(typing.Protocol):
    """What a protocol reads; a text, pages, documents."""

    @property
    def sha256(self) -> str: ...


class Evaluation(typing.Protocol):
    """A protocol with its text, ready to score any model."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the original's scores depend on, the model aside; under `protocol` the name that records carry."""
        ...

    @property
    def ids(self) -> np.ndarray | None:
        """Of the windows, `[windows, tokens]`; None where they are made while it is scored."""
        ...

    def asks(self) -> Asks | None:
        """What a pass over the model's blocks answers; None where the whole model must be there (generation).

        The two methods below are for a model that is no chain of blocks, or that must be there for another reason.
        """
        ...

    def score_baseline(self, model: Any) -> Scores:
        """The original's scores, which are kept and handed to `score` and `records` of every variant."""
        ...

    def score(self, model: Any, baseline: Scores | None) -> Scores:
        """A variant's scores; `baseline` is None where no original is at hand. Raises PointError for NaN or Inf."""
        ...

    def records(
        self, scores: Scores, baseline: Scores | None, baseline_cached: bool
    ) -> tuple[list[EvaluationRecord], list[TaskRecord], dict[str, Scores]]:
        """What the scores say, and the arrays to keep beside the result, by file name (`windowed.name_of`)."""
        ...


class Protocol(typing.Protocol):
    """The settings of a task and what is done with them."""

    window: int  # the longest sequence that the model is handed, in tokens
    beyond_positions: bool  # which may be longer than a model with rotary positions was made for

    def settings(self) -> dict[str, Any]:
        """What can change a number, by the fields' names, the text's content aside; see `inside`."""
        ...

    def check(self, runtime: RuntimeConfig) -> None:
        """Raises RequestError, one sentence, for settings that no text could satisfy."""
        ...

    def read(self) -> Corpus:
        """Raises RequestError, naming what would work, when the text cannot be had."""
        ...

    def check_length(self, source: Any) -> None:
        """Raises RequestError, before any tokenizer is loaded, for a text too short whatever the tokenizer."""
        ...

    def prepare(self, source: Any, tokenizer: Any, runtime: RuntimeConfig) -> Evaluation:
        """Raises RequestError when the text does not fit the settings."""
        ...


def inside(protocol: Any) -> dict[str, Any]:
    """The fields that can change a number: all but where the text is read from and what is merely allowed."""
    return {k: v for k, v in asdict(protocol).items() if k not in (*SOURCE_OF_TEXT, *PERMISSIONS)}
