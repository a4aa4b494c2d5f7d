"""Windows of token ids, cut as the papers cut them. A protocol's name says how, so that no two share a column.

| task.protocol | name | how |
|---|---|---|
| windows | `wikitext2:gptq-w2048` | the text is tokenized once and cut; the tail is dropped (GPTQ, AWQ, SINQ) |
| crops | `c4_gptq:crops256-w2048` | 256 draws of a page longer than a window, one random crop of each (GPTQ, SINQ) |
| pages | `c4_new:pages1100-w2048-first256` | the first 1100 pages joined by a space, then as windows (GPTQ, c4-new) |

Windows are token ids, since a slice of text would tokenize differently. Special tokens are those that the tokenizer
puts before a text (a page, for crops) by itself; a window gets none of its own. Each window is fed alone, its first
token is context only, so L - 1 of its L tokens are scored.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qbench.config import RuntimeConfig, TaskConfig
from qbench.errors import RequestError, unknown
from qbench.evaluate.text import Pages, Text, most_tokens, read_pages, read_text

PROTOCOLS = ("windows", "crops", "pages", "lmeval")
AT_THE_START = "what the tokenizer puts before the text; none per window"
BEFORE_CROPPING = "what the tokenizer puts before a page, if the crop starts there; none per window"


@dataclass(frozen=True)
class Windows:
    """Token ids cut by the protocol; `ids` is int64 `[windows, window_tokens]`."""

    ids: np.ndarray
    protocol: str
    total_tokens: int
    leading_special_tokens: int
    token_ids_sha256: str  # of all ids of the text, as little-endian int64
    bos_policy: str = AT_THE_START

    @property
    def dropped_tokens(self) -> int:
        return self.total_tokens - self.ids.size

    @property
    def scored_tokens(self) -> int:
        return self.ids.shape[0] * (self.ids.shape[1] - 1)


def protocol_name(task: TaskConfig) -> str:
    """`wikitext2:gptq-w2048`, or `wikitext2:gptq-w1024-first4` when only some windows are scored."""
    if task.protocol == "crops":
        return f"{task.name}:crops{task.max_windows}-w{task.window}"
    how = "gptq" if task.protocol == "windows" else f"pages{task.pages}"
    first = f"-first{task.max_windows}" if task.max_windows is not None else ""
    return f"{task.name}:{how}-w{task.window}{first}"


def check(task: TaskConfig, runtime: RuntimeConfig) -> None:
    """Raises RequestError for settings that no text could satisfy."""
    if task.protocol not in PROTOCOLS:
        raise unknown("task.protocol", task.protocol, PROTOCOLS)
    if runtime.batch_size < 1:
        raise RequestError(f"runtime.batch_size must be at least 1, got {runtime.batch_size}")
    if task.window < 2:
        raise RequestError(f"task.window must be at least 2 tokens, got {task.window}")
    if task.max_windows is not None and task.max_windows < 1:
        raise RequestError(f"task.max_windows must be at least 1, or null for all, got {task.max_windows}")
    if task.protocol != "lmeval" and (task.names or task.limit is not None or task.num_fewshot is not None):
        raise RequestError("task.names, task.limit and task.num_fewshot are for task=lmeval; use task.max_windows")
    if task.protocol == "crops" and task.max_windows is None:
        raise RequestError("task.max_windows must be set: it is the number of crops to draw, 256 in the papers")
    if task.protocol == "pages" and (task.pages is None or task.pages < 1):
        raise RequestError(f"task.pages must be at least 1, 1100 in the papers, got {task.pages}")
    if task.divergence and task.divergence_topk < 1:
        raise RequestError(
            f"task.divergence_topk must be at least 1, got {task.divergence_topk}; task.divergence=false turns it off"
        )


def read(task: TaskConfig) -> Text | Pages:
    """What the task's windows are cut from; raises RequestError when it cannot be had."""
    return read_text(task) if task.protocol == "windows" else read_pages(task)


def cut(data: Text | Pages, tokenizer: Any, task: TaskConfig) -> Windows:
    """Tokenizes and cuts; raises RequestError when the text does not fill the windows that the protocol's name says."""
    if isinstance(data, Pages) and task.protocol == "crops":
        return crop_pages(data, tokenizer, task)
    return cut_windows(_joined(data, task), tokenizer, task)


def check_length(data: Text | Pages, task: TaskConfig) -> None:
    """Raises RequestError, before any tokenizer is loaded, for a text that is too short whatever the tokenizer."""
    if isinstance(data, Pages) and task.protocol == "crops":
        if not any(len(page) > task.window for page in data.content):  # a byte a character at the least
            _require_page(max(map(most_tokens, data.content), default=0), data, task, "at most ")
        return
    text = _joined(data, task)
    if len(text.content) < task.window * (task.max_windows or 1):
        _full_windows(most_tokens(text.content), text, task, "at most ")


def _joined(data: Text | Pages, task: TaskConfig) -> Text:
    """The text that is cut into windows; raises RequestError when there are not the pages that it is joined of."""
    if isinstance(data, Text):
        return data
    assert task.pages is not None
    if len(data.content) < task.pages:
        raise RequestError(
            f"{data.source} holds {len(data.content)} pages, the protocol joins the first {task.pages}; "
            f"use all of the shard, or set task.pages={len(data.content)}, which becomes part of the protocol's name"
        )
    return Text(" ".join(data.content[: task.pages]), data.source, data.revision)


def cut_windows(text: Text, tokenizer: Any, task: TaskConfig) -> Windows:
    """One tokenization, cut from its start; raises RequestError when it does not fill the windows asked for."""
    ids = _tokenize(tokenizer, text.content)
    full = _full_windows(ids.size, text, task)
    count = task.max_windows or full
    if task.name == "text":  # any file: its content is what tells two of them apart
        task = replace(task, name=f"text-{text.sha256[:8]}")
    return Windows(
        ids=ids[: count * task.window].reshape(count, task.window),
        protocol=protocol_name(task),
        total_tokens=int(ids.size),
        leading_special_tokens=_leading_special_tokens(tokenizer, text.content),
        token_ids_sha256=_sha256(ids),
    )


def _full_windows(tokens: int, text: Text, task: TaskConfig, at_most: str = "") -> int:
    """How many windows the tokens fill; raises RequestError for none, or fewer than asked for."""
    full = tokens // task.window
    if full == 0:
        raise RequestError(
            f"the text {text.source} has {at_most}{tokens} tokens, less than one window of {task.window}; "
            "use a longer text or a smaller task.window"
        )
    if task.max_windows is not None and full < task.max_windows:
        raise RequestError(
            f"the text {text.source} has {at_most}{full} windows of {task.window} tokens, task.max_windows asks for "
            f"{task.max_windows}; set task.max_windows={'' if at_most else f'{full}, or '}null for all"
        )
    return full


def crop_pages(pages: Pages, tokenizer: Any, task: TaskConfig) -> Windows:
    """Draws a page until one is longer than a window, crops it at random, and so on, with Python's random.seed(0).

    The accept-or-draw-again loop depends on the tokenizer, and so do the crops. A page of exactly one window is drawn
    again; GPTQ's script stops with an error there. Raises RequestError when no page is long enough.
    """
    assert task.max_windows is not None
    draw = random.Random(0)
    tokenized: dict[int, np.ndarray] = {}
    crops = []
    while len(crops) < task.max_windows:
        index = draw.randint(0, len(pages.content) - 1)
        if index not in tokenized:
            tokenized[index] = _tokenize(tokenizer, pages.content[index])
        ids = tokenized[index]
        if ids.size > task.window:
            start = draw.randint(0, ids.size - task.window - 1)
            crops.append(ids[start : start + task.window])
        elif not crops and len(tokenized) == len(pages.content):
            _require_page(max(page.size for page in tokenized.values()), pages, task)
    ids = np.stack(crops)
    return Windows(
        ids=ids,
        protocol=protocol_name(task),
        total_tokens=int(ids.size),
        leading_special_tokens=_leading_special_tokens(tokenizer, pages.content[0]),
        token_ids_sha256=_sha256(ids),
        bos_policy=BEFORE_CROPPING,
    )


def _require_page(longest: int, pages: Pages, task: TaskConfig, at_most: str = "") -> None:
    if longest <= task.window:
        raise RequestError(
            f"no page of {pages.source} is longer than one window of {task.window} tokens, the longest has "
            f"{at_most}{longest}; use more pages or a smaller task.window"
        )


def _tokenize(tokenizer: Any, content: str) -> np.ndarray:
    return np.asarray(tokenizer(content, verbose=False)["input_ids"], dtype="<i8")


def _leading_special_tokens(tokenizer: Any, content: str) -> int:
    bare = len(tokenizer(content[:200], add_special_tokens=False, verbose=False)["input_ids"])
    return len(tokenizer(content[:200], verbose=False)["input_ids"]) - bare


def _sha256(ids: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()
