"""How a model calls its decoder blocks: what the first one is handed, and every block's other arguments.

Both are observed in forward passes of the model itself, so that its embeddings, masks and positions need not be known.
Two sequences go through all blocks. If the blocks are called alike for both, all others end at the first block;
otherwise every sequence goes through all of them and keeps arguments of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbench.errors import PointError


@dataclass(frozen=True)
class Call:
    """What a block is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def run_block(block: nn.Module, states: Tensor, call: Call) -> Tensor:
    """The hidden states `[1, window, hidden]` that the block gives out for `states`."""
    return _states(block(states, *call.args, **call.kwargs))


def first_inputs(model: Any, blocks: list[nn.Module], ids: np.ndarray) -> tuple[list[Tensor], list[list[Call]]]:
    """What the first block is handed for each sequence of `ids` `[sequences, window]`, and the calls of all blocks.

    Hidden states are `[1, window, hidden]`; calls are by sequence, then by block. Raises PointError for a model that
    does not hand what one block gives out to the next one.
    """
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    differ = False  # from sequence to sequence
    for i, sequence in enumerate(ids):
        compared = any((earlier != ids[0]).any() for earlier in ids[1:i])
        states, of_blocks = _follow(model, blocks, sequence, all_blocks=differ or not compared)
        hidden.append(states)
        if i and len(of_blocks) == len(blocks):
            differ = differ or not _same(calls[0], of_blocks)
            of_blocks = _sharing(calls[0], of_blocks)
        calls.append(of_blocks)
    return hidden, [of_blocks if differ else calls[0] for of_blocks in calls]


def _follow(model: Any, blocks: list[nn.Module], ids: np.ndarray, all_blocks: bool) -> tuple[Tensor, list[Call]]:
    first: list[Tensor] = []
    calls: list[Call] = []
    given: list[Tensor] = []  # by the last block

    def note(hidden_states: Tensor, *args: Any, number: int, **kwargs: Any) -> None:
        if number != len(calls):
            raise PointError(
                f"{type(model).__name__}: its blocks are not called one after the other; cannot calibrate it"
            )
        if given and not (given[0] is hidden_states or torch.equal(given[0], hidden_states)):
            raise PointError(
                f"{type(model).__name__}: block {number} is not handed what block {number - 1} gives out; "
                "cannot calibrate it"
            )
        if not calls:
            first.append(hidden_states)
        calls.append(Call(args, kwargs))
        if not all_blocks or len(calls) == len(blocks):
            raise _ReachedBlockError

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        given[:] = [_states(output)]

    outputs = [block.register_forward_hook(keep) for block in blocks[:-1]] if all_blocks else []
    try:
        with hooks([(block, partial(note, number=i)) for i, block in enumerate(blocks)]), suppress(_ReachedBlockError):
            model(torch.from_numpy(ids)[None].to(model.device), use_cache=False)
    finally:
        for handle in outputs:
            handle.remove()
    if not first:
        raise PointError(f"{type(model).__name__}: its decoder blocks are never called; cannot calibrate it")
    return first[0], calls


class _ReachedBlockError(Exception):
    """The last block of interest has been handed its input; the rest of the forward pass is not needed."""


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _same(one: Any, other: Any) -> bool:
    """Whether two calls hand over the same; objects that are neither tensors nor containers must say so themselves."""
    if isinstance(one, Call) and isinstance(other, Call):
        return _same((one.args, one.kwargs), (other.args, other.kwargs))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return one is other or (type(one) is type(other) and bool(one == other))


def _sharing(first: list[Call], others: list[Call]) -> list[Call]:
    """`others`, holding the tensors of `first` where they are equal, so that a mask for all exists once."""

    def shared(one: Any, other: Any) -> Any:
        if isinstance(other, (Tensor, tuple)) and _same(one, other):
            return one
        return other  # a dictionary may be written to by the blocks: every sequence has its own

    calls = []
    for one, other in zip(first, others, strict=True):
        args = tuple(shared(one.args[i] if i < len(one.args) else None, value) for i, value in enumerate(other.args))
        calls.append(Call(args, {key: shared(one.kwargs.get(key), value) for key, value in other.kwargs.items()}))
    return calls


@contextmanager
def hooks(watched: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Calls each function with the arguments of every call of its module, before it runs."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], *, see: Callable[..., None]) -> None:
        see(*args, **kwargs)

    handles = [m.register_forward_pre_hook(partial(hook, see=see), with_kwargs=True) for m, see in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
