"""What windows ask of a pass, and what is read off a window's logits: NLLs, and the divergence from the original.

A forward pass gives logits `[tokens, vocabulary]` in the model's dtype; in 16 bit their log-softmax alone would move
a perplexity by up to 0.1 %. So they are widened to fp32, CHUNK_BYTES at a time: beside the logits of both models there
are four chunks at most. A GPU reads them as they are, in one kernel (kernels/divergence.py).

Scoring equals HFLM's `_loglikelihood_tokens` with the first token as context (tests/evaluate/test_score.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qbench.errors import PointError
from qbench.evaluate.asks import Scores
from qbench.evaluate.divergence import divergences, log_probabilities, masked_divergences
from qbench.quant import gpu

CHUNK_BYTES = 32 * 2**20

COMPARED = ("kl", "kl_reverse", "agrees", "squared_change", "confidence")  # what a reader adds beside the original


def row_chunks(logits: Tensor) -> Iterator[slice]:
    """Rows of logits `[tokens, vocabulary]` that are widened together."""
    itemsize = torch.promote_types(logits.dtype, torch.float32).itemsize
    step = max(1, CHUNK_BYTES // (itemsize * logits.shape[-1]))
    return (slice(first, first + step) for first in range(0, len(logits), step))


class NonFiniteError(PointError):
    """A model's logits hold NaN or Inf; the sentence names window and token."""

    def __init__(self, window: int, token: int) -> None:
        super().__init__(f"the model gives NaN or Inf in window {window} from token {token}")
        self.window = window


@dataclass
class WindowAsks:
    """Windows `[windows, tokens]`, each token but the first of each to be scored, or those that `scored` says."""

    ids: np.ndarray
    batch_size: int  # windows
    compares: bool
    _original: weakref.ref[Tensor] | None = field(default=None, init=False)  # logits that were seen last
    _most_probable: Tensor | None = field(default=None, init=False)  # of them, `[tokens]`

    @property
    def batches(self) -> Sequence[np.ndarray]:
        return [self.ids[start : start + self.batch_size, :-1] for start in range(0, len(self.ids), self.batch_size)]

    def scored(self, window: int) -> slice:
        """The rows of a window's logits that are scored."""
        return slice(None)

    def reader(self, original: Scores | None) -> WindowReader:
        """What it reads of a variant, it reads off the original's logits; so `original` is not looked at."""
        return WindowReader(self)

    def most_probable(self, original: Tensor) -> Tensor:
        """Argmax `[tokens]` of the original's logits, found once for all variants that are handed the same tensor."""
        if self._original is None or self._original() is not original:
            self._original, self._most_probable = weakref.ref(original), original.argmax(-1)
        assert self._most_probable is not None
        return self._most_probable


class WindowReader:
    """Scores `[windows, tokens - 1]`: `token_nll` in nats, fp32 (fp64 for a model in fp64), and those of COMPARED.

    `kl` and `kl_reverse` are KL(original || variant) and KL(variant || original) in nats; `agrees` is a bool, whether
    both find the same token most probable; `confidence` is the probability that the original gives to its own;
    `squared_change` is of the probability of the token that follows.
    """

    def __init__(self, asks: WindowAsks) -> None:
        self.asks = asks
        self.seen: list[np.ndarray] = []  # of each window `[1 or 6, tokens]`

    def see(self, batch: int, row: int, logits: Tensor, original: Tensor | None) -> None:
        """As in asks.py. `logits` and `original` are `[tokens, vocabulary]`. Raises NonFiniteError."""
        window = batch * self.asks.batch_size + row
        original = original if self.asks.compares else None
        found = self._read(window, logits, original)
        if not (finite := np.isfinite(found[0])).all():
            raise NonFiniteError(window, (self.asks.scored(window).start or 0) + int(np.argmin(finite)))
        if np.isnan(found).any():
            found = self._read(window, logits, original, masked=True)
        self.seen.append(found)

    def _read(self, window: int, logits: Tensor, original: Tensor | None, masked: bool = False) -> np.ndarray:
        if gpu.enabled(logits) and logits.dtype in gpu.FLOATS:
            from qbench.kernels.divergence import tokens

            scored = self.asks.scored(window)
            targets = torch.from_numpy(self.asks.ids[window, 1:][scored]).to(logits.device)
            return tokens(logits[scored], targets, None if original is None else original[scored]).cpu().numpy()
        return self._in_torch(window, logits, original, masked)

    def _in_torch(self, window: int, logits: Tensor, original: Tensor | None, masked: bool = False) -> np.ndarray:
        """The same on plain torch, which is the reference for the kernel."""
        scored = self.asks.scored(window)
        targets = torch.from_numpy(self.asks.ids[window, 1:][scored]).to(logits.device)[:, None]
        logits, whole = logits[scored], original
        original = None if whole is None else whole[scored]
        parts = []
        for rows in row_chunks(logits):
            log_q = log_probabilities(logits[rows])
            true = log_q.gather(1, targets[rows])[:, 0]
            found = [-true]
            if original is not None:
                top = self.asks.most_probable(whole)[scored][rows]
                log_p = log_probabilities(original[rows])
                agrees = (logits[rows].argmax(-1) == top).to(true.dtype)
                change = (true.exp() - log_p.gather(1, targets[rows])[:, 0].exp()).square()
                sure = log_p.gather(1, top[:, None])[:, 0].exp()
                kl, reverse = (masked_divergences if masked else divergences)(log_p, log_q)
                found += [kl, reverse, agrees, change, sure]
                del log_p
            del log_q  # before the next chunk's is made
            parts.append(torch.stack(found))
        return torch.cat(parts, 1).cpu().numpy()

    def scores(self) -> Scores:
        nll, *compared = np.stack(self.seen, 1)
        if not compared:
            return {"token_nll": nll}
        kl, reverse, agrees, change, sure = compared
        found = dict(zip(COMPARED, (kl, reverse, agrees > 0, change, sure), strict=True))
        return {"token_nll": nll} | found
