"""A causal language model as a chain: embedding, blocks one after the other, final norm and head.

    chain = Chain.of(model)                                raises NotAChainError for a model that is none
    states, calls = chain.begin(ids)                       the model's own forward pass, up to its blocks
    for i in range(len(chain)):
        states = chain.block(i, states, calls)             transformers' module, or what a variant has in its place
    logits = chain.finish(states, ids)                     the model's own forward pass, from its last block on

So every block can take all windows, in all variants, before the next block is needed, and nothing of the model's code
is written again: `begin` and `finish` run the model's forward pass with stand-ins in the places of its blocks. In
`begin` the stand-ins note what the model hands each block beside the states (masks, positions, sliding windows); in
`finish` the last of them gives out the states. Scaled embeddings, soft-caps and logit scales are therefore the model's.

`begin` and `finish` change the blocks for as long as they run; a model serves one thread at a time. Another thread may
load the weights of a block meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qbench.model.blocks import NotAChainError, find_blocks

STATES = object()  # the place of the hidden states among a call's arguments
RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")  # by blocks, and stand-ins have none


@dataclass(frozen=True)
class Call:
    """What the model hands one block; STATES is in the place of the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, states: Tensor) -> Tensor:
        args = [states if value is STATES else value for value in self.args]
        kwargs = {name: states if value is STATES else value for name, value in self.kwargs.items()}
        out = block(*args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]


Calls = tuple[Call, ...]  # one a block
# (block, what it is handed as states, its call) -> what its stand-in gives out
StandIn = Callable[[int, Tensor, Call], Tensor]


class Chain:
    """A model in eval mode, block by block; made by `Chain.of`.

    `width` is what its blocks give out: 0 the states, n a tuple of n whose first are the states. Of a `resident` chain
    all blocks are there and run in order, in one variant: they may share weights, and one may leave something to a
    later one in an object that both are handed (Gemma 4's keys and values), which every batch has for itself.
    """

    def __init__(self, model: Any, width: int = 0, resident: bool = False) -> None:
        self.model, self.width, self.resident = model, width, resident
        self.name, self.blocks = find_blocks(model, resident)
        self.shares_calls = False  # whether all unpadded batches of one shape are handed the same
        self._flags = {"use_cache": False} | {name: False for name in RECORDED if getattr(model.config, name, False)}
        self._known: tuple[Any, Calls] | None = None  # the last shape, and its calls

    @staticmethod
    def of(model: Any, resident: bool = False) -> Chain:
        """Observes that the model is a chain (observe.py), in milliseconds; no block runs, its weights may be absent.

        `resident` asks for less, see above; whether `finish` gives the model's logits is not looked at then.
        Raises NotAChainError, with one sentence, for a model that is none, and ValueError for one in training mode or
        without the weights outside of its blocks.
        """
        from qbench.passes.observe import observe

        return observe(model, resident)

    def __len__(self) -> int:
        return len(self.blocks)

    @torch.no_grad()
    def begin(self, ids: Tensor, **inputs: Any) -> tuple[Tensor, Calls]:
        """What the first block is handed, `[batch, tokens, hidden]`, and what every block is handed beside the states.

        `ids` `[batch, tokens]`; `inputs` are more arguments of the model's forward: attention_mask, position_ids. If
        `shares_calls`, batches of one shape without `inputs` get one and the same tuple of calls, since masks and
        rotary embeddings can be large. Raises NotAChainError when the chain does not hold for this batch.
        """
        first: list[Tensor] = []
        calls: list[Call] = []

        def note(i: int, handed: Tensor, call: Call) -> Tensor:
            if i == 0:
                first.append(handed)
                if not inputs and self._known is not None and self._known[0] == _key(ids, handed):
                    raise _EnoughError
            calls.append(call)
            if len(calls) == len(self):
                raise _EnoughError
            return handed.detach()  # a tensor of its own that costs nothing

        with suppress(_EnoughError):
            self.run(ids, note, **inputs)
            raise self.broken(f"calls {len(calls)} of its {len(self)} blocks")
        if not calls:
            return first[0], self._known[1]
        handed = tuple(calls)
        if self.shares_calls and not inputs:
            self._known = _key(ids, first[0]), handed
        return first[0], handed

    @torch.no_grad()
    def block(self, i: int, states: Tensor, calls: Calls, module: nn.Module | None = None) -> Tensor:
        """The states after block `i`, or after `module` in its place; both `[batch, tokens, hidden]`."""
        return calls[i].run(self.blocks[i] if module is None else module, states)

    @torch.no_grad()
    def finish(self, states: Tensor, ids: Tensor, **inputs: Any) -> Tensor:
        """Logits `[batch, tokens, vocabulary]` from the states after the last block.

        Rows do not depend on each other: where the logits of all would not fit, give one window at a time, with its
        rows of `ids` and `inputs`. The model embeds the ids once more on the way, which costs next to nothing.
        """
        return self.run(ids, lambda i, handed, call: states if i == len(self) - 1 else handed.detach(), **inputs)

    def run(self, ids: Tensor, stand_in: StandIn, **inputs: Any) -> Tensor:
        """The logits of the model's own forward pass, in which `stand_in` takes the place of every block.

        Raises NotAChainError unless the blocks are called in order, each with what the one before gave out.
        """
        previous: list[Tensor] = []

        def take_place(i: int, *args: Any, **kwargs: Any) -> Any:
            if i != len(previous):
                raise self.broken(f"calls block {i} where block {len(previous)} would be next")
            states = args[0] if args else kwargs.get("hidden_states")
            handed = previous[-1] if previous else states
            if self.resident and previous and _equal(states, handed):
                handed = states  # a copy, as Gemma 4 makes it before the first block that shares keys
            times = sum(value is handed for value in (*args, *kwargs.values()))
            if not isinstance(handed, Tensor) or times == 0:
                raise self.broken(f"does not hand block {i} what the block before gave out")
            if previous and times > 1:
                raise self.broken(f"hands block {i} what the block before gave out {times} times")
            previous.append(stand_in(i, handed, _call(args, kwargs, handed)))
            if i > 0:
                previous[-2] = None  # states are large
            return (previous[-1], *[None] * (self.width - 1)) if self.width else previous[-1]

        with _in_place_of(self.blocks, take_place):
            return self.model(ids, **self._flags, **inputs).logits

    def broken(self, where: str) -> NotAChainError:
        return NotAChainError(f"{type(self.model).__name__} is no plain chain of blocks: it {where}")


class _EnoughError(Exception):
    """The forward pass has told what was asked; the rest of it is not needed."""


def _equal(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _key(ids: Tensor, states: Tensor) -> tuple[Any, ...]:
    return ids.shape, states.shape, states.dtype, states.device


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor) -> Call:
    """STATES takes the first place of the states only: what else the first block gets as the embeddings is constant."""
    places = [*range(len(args)), *kwargs]
    values = [*args, *kwargs.values()]
    place = places[[value is states for value in values].index(True)]
    args = tuple(STATES if place == at else value for at, value in enumerate(args))
    return Call(args, {name: STATES if place == name else value for name, value in kwargs.items()})


@contextmanager
def _in_place_of(blocks: list[nn.Module], stand_in: Callable[..., Any]) -> Iterator[None]:
    """Block i answers with `stand_in(i, ...)`; all else of it, such as its class and its layer type, stays in sight."""
    own = [block.__dict__.get("forward") for block in blocks]  # of a block that somebody else has changed
    try:
        for i, block in enumerate(blocks):
            block.forward = partial(stand_in, i)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
