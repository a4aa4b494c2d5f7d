"""`task.protocol=pages`, `c4_new:pages1100-w2048-first256`: the first pages joined by a space, then as windows.

The newer C4 of GPTQ's code (arXiv 2210.17323), there called c4-new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qbench.config import RuntimeConfig
from qbench.errors import RequestError
from qbench.evaluate.text import Pages, Text, most_tokens, read_pages
from qbench.evaluate.windowed import WindowedEvaluation
from qbench.evaluate.windows import Windows, WindowSettings, cut_windows, full_windows, named


@dataclass(frozen=True, kw_only=True)
class JoinedPages(WindowSettings):
    pages: int | None = None  # to join, from the start of the shard

    def protocol_name(self, text: str) -> str:
        return f"{text}:pages{self.pages}-{self.size_in_name}"

    def check(self, runtime: RuntimeConfig) -> None:
        self.check_windows()
        if self.pages is None or self.pages < 1:
            raise RequestError(f"task.pages must be at least 1, 1100 in the papers, got {self.pages}")

    def read(self) -> Pages:
        return read_pages(self)

    def check_length(self, source: Pages) -> None:
        text = self.joined(source)
        if len(text.content) < self.text_tokens * (self.max_windows or 1):
            full_windows(most_tokens(text.content), text, self, "at most ")

    def joined(self, source: Pages) -> Text:
        """The text that is cut; raises RequestError when there are not the pages that it is joined of."""
        assert self.pages is not None
        if len(source.content) < self.pages:
            raise RequestError(
                f"{source.source} holds {len(source.content)} pages, the protocol joins the first {self.pages}; "
                f"use all of the shard, or set task.pages={len(source.content)}, which becomes part of the protocol's "
                "name"
            )
        return Text(" ".join(source.content[: self.pages]), source.source, source.revision)

    def cut(self, source: Pages, tokenizer: Any) -> Windows:
        """Raises RequestError when the text does not fill the windows that the protocol's name says."""
        text = self.joined(source)
        return cut_windows(text, tokenizer, self, self.protocol_name(named(text, self)))

    def prepare(self, source: Pages, tokenizer: Any, runtime: RuntimeConfig) -> WindowedEvaluation:
        return WindowedEvaluation(self.cut(source, tokenizer), source, self, runtime)
