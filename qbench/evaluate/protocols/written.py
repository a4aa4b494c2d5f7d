"""`task.protocol=written`, `self:chat-24x128-t1-seed0`: what the original wrote itself, scored on the answers alone.

evaluate/written.py says how it is written and kept. A prompt is context and is not scored; every answer has as many
tokens, and is what a window is elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qbench.config import RuntimeConfig
from qbench.errors import RequestError
from qbench.evaluate import written
from qbench.evaluate.limits import batch_size
from qbench.evaluate.protocol import inside
from qbench.evaluate.score import WindowAsks
from qbench.evaluate.windowed import WindowedEvaluation
from qbench.evaluate.windows import Windows
from qbench.evaluate.written import Author, Sampling, Written

BY_THE_TEMPLATE = "what the chat template puts before the prompt"
BY_THE_TOKENIZER = "what the tokenizer puts before the prompt"


@dataclass(frozen=True)
class Unwritten:
    """What is asked for, before the original is there to write it."""

    sha256: str


@dataclass(frozen=True, kw_only=True)
class SelfWritten:
    name: str = "self"
    path: str | None = None  # what the original wrote on another machine; None: outputs/texts, written where it lacks
    answers: int = 24
    tokens: int = 128  # of each answer, all of them scored
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    window: int = 512  # the longest prompt with its answer, in tokens
    divergence: bool = True
    beyond_positions: bool = False

    def settings(self) -> dict[str, Any]:
        return inside(self)

    def check(self, runtime: RuntimeConfig) -> None:
        for name, least in (("answers", 1), ("tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise RequestError(f"task.{name} must be at least {least}, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise RequestError(f"task.temperature must be above 0, 1 samples as the model says, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"task.top_p must be above 0 and at most 1, got {self.top_p}")
        if self.window <= self.tokens:
            raise RequestError(
                f"task.window={self.window} must hold a prompt and an answer of task.tokens={self.tokens} tokens"
            )

    def read(self) -> Written | Unwritten:
        if self.path is None:
            return Unwritten(hashlib.sha256("\n".join(written.prompts()).encode()).hexdigest())
        found = written.read(Path(self.path).expanduser())
        for name in ("temperature", "top_p", "seed"):
            if (told := getattr(found.sampling, name)) != getattr(self, name):
                raise RequestError(f"task.path={self.path} was written with {name}={told}; set task.{name}={told}")
        for name in ("answers", "tokens"):
            if (most := getattr(found.sampling, name)) < getattr(self, name):
                raise RequestError(
                    f"task.path={self.path} was written with {name}={most}, task.{name} asks for {getattr(self, name)}"
                )
        return found

    def write(self, source: Written | Unwritten, author: Author) -> Written:
        """What `source` stands for: as `read` found it, or kept from before, or written now."""
        if isinstance(source, Written):
            return source
        return written.kept(author, Sampling(self.answers, self.tokens, self.temperature, self.top_p, self.seed))

    def check_length(self, source: Written | Unwritten) -> None:
        if isinstance(source, Written):
            longest = max(map(len, source.prompts[: self.answers])) + self.tokens
            if longest > self.window:
                raise RequestError(
                    f"a prompt with its answer has {longest} tokens; set task.window={longest}, or task.tokens lower"
                )

    def prepare(self, source: Written, tokenizer: Any, runtime: RuntimeConfig) -> SelfEvaluation:
        return SelfEvaluation(self.cut(source), source, self, runtime)

    def cut(self, source: Written) -> Answers:
        """Rows of a prompt and its answer; the shorter ones repeat their last token."""
        prompts, answers = source.prompts[: self.answers], [a[: self.tokens] for a in source.answers[: self.answers]]
        rows = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
        longest = max(map(len, rows))
        return Answers(
            ids=np.asarray([row + row[-1:] * (longest - len(row)) for row in rows], dtype="<i8"),
            protocol=self.protocol_name(source.chat),
            total_tokens=sum(map(len, rows)),
            leading_special_tokens=0,
            token_ids_sha256=hashlib.sha256(json.dumps([prompts, answers]).encode()).hexdigest(),
            bos_policy=BY_THE_TEMPLATE if source.chat else BY_THE_TOKENIZER,
            starts=[len(prompt) for prompt in prompts],
            tokens=self.tokens,
        )

    def protocol_name(self, chat: bool) -> str:
        nucleus = "" if self.top_p == 1 else f"-p{self.top_p:g}"
        sampled = f"t{self.temperature:g}{nucleus}-seed{self.seed}"
        return f"{self.name}:{'chat' if chat else 'plain'}-{self.answers}x{self.tokens}-{sampled}"

    def scored_tokens(self, source: Written | Unwritten) -> int:
        """What goes through the model, at most."""
        return self.answers * self.window


@dataclass(frozen=True)
class Answers(Windows):
    """Each row begins with a prompt of `starts[row]` tokens; the `tokens` after it are scored."""

    starts: Sequence[int] = ()
    tokens: int = 0

    @property
    def dropped_tokens(self) -> int:
        return 0

    @property
    def scored_tokens(self) -> int:
        return len(self.ids) * self.tokens


@dataclass(frozen=True)
class SelfEvaluation(WindowedEvaluation):
    def asks(self) -> AnswerAsks:
        assert isinstance(self.windows, Answers)
        size = batch_size(self.runtime, self.runtime.device)
        return AnswerAsks(self.ids, size, self.task.divergence, self.windows.starts, self.windows.tokens)


@dataclass
class AnswerAsks(WindowAsks):
    starts: Sequence[int] = ()
    tokens: int = 0

    def scored(self, window: int) -> slice:
        return slice(self.starts[window] - 1, self.starts[window] - 1 + self.tokens)
