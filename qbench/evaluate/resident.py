"""Scores windows with a model that is here as a whole, which is no chain of blocks or has another reason to be.

Two models are never in memory together. Of the original is kept what enters its output head (`[windows, tokens,
hidden]`, after the last norm), and a variant's own head, which no method quantizes, makes the original's logits of it
again. They are made for the same batches as the variant's, so that equal models give equal logits, to the bit. Where
the model does something to what leaves its head, as Gemma does, it is run for that on a single token of each window.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qbench.errors import PointError
from qbench.evaluate.asks import Scores
from qbench.evaluate.score import NonFiniteError, WindowAsks

log = logging.getLogger(__name__)

HEAD_INPUTS = "head_inputs"  # name of what is kept


@torch.inference_mode()
def score(model: Any, asks: WindowAsks, label: str, original: Scores | None = None, keep: bool = False) -> Scores:
    """A model's scores; beside the original's where that left its HEAD_INPUTS; with its own HEAD_INPUTS if `keep`.

    Raises PointError, naming window and layer, when there is NaN or Inf.
    """
    states = None if original is None or not asks.compares else original.get(HEAD_INPUTS)
    head, bare = _head(model, asks.batches[0][:1, :2]) if keep or states is not None else (None, False)
    reader, kept = asks.reader(original), _Kept(asks)
    with tqdm(total=len(asks.ids), desc=label, unit="window") as progress:
        for b, rows in enumerate(asks.batches):
            ids, beside = torch.from_numpy(rows).to(model.device), None
            with _watched(head if keep else None, lambda entered, b=b: kept.take(b, entered)):
                logits = model(ids, use_cache=False).logits
            if states is not None and head is not None:
                at = b * asks.batch_size
                entering = from_numpy(states[at : at + len(rows)]).to(model.device)
                with _watched(head, lambda _, entering=entering: entering):
                    beside = head(entering) if bare else model(ids[:, :1], use_cache=False).logits
            for row in range(len(rows)):
                try:
                    reader.see(b, row, logits[row], None if beside is None else beside[row])
                except NonFiniteError as error:
                    layer = first_nonfinite_layer(model, ids[row : row + 1])
                    where = f"first in the output of {layer}" if layer else "but not when it is run again alone"
                    raise PointError(f"{label}: {error}, {where}") from None
            del logits, beside  # before the next batch's are made
            progress.update(len(rows))
    return reader.scores() | kept.scores()


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The same bits; bfloat16, which numpy has not, as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def from_numpy(array: np.ndarray) -> Tensor:
    """What `to_numpy` was given, on the CPU: uint16 is bfloat16."""
    found = torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)
    return found.view(torch.bfloat16) if array.dtype == np.uint16 else found


class _Kept:
    """Collects what enters the head, batch after batch."""

    def __init__(self, asks: WindowAsks) -> None:
        self.asks = asks
        self.states: np.ndarray | None = None

    def take(self, batch: int, entered: Tensor) -> None:
        found = to_numpy(entered)
        if self.states is None:
            self.states = np.empty((len(self.asks.ids), *found.shape[1:]), found.dtype)
            size, shape = self.states.nbytes / 1e6, "x".join(map(str, self.states.shape))
            log.info("the original is kept as what enters its output head, %s: %.1f MB", shape, size)
        start = batch * self.asks.batch_size
        self.states[start : start + len(found)] = found

    def scores(self) -> Scores:
        return {} if self.states is None else {HEAD_INPUTS: self.states}


def _head(model: Any, ids: np.ndarray) -> tuple[nn.Module | None, bool]:
    """The module that makes logits of hidden states, and whether what leaves it are the logits.

    None, and a line in the log, where there is none that is called once in a forward pass for all tokens.
    """
    head = model.get_output_embeddings()
    entered: list[Tensor] = []
    if head is not None:
        with _watched(head, entered.append):
            logits = model(torch.from_numpy(ids).to(model.device), use_cache=False).logits
        if [tensor.shape[:-1] for tensor in entered] == [ids.shape]:
            return head, torch.equal(head(entered[0]), logits)
    log.warning("no divergence: this model's output head is not called once for all tokens, so that none can be had")
    return None, False


@contextmanager
def _watched(head: nn.Module | None, watch: Callable[[Tensor], Any]) -> Iterator[None]:
    """`watch` is shown what enters the head; a tensor that it returns enters instead."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        instead = watch(args[0]) if args else None
        return (instead, *args[1:]) if isinstance(instead, Tensor) else None

    handle = head.register_forward_pre_hook(before) if head is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def first_nonfinite_layer(model: Any, ids: Tensor) -> str | None:
    """The first module, in the order in which they finish, whose output holds NaN or Inf; None if all are finite."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(
                isinstance(t, Tensor) and t.is_floating_point() and not torch.isfinite(t).all() for t in tensors
            ):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
