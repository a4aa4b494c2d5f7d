"""Windows of token ids, cut as the papers cut them. A protocol's name says how, so that no two share a column.

| task.protocol | name | how |
|---|---|---|
| windows | `wikitext2:gptq-w2048` | the text is tokenized once and cut; the tail is dropped (GPTQ, AWQ, SINQ) |
| crops | `c4_gptq:crops256-w2048` | 256 draws of a page longer than a window, one random crop of each (GPTQ, SINQ) |
| pages | `c4_new:pages1100-w2048-first256` | the first 1100 pages joined by a space, then as windows (GPTQ, c4-new) |

Windows are token ids, since a slice of text would tokenize differently. Each window is fed alone, its first token is
context only, so L - 1 of its L tokens are scored. task.add_bos_token says what special tokens there are:

    null    those that the tokenizer puts before a text (a page, for crops) by itself; a window gets none of its own
    true    a BOS at the start of every window, and none in the text: L - 1 tokens of text follow, and all are scored;
            `-bos` ends the name. Models that cannot do without (Gemma) are measured so
    false   none anywhere; `-nobos` ends the name, whatever the tokenizer does by itself: one command, one name
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
EVERY_WINDOW = "BOS at the start of every window"
NOWHERE = "none"


@dataclass(frozen=True)
class Windows:
    """Token ids cut by the protocol; `ids` is int64 `[windows, window_tokens]`, a BOS of each window included."""

    ids: np.ndarray
    protocol: str
    total_tokens: int  # of the text
    leading_special_tokens: int  # before the text; before every window where each has a BOS
    token_ids_sha256: str  # of all ids of the text (of those of the windows, if each has a BOS), little-endian int64
    bos_policy: str = AT_THE_START

    @property
    def dropped_tokens(self) -> int:
        of_text = self.ids.size - (len(self.ids) if self.bos_policy == EVERY_WINDOW else 0)
        return self.total_tokens - of_text

    @property
    def scored_tokens(self) -> int:
        return self.ids.shape[0] * (self.ids.shape[1] - 1)


def protocol_name(task: TaskConfig) -> str:
    """`wikitext2:gptq-w2048`, or `wikitext2:gptq-w1024-first4` when only some windows are scored."""
    bos = {None: "", True: "-bos", False: "-nobos"}[task.add_bos_token]
    if task.protocol == "crops":
        return f"{task.name}:crops{task.max_windows}-w{task.window}{bos}"
    how = "gptq" if task.protocol == "windows" else f"pages{task.pages}"
    first = f"-first{task.max_windows}" if task.max_windows is not None else ""
    return f"{task.name}:{how}-w{task.window}{first}{bos}"


def text_tokens(task: TaskConfig) -> int:
    """How many tokens of each window are text."""
    return task.window - bool(task.add_bos_token)


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
        if not any(len(page) > text_tokens(task) for page in data.content):  # a byte a character at the least
            _require_page(max(map(most_tokens, data.content), default=0), data, task, "at most ")
        return
    text = _joined(data, task)
    if len(text.content) < text_tokens(task) * (task.max_windows or 1):
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
    bos = _bos(tokenizer, task)
    ids = _tokenize(tokenizer, text.content, task)
    full = _full_windows(ids.size, text, task)
    count, length = task.max_windows or full, text_tokens(task)
    if task.name == "text":  # any file: its content is what tells two of them apart
        task = replace(task, name=f"text-{text.sha256[:8]}")
    cut = _behind(bos, ids[: count * length].reshape(count, length))
    return Windows(
        ids=cut,
        protocol=protocol_name(task),
        total_tokens=int(ids.size),
        leading_special_tokens=_leading_special_tokens(tokenizer, text.content, task),
        token_ids_sha256=_sha256(ids if bos is None else cut),
        bos_policy=_policy(task, AT_THE_START),
    )


def _full_windows(tokens: int, text: Text, task: TaskConfig, at_most: str = "") -> int:
    """How many windows the tokens fill; raises RequestError for none, or fewer than asked for."""
    full = tokens // text_tokens(task)
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
    draw, bos, length = random.Random(0), _bos(tokenizer, task), text_tokens(task)
    tokenized: dict[int, np.ndarray] = {}
    crops = []
    while len(crops) < task.max_windows:
        index = draw.randint(0, len(pages.content) - 1)
        if index not in tokenized:
            tokenized[index] = _tokenize(tokenizer, pages.content[index], task)
        ids = tokenized[index]
        if ids.size > length:
            start = draw.randint(0, ids.size - length - 1)
            crops.append(ids[start : start + length])
        elif not crops and len(tokenized) == len(pages.content):
            _require_page(max(page.size for page in tokenized.values()), pages, task)
    ids = np.stack(crops)
    return Windows(
        ids=_behind(bos, ids),
        protocol=protocol_name(task),
        total_tokens=int(ids.size),
        leading_special_tokens=_leading_special_tokens(tokenizer, pages.content[0], task),
        token_ids_sha256=_sha256(_behind(bos, ids)),
        bos_policy=_policy(task, BEFORE_CROPPING),
    )


def _require_page(longest: int, pages: Pages, task: TaskConfig, at_most: str = "") -> None:
    if longest <= text_tokens(task):
        raise RequestError(
            f"no page of {pages.source} is longer than one window of {task.window} tokens, the longest has "
            f"{at_most}{longest}; use more pages or a smaller task.window"
        )


def _bos(tokenizer: Any, task: TaskConfig) -> int | None:
    """The id that every window starts with, if it was asked for; raises RequestError when there is no such token."""
    if not task.add_bos_token:
        return None
    if tokenizer.bos_token_id is None:
        raise RequestError("task.add_bos_token=true, but this model's tokenizer has no BOS token; leave it out")
    return int(tokenizer.bos_token_id)


def _behind(bos: int | None, ids: np.ndarray) -> np.ndarray:
    """The rows of `ids` `[windows, tokens]` with the BOS in front of each, if there is one."""
    return ids if bos is None else np.insert(ids, 0, bos, axis=1)


def _policy(task: TaskConfig, by_itself: str) -> str:
    return {None: by_itself, True: EVERY_WINDOW, False: NOWHERE}[task.add_bos_token]


def _tokenize(tokenizer: Any, content: str, task: TaskConfig) -> np.ndarray:
    special = task.add_bos_token is None
    return np.asarray(tokenizer(content, add_special_tokens=special, verbose=False)["input_ids"], dtype="<i8")


def _leading_special_tokens(tokenizer: Any, content: str, task: TaskConfig) -> int:
    if task.add_bos_token is not None:
        return int(task.add_bos_token)
    bare = len(tokenizer(content[:200], add_special_tokens=False, verbose=False)["input_ids"])
    return len(tokenizer(content[:200], verbose=False)["input_ids"]) - bare


def _sha256(ids: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()
