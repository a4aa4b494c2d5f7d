"""Finds out whether a model is a chain (chain.py) by watching it, not by a list of architectures.

Eight tokens go through the model's own forward pass, in which stand-ins give out fresh random tensors. It is a chain if
- every block is called once, in order, and is handed the very tensor that the block before gave out,
- what a block is handed beside that, and the logits, depend on nothing that an earlier block gave out,
- no two blocks are handed the same mutable object, like the dictionary through which Gemma 3n's blocks share keys,
- no two blocks share weights.

Of a resident chain, the first of these is asked for, and that what a block is handed does not depend on what an earlier
one gave out unless it is left in an object that both are handed.

So nothing is computed between blocks that would have to be computed again for every variant. What a block would keep in
attributes of its own from call to call cannot be seen, since no block runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qbench.model.blocks import NotAChainError, block_of
from qbench.passes.chain import STATES, Call, Chain

TOKENS = 8
WIDTHS = (0, 1, 2, 3)  # of what blocks give out: the states, or tuples that begin with them
IMMUTABLE = (Tensor, bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Observed:
    """One forward pass with stand-ins: every block's call, what the last one gave out, and the logits."""

    calls: list[Call]
    last: Tensor
    logits: Tensor


@torch.no_grad()
def observe(model: Any, resident: bool = False) -> Chain:
    """The model as a chain; raises NotAChainError or ValueError as Chain.of says."""
    if model.training:
        raise ValueError("a chain needs the model in eval mode: call model.eval()")
    name = Chain(model, resident=resident).name
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and block_of(key, name) is None:
            raise ValueError(f"a chain needs the weights outside of the blocks, and {key} is on the meta device")
    errors: list[tuple[int, NotAChainError]] = []
    for width in WIDTHS:
        chain, reached = Chain(model, width, resident), [0]
        try:
            _check(chain, reached)
            return chain
        except NotAChainError as error:
            errors.append((reached[0], error))
    raise max(errors, key=lambda found: found[0])[1]  # of the guess that went furthest


def _check(chain: Chain, reached: list[int]) -> None:
    """Raises NotAChainError unless the chain holds; counts the blocks that were called in `reached`."""
    random = torch.Generator().manual_seed(0)
    ids, others = _two_batches(chain.model)
    one = _run(chain, ids, random, reached)
    shared = _shared(one.calls)
    if shared and not chain.resident:
        raise chain.broken(shared)
    # the same tokens, but all blocks except for the last give out something else
    two = _run(chain, ids, random, reached, one.last)
    for i, (call, again) in enumerate(zip(one.calls, two.calls, strict=True)):
        if (argument := _difference(call, again)) is not None:
            raise chain.broken(f"hands block {i} {argument}, which depends on what an earlier block gave out")
    if not chain.resident and not _same(one.logits, two.logits):
        raise chain.broken("computes its logits from more than what the last block gives out")
    three = _run(chain, others, random, reached)
    pairs = zip(one.calls, three.calls, strict=True)
    chain.shares_calls = not shared and all(_difference(call, other) is None for call, other in pairs)


def _run(
    chain: Chain, ids: Tensor, random: torch.Generator, reached: list[int], last: Tensor | None = None
) -> Observed:
    """A forward pass whose stand-ins give out random tensors; the last one gives out `last` where that is given."""
    calls: list[Call] = []
    given: list[Tensor] = []

    def stand_in(i: int, handed: Tensor, call: Call) -> Tensor:
        if handed.dim() != 3 or handed.shape[:2] != ids.shape:
            raise chain.broken(f"hands its blocks states {list(handed.shape)} for ids {list(ids.shape)}")
        calls.append(call)
        reached[0] = max(reached[0], len(calls))
        out = torch.randn(handed.shape, generator=random).to(handed)
        given.append(last if last is not None and i == len(chain) - 1 else out)
        return given[-1].clone()  # a model may change what it is given

    try:
        logits = chain.run(ids, stand_in)
    except NotAChainError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise chain.broken(f"does not run with stand-ins for its blocks ({reason})") from error
    if len(calls) < len(chain):
        raise chain.broken(f"calls {len(calls)} of its {len(chain)} blocks")
    return Observed(calls, given[-1], logits)


def _two_batches(model: Any) -> tuple[Tensor, Tensor]:
    """Two batches `[2, TOKENS]` of different ids; in the second are the special ones, which masks may be made from."""
    embedding = model.get_input_embeddings().weight
    random = torch.Generator().manual_seed(1)
    one, two = torch.randint(embedding.shape[0], (2, 2, TOKENS), generator=random)
    special = {0}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        given = getattr(model.config, name, None)
        special.update([given] if isinstance(given, int) else given or [])
    known = torch.tensor([i for i in sorted(special) if 0 <= i < embedding.shape[0]][:TOKENS])
    two[:, : len(known)] = known
    return one.to(embedding.device), two.to(embedding.device)


def _shared(calls: list[Call]) -> str | None:
    """Says which two blocks are handed one object through which the first can leave something to the second."""
    owners: dict[int, int] = {}
    for i, call in enumerate(calls):
        for argument, value in _arguments(call):
            for part in _mutable(value):
                if owners.setdefault(id(part), i) != i:
                    return f"hands blocks {owners[id(part)]} and {i} the same {type(part).__name__} as {argument}"
    return None


def _arguments(call: Call) -> Iterator[tuple[str, Any]]:
    yield from ((f"argument {at}", value) for at, value in enumerate(call.args) if value is not STATES)
    yield from ((name, value) for name, value in call.kwargs.items() if value is not STATES)


def _mutable(value: Any) -> Iterator[Any]:
    """Every part of the value through which one block could leave something to another; tensors aside."""
    if isinstance(value, tuple | frozenset):
        for part in value:
            yield from _mutable(part)
    elif not isinstance(value, IMMUTABLE):
        yield value


def _difference(one: Call, two: Call) -> str | None:
    """The first argument that differs between two calls of a block; None if they are the same."""
    first, second = dict(_arguments(one)), dict(_arguments(two))
    if first.keys() != second.keys():
        return "other arguments each time"
    return next((name for name in first if not _same(first[name], second[name])), None)


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        alike = isinstance(two, Tensor) and (one.shape, one.dtype) == (two.shape, two.dtype)
        return alike and torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)
    if type(one) is not type(two):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    return one is two or one == two or not isinstance(one, IMMUTABLE)
