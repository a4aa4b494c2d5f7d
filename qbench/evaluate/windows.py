"""Windows of token ids: the settings that every protocol with windows has, and how tokens are cut and counted.

The protocols themselves, and the names that tell them apart, are in protocols/: windows.py, crops.py and pages.py.
Windows are token ids, since a slice of text would tokenize differently. Each window is fed alone, its first token is
context only, so L - 1 of its L tokens are scored. task.add_bos_token says what special tokens there are:

    null    those that the tokenizer puts before a text (a page, for crops) by itself; a window gets none of its own
    true    a BOS at the start of every window, and none in the text: L - 1 tokens of text follow, and all are scored;
            `-bos` ends the name. Models that cannot do without (Gemma) are measured so
    false   none anywhere; `-nobos` ends the name, whatever the tokenizer does by itself: one command, one name
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from qbench.errors import RequestError
from qbench.evaluate.protocol import inside
from qbench.evaluate.text import Text, TextSource

AT_THE_START = "what the tokenizer puts before the text; none per window"
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


@dataclass(frozen=True, kw_only=True)
class WindowSettings(TextSource):
    """The fields that the protocols with windows share. A protocol adds its own and `protocol_name(name)`."""

    name: str  # of the text; the first part of the protocol's name
    window: int = 2048  # tokens, a BOS included
    add_bos_token: bool | None = None
    max_windows: int | None = None  # None: every full window
    divergence: bool = True  # also compare next-token distributions with the original's
    beyond_positions: bool = False

    @property
    def text_tokens(self) -> int:
        """How many tokens of each window are text."""
        return self.window - bool(self.add_bos_token)

    @property
    def size_in_name(self) -> str:
        """`w1024-first4` when only some windows are scored, `w2048-bos`."""
        first = f"-first{self.max_windows}" if self.max_windows is not None else ""
        return f"w{self.window}{first}{self.bos_in_name}"

    @property
    def bos_in_name(self) -> str:
        return {None: "", True: "-bos", False: "-nobos"}[self.add_bos_token]

    def settings(self) -> dict[str, Any]:
        return inside(self)

    def check_windows(self) -> None:
        """Raises RequestError for shared settings that no text could satisfy."""
        if self.window < 2:
            raise RequestError(f"task.window must be at least 2 tokens, got {self.window}")
        if self.max_windows is not None and self.max_windows < 1:
            raise RequestError(f"task.max_windows must be at least 1, or null for all, got {self.max_windows}")


def cut_windows(text: Text, tokenizer: Any, task: WindowSettings, protocol: str) -> Windows:
    """One tokenization, cut from its start; raises RequestError when it does not fill the windows asked for."""
    bos = bos_id(tokenizer, task)
    ids = tokenize(tokenizer, text.content, task)
    full = full_windows(ids.size, text, task)
    count, length = task.max_windows or full, task.text_tokens
    cut = behind(bos, ids[: count * length].reshape(count, length))
    return Windows(
        ids=cut,
        protocol=protocol,
        total_tokens=int(ids.size),
        leading_special_tokens=leading_special_tokens(tokenizer, text.content, task),
        token_ids_sha256=sha256(ids if bos is None else cut),
        bos_policy=policy(task, AT_THE_START),
    )


def named(text: Text, task: WindowSettings) -> str:
    """The text's part of the protocol's name; of any file, its content is what tells two of them apart."""
    return f"text-{text.sha256[:8]}" if task.name == "text" else task.name


def full_windows(tokens: int, text: Text, task: WindowSettings, at_most: str = "") -> int:
    """How many windows the tokens fill; raises RequestError for none, or fewer than asked for."""
    full = tokens // task.text_tokens
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


def bos_id(tokenizer: Any, task: WindowSettings) -> int | None:
    """The id that every window starts with, if it was asked for; raises RequestError when there is no such token."""
    if not task.add_bos_token:
        return None
    if tokenizer.bos_token_id is None:
        raise RequestError("task.add_bos_token=true, but this model's tokenizer has no BOS token; leave it out")
    return int(tokenizer.bos_token_id)


def behind(bos: int | None, ids: np.ndarray) -> np.ndarray:
    """The rows of `ids` `[windows, tokens]` with the BOS in front of each, if there is one."""
    return ids if bos is None else np.insert(ids, 0, bos, axis=1)


def policy(task: WindowSettings, by_itself: str) -> str:
    return {None: by_itself, True: EVERY_WINDOW, False: NOWHERE}[task.add_bos_token]


def tokenize(tokenizer: Any, content: str, task: WindowSettings) -> np.ndarray:
    special = task.add_bos_token is None
    return np.asarray(tokenizer(content, add_special_tokens=special, verbose=False)["input_ids"], dtype="<i8")


def leading_special_tokens(tokenizer: Any, content: str, task: WindowSettings) -> int:
    if task.add_bos_token is not None:
        return int(task.add_bos_token)
    bare = len(tokenizer(content[:200], add_special_tokens=False, verbose=False)["input_ids"])
    return len(tokenizer(content[:200], verbose=False)["input_ids"]) - bare


def sha256(ids: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()
