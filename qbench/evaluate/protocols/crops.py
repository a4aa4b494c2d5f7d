"""`task.protocol=crops`, `c4_gptq:crops256-w2048`: draws of a page longer than a window, one random crop of each.

The C4 of GPTQ's code (arXiv 2210.17323), which SINQ measures too: 256 crops of 2048 tokens, Python's random.seed(0).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from qbench.config import RuntimeConfig
from qbench.errors import RequestError
from qbench.evaluate.text import Pages, most_tokens, read_pages
from qbench.evaluate.windowed import WindowedEvaluation
from qbench.evaluate.windows import (
    Windows,
    WindowSettings,
    behind,
    bos_id,
    leading_special_tokens,
    policy,
    sha256,
    tokenize,
)

BEFORE_CROPPING = "what the tokenizer puts before a page, if the crop starts there; none per window"


@dataclass(frozen=True, kw_only=True)
class PageCrops(WindowSettings):
    """`max_windows` is the number of crops to draw."""

    def protocol_name(self, text: str) -> str:
        return f"{text}:crops{self.max_windows}-w{self.window}{self.bos_in_name}"

    def check(self, runtime: RuntimeConfig) -> None:
        self.check_windows()
        if self.max_windows is None:
            raise RequestError("task.max_windows must be set: it is the number of crops to draw, 256 in the papers")

    def read(self) -> Pages:
        return read_pages(self)

    def check_length(self, source: Pages) -> None:
        if not any(len(page) > self.text_tokens for page in source.content):  # a byte a character at the least
            self._require_page(max(map(most_tokens, source.content), default=0), source, "at most ")

    def cut(self, source: Pages, tokenizer: Any) -> Windows:
        """Draws a page until one is longer than a window, crops it at random, and so on, with Python's random.seed(0).

        The accept-or-draw-again loop depends on the tokenizer, and so do the crops. A page of exactly one window is
        drawn again; GPTQ's script stops with an error there. Raises RequestError when no page is long enough.
        """
        assert self.max_windows is not None
        draw, bos, length = random.Random(0), bos_id(tokenizer, self), self.text_tokens
        tokenized: dict[int, np.ndarray] = {}
        crops = []
        while len(crops) < self.max_windows:
            index = draw.randint(0, len(source.content) - 1)
            if index not in tokenized:
                tokenized[index] = tokenize(tokenizer, source.content[index], self)
            ids = tokenized[index]
            if ids.size > length:
                start = draw.randint(0, ids.size - length - 1)
                crops.append(ids[start : start + length])
            elif not crops and len(tokenized) == len(source.content):
                self._require_page(max(page.size for page in tokenized.values()), source)
        ids = np.stack(crops)
        return Windows(
            ids=behind(bos, ids),
            protocol=self.protocol_name(self.name),
            total_tokens=int(ids.size),
            leading_special_tokens=leading_special_tokens(tokenizer, source.content[0], self),
            token_ids_sha256=sha256(behind(bos, ids)),
            bos_policy=policy(self, BEFORE_CROPPING),
        )

    def prepare(self, source: Pages, tokenizer: Any, runtime: RuntimeConfig) -> WindowedEvaluation:
        return WindowedEvaluation(self.cut(source, tokenizer), source, self, runtime)

    def _require_page(self, longest: int, pages: Pages, at_most: str = "") -> None:
        if longest <= self.text_tokens:
            raise RequestError(
                f"no page of {pages.source} is longer than one window of {self.window} tokens, the longest has "
                f"{at_most}{longest}; use more pages or a smaller task.window"
            )
