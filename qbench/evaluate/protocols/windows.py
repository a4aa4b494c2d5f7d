"""`task.protocol=windows`, `wikitext2:gptq-w2048`: the text is tokenized once and cut; the tail is dropped.

So measure GPTQ (arXiv 2210.17323), AWQ and SINQ on WikiText-2. `wikitext2:gptq-w1024-first4` scores the first four
windows alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qbench.config import RuntimeConfig
from qbench.evaluate.text import Text, most_tokens, read_text
from qbench.evaluate.windowed import WindowedEvaluation
from qbench.evaluate.windows import Windows, WindowSettings, cut_windows, full_windows, named


@dataclass(frozen=True, kw_only=True)
class TextWindows(WindowSettings):
    separator: str | None = None  # between the rows of a dataset; None: an empty line, and a file is taken as it is

    def protocol_name(self, text: str) -> str:
        return f"{text}:gptq-{self.size_in_name}"

    def check(self, runtime: RuntimeConfig) -> None:
        self.check_windows()

    def read(self) -> Text:
        return read_text(self, self.name, self.separator)

    def check_length(self, source: Text) -> None:
        if len(source.content) < self.text_tokens * (self.max_windows or 1):  # a byte a character at the least
            full_windows(most_tokens(source.content), source, self, "at most ")

    def cut(self, source: Text, tokenizer: Any) -> Windows:
        """Raises RequestError when the text does not fill the windows that the protocol's name says."""
        return cut_windows(source, tokenizer, self, self.protocol_name(named(source, self)))

    def prepare(self, source: Text, tokenizer: Any, runtime: RuntimeConfig) -> WindowedEvaluation:
        return WindowedEvaluation(self.cut(source, tokenizer), source, self, runtime)
