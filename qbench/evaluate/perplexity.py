"""Windowed perplexity: the protocol of the GPTQ, AWQ and SINQ papers, through lm-evaluation-harness' model layer.

The text is tokenized once, with whatever special tokens the tokenizer itself puts at the very start, and cut into
windows of L tokens; the tail is dropped. Each window is fed alone, without a prefix. Its first token is context
only, so L - 1 tokens are scored, and the perplexity is exp of the mean NLL over all scored tokens.

Windows are cut as token ids (a slice of text would tokenize differently) and scored by HFLM's
`_loglikelihood_tokens`, with the log-softmax in fp32: in 16 bit its rounding alone moves a perplexity by up to 0.1 %.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from qbench.config import RuntimeConfig, TaskConfig
from qbench.errors import PointError, RequestError
from qbench.evaluate.text import Text


@dataclass(frozen=True)
class Windows:
    """Token ids cut by the protocol; `ids` is int64 `[windows, window_tokens]`."""

    ids: np.ndarray
    protocol: str
    total_tokens: int
    leading_special_tokens: int
    token_ids_sha256: str  # of all ids of the text, as little-endian int64

    @property
    def dropped_tokens(self) -> int:
        return self.total_tokens - self.ids.size

    @property
    def scored_tokens(self) -> int:
        return self.ids.shape[0] * (self.ids.shape[1] - 1)


def protocol_name(task: TaskConfig) -> str:
    """`wikitext2:gptq-w2048`, or `wikitext2:gptq-w1024-first4` when only some windows are scored."""
    first = f"-first{task.max_windows}" if task.max_windows is not None else ""
    return f"{task.name}:gptq-w{task.window}{first}"


def check(task: TaskConfig, runtime: RuntimeConfig) -> None:
    """Raises RequestError for settings that no text could satisfy."""
    if task.protocol != "windows":
        raise RequestError(f"unknown task.protocol '{task.protocol}'; choose from: windows")
    if runtime.batch_size < 1:
        raise RequestError(f"runtime.batch_size must be at least 1, got {runtime.batch_size}")
    if task.window < 2:
        raise RequestError(f"task.window must be at least 2 tokens, got {task.window}")
    if task.max_windows is not None and task.max_windows < 1:
        raise RequestError(f"task.max_windows must be at least 1, or null for all, got {task.max_windows}")


def cut_windows(text: Text, tokenizer: Any, task: TaskConfig) -> Windows:
    """Tokenizes and cuts; raises RequestError when the text does not fill one window."""
    ids = np.asarray(tokenizer(text.content, verbose=False)["input_ids"], dtype="<i8")
    full = ids.size // task.window
    if full == 0:
        raise RequestError(
            f"the text {text.source} has {ids.size} tokens, less than one window of {task.window}; "
            "use a longer text or a smaller task.window"
        )
    count = min(full, task.max_windows or full)
    bare = len(tokenizer(text.content[:200], add_special_tokens=False, verbose=False)["input_ids"])
    special = len(tokenizer(text.content[:200], verbose=False)["input_ids"]) - bare
    return Windows(
        ids=ids[: count * task.window].reshape(count, task.window),
        protocol=protocol_name(task),
        total_tokens=int(ids.size),
        leading_special_tokens=special,
        token_ids_sha256=hashlib.sha256(ids.tobytes()).hexdigest(),
    )


class WindowScorer:
    """Scores windows with a live model, which may be quantized in place between two calls."""

    def __init__(
        self, model: Any, tokenizer: Any, window_tokens: int, batch_size: int, softmax_dtype: str = "float32"
    ) -> None:
        import logging

        # HFLM warns about each argument that a live model makes irrelevant
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from lm_eval.models.huggingface import HFLM

        self.batch_size = batch_size
        self.lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=window_tokens,
            softmax_dtype=softmax_dtype,
            add_bos_token=False,
            device=str(model.device),
        )

    def window_nll(self, windows: Windows, label: str) -> np.ndarray:
        """Mean NLL per scored token of each window, in nats, fp64 `[windows]`.

        Raises PointError, naming the first window, if the model returns NaN or Inf.
        """
        losses: list[float] = []
        with tqdm(total=len(windows.ids), desc=label, unit="window") as progress:
            for start in range(0, len(windows.ids), self.batch_size):
                batch = windows.ids[start : start + self.batch_size].tolist()
                requests = [(("", ""), ids[:1], ids[1:]) for ids in batch]
                with torch.inference_mode():
                    scored = self.lm._loglikelihood_tokens(requests, disable_tqdm=True)
                for offset, (loglikelihood, _) in enumerate(scored):
                    if not np.isfinite(loglikelihood):
                        raise PointError(f"{label}: the model gives NaN or Inf in window {start + offset}")
                    losses.append(-float(loglikelihood) / (windows.ids.shape[1] - 1))
                progress.update(len(batch))
        return np.asarray(losses, dtype=np.float64)
