"""What an evaluation asks of a pass (passes/walk.py), which answers it for all variants of a model at once.

    asks = evaluation.asks()                   None: the whole model must be there, token by token, as for generating
    for b, ids in enumerate(asks.batches):     int64 `[rows, tokens]`: what goes through the model together
        for row in range(len(ids)):
            reader.see(b, row, logits, original)
    scores = reader.scores()

Each variant has a reader of its own, and so has the original. A row's logits `[tokens, vocabulary]` are in the model's
dtype, those of padding included; every row comes once, in order. So no more than one row's logits exist a model.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

import numpy as np
from torch import Tensor

Scores = dict[str, np.ndarray]  # as in protocol.py


class Reader(typing.Protocol):
    """Reads the scores of one variant off its logits."""

    def see(self, batch: int, row: int, logits: Tensor, original: Tensor | None) -> None:
        """`original` are the original's logits of the same row, where `Asks.compares` and there is an original.

        Raises PointError, one sentence that names window or document, when the logits hold NaN or Inf.
        """
        ...

    def scores(self) -> Scores:
        """Once all rows were seen. Of the original, what is kept and handed to the variants' readers."""
        ...


class Asks(typing.Protocol):
    batches: Sequence[np.ndarray]  # right-padded where their rows differ in length
    compares: bool  # whether a variant's reader wants the original's logits beside the variant's

    def reader(self, original: Scores | None) -> Reader:
        """For a variant, `original` being the original's scores; for the original itself, None.

        The original may be read beside its variants: its scores are complete when a variant's are asked for.
        """
        ...
