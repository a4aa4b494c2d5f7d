"""`task.protocol=domains`, `domains:12kinds-w256-first6-long3x2048`: texts of many kinds, each cut as `windows` does.

Damage differs by kind of text: what a quantizer keeps of encyclopedic English it may lose of Japanese or of code. Every
kind is scored and recorded by itself, `domains:python-w256-first6`; the mean over kinds and the worst of them follow.
A kind whose name begins with `long` is a document of one piece, and is cut into longer windows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from qbench.config import RuntimeConfig
from qbench.errors import RequestError, unknown
from qbench.evaluate.files import read_whole
from qbench.evaluate.joined import JoinedEvaluation
from qbench.evaluate.protocols.windows import TextWindows
from qbench.evaluate.text import Text
from qbench.evaluate.windowed import WindowedEvaluation
from qbench.evaluate.windows import WindowSettings

NOT_A_KIND = "SOURCES.txt"


@dataclass(frozen=True)
class Kinds:
    """Texts by kind, in the order of their names."""

    texts: dict[str, Text]

    @property
    def content(self) -> list[str]:
        return [text.content for text in self.texts.values()]

    @property
    def sha256(self) -> str:
        each = [f"{name} {text.sha256}\n" for name, text in self.texts.items()]
        return hashlib.sha256("".join(each).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class KindWindows(TextWindows):
    """One kind: its text is cut as any, and its protocol goes by the name of the task and the kind."""

    def protocol_name(self, text: str) -> str:
        return f"{text}-{self.size_in_name}"


@dataclass(frozen=True, kw_only=True)
class Domains(WindowSettings):
    """`path` is a folder of texts in place of the embedded ones: a kind for each `NAME.txt`."""

    name: str = "domains"
    kinds: list[str] | None = None  # None: all there are
    short_window: int = 256  # tokens of a window, but of the long document
    max_windows: int | None = 6  # of each kind but the long document
    window: int = 2048  # tokens of a piece of the long document
    pieces: int | None = 3  # of the long document; None: all of them

    def settings(self) -> dict[str, Any]:
        """Without `kinds`, which the hash of the texts and the protocols' names hold."""
        return {key: value for key, value in super().settings().items() if key != "kinds"}

    def check(self, runtime: RuntimeConfig) -> None:
        self.check_windows()
        if not 2 <= self.short_window <= self.window:
            raise RequestError(
                f"task.short_window must be 2 to task.window={self.window} tokens, got {self.short_window}"
            )
        if self.pieces is not None and self.pieces < 1:
            raise RequestError(f"task.pieces must be at least 1, or null for all, got {self.pieces}")
        if self.kinds is not None and (not self.kinds or len(set(self.kinds)) < len(self.kinds)):
            raise RequestError(f"task.kinds must name kinds of text, each once, or be null for all, got {self.kinds}")

    def read(self) -> Kinds:
        """Raises RequestError, listing the kinds that there are, for one that is not."""
        if self.path is None:
            files = {file.name: file for file in resources.files("qbench.texts.domains").iterdir()}
        else:
            folder = Path(self.path).expanduser()
            if not folder.is_dir():
                raise RequestError(f"task.path={folder} is not a folder; it holds texts, NAME.txt for each kind")
            files = {file.name: file for file in folder.iterdir()}
        there = sorted(name.removesuffix(".txt") for name in files if name.endswith(".txt") and name != NOT_A_KIND)
        if not there:
            raise RequestError(f"task.path={self.path} holds no text; it must hold NAME.txt for each kind")
        for kind in self.kinds or ():
            if kind not in there:
                raise unknown("kind of text", kind, there)
        texts = {}
        for kind in there if self.kinds is None else sorted(self.kinds):
            file = files[f"{kind}.txt"]
            if self.path is None:
                texts[kind] = Text(file.read_bytes().decode("utf-8"), f"qbench.texts.domains/{kind}.txt")
            else:
                content = read_whole(Path(str(file)), "task.path")
                if not isinstance(content, str):
                    raise RequestError(f"task.path={self.path}: {file.name} is not plain text")
                texts[kind] = Text(content, file.name)
        return Kinds(texts)

    def check_length(self, source: Kinds) -> None:
        for kind, text in source.texts.items():
            self.of(kind).check_length(text)

    def prepare(self, source: Kinds, tokenizer: Any, runtime: RuntimeConfig) -> JoinedEvaluation:
        parts = {}
        for kind, text in source.texts.items():
            settings = self.of(kind)
            parts[kind] = WindowedEvaluation(settings.cut(text, tokenizer), text, settings, runtime)
        return JoinedEvaluation(
            parts, self.protocol_name(source), self.name, max(p.ids.shape[1] for p in parts.values())
        )

    def of(self, kind: str) -> KindWindows:
        """How one kind is cut."""
        long = _long(kind)
        return KindWindows(
            name=f"{self.name}:{kind}",
            window=self.window if long else self.short_window,
            max_windows=self.pieces if long else self.max_windows,
            add_bos_token=self.add_bos_token,
            divergence=self.divergence,
            beyond_positions=self.beyond_positions,
        )

    def protocol_name(self, source: Kinds) -> str:
        short = replace(self.of(""), add_bos_token=None).size_in_name
        sizes = [] if all(map(_long, source.texts)) else [short]
        if any(map(_long, source.texts)):
            sizes.append(f"long{'' if self.pieces is None else f'{self.pieces}x'}{self.window}")
        return f"{self.name}:{len(source.texts)}kinds-{'-'.join(sizes)}{self.bos_in_name}"

    def scored_tokens(self, source: Kinds) -> int | None:
        """About how many, whatever the tokenizer; None where that depends on it."""
        counts = [(self.of(kind).window, self.of(kind).max_windows) for kind in source.texts]
        return None if any(n is None for _, n in counts) else sum(w * n for w, n in counts if n is not None)


def _long(kind: str) -> bool:
    return kind.startswith("long")
