"""A stack of weights of one format, `[experts, out, in]`: how the experts of a mixture are stored.

Every tensor of a weight gains a leading dimension, and one matrix is taken out again as views, so that a layer
dequantizes one expert at a time. What all matrices share, such as a codebook, is stored once: `once` names it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from qbench.format.format import Format

F = TypeVar("F", bound="Format")


def stack(weights: Sequence[F], once: Collection[str] = ()) -> F:
    """Stacks weights `[out, in]` of equal form into one `[n, out, in]`, bit for bit.

    Raises ValueError when they differ in format, in what they say of themselves, or in their stored tensors' shapes.
    """
    alike(weights)
    first = weights[0]
    named = [weight.tensors() for weight in weights]
    stacked = {}
    for key, tensor in named[0].items():
        if key not in once:
            stacked[key] = torch.stack([tensors[key] for tensors in named])
        elif any(not torch.equal(tensor, other[key]) for other in named[1:]):
            raise ValueError(f"weights of one stack must share their {key}")
        else:
            stacked[key] = tensor
    methods = "+".join(sorted({weight.method for weight in weights}))
    form = replace(first, shape=(len(weights), *first.shape), method=methods, diagnostics={})
    return form.with_tensors(stacked)


def concat(stacks: Sequence[F]) -> F:
    """Stacks `[n, out, in]` one after the other in one stack, bit for bit; of formats that mix, in any form.

    Raises ValueError as `stack` does.
    """
    from qbench.format.mixed import Mixed

    if len(stacks) == 1:
        return stacks[0]
    stacks = [replace(one, diagnostics={}) for one in stacks]
    if any(isinstance(one, Mixed) for one in stacks) or mixes(stacks):
        return Mixed.stack([one.select(i) for one in stacks for i in range(one.shape[0])])
    first, once = stacks[0].select(0), _shared(stacks[0])
    alike([first, *(one.select(0) for one in stacks[1:])])
    named = [one.tensors() for one in stacks]
    joined = {}
    for key, tensor in named[0].items():
        if key not in once:
            joined[key] = torch.cat([tensors[key] for tensors in named])
        elif any(not torch.equal(tensor, other[key]) for other in named[1:]):
            raise ValueError(f"weights of one stack must share their {key}")
        else:
            joined[key] = tensor
    count = sum(one.shape[0] for one in stacks)
    methods = "+".join(sorted({one.method for one in stacks}))
    form = replace(stacks[0], shape=(count, *first.shape), method=methods, diagnostics={})
    return form.with_tensors(joined)


def part(stack: F, matrices: slice) -> F:
    """Some matrices of a stack, `[n, out, in]`; its tensors are views."""
    from qbench.format.mixed import Mixed

    if isinstance(stack, Mixed):
        return Mixed.stack(stack.parts[matrices])
    once = _shared(stack)
    named = {key: tensor if key in once else tensor[matrices] for key, tensor in stack.tensors().items()}
    count = len(range(*matrices.indices(stack.shape[0])))
    return replace(stack, shape=(count, *stack.shape[1:]), diagnostics={}).with_tensors(named)


def mixes(weights: Sequence[Format]) -> bool:
    """Whether they are of several formats, one of which stacks with any other."""
    from qbench.format.mixed import Mixed
    from qbench.format.plain import Plain

    return len({type(one) for one in weights}) > 1 and any(isinstance(one, Mixed | Plain) for one in weights)


def _shared(stack: Format) -> set[str]:
    """Tensors that all matrices share: one matrix' have as many dimensions."""
    held = stack.tensors()
    return {key for key, tensor in stack.select(0).tensors().items() if tensor.ndim == held[key].ndim}


def alike(weights: Sequence[Format]) -> None:
    """Raises ValueError when they differ in format, in what they say of themselves, or in their tensors' shapes."""
    form = _form(weights[0])
    for weight in weights[1:]:
        for what, mine in _form(weight).items():
            if mine != form.get(what):
                raise ValueError(f"weights of one stack must share their {what}, got {form.get(what)} and {mine}")


def select(weight: F, index: int, once: Collection[str] = ()) -> F:
    """Matrix `index` `[out, in]` of a stack that `stack` made with the same `once`; its tensors are views."""
    named = {key: tensor if key in once else tensor[index] for key, tensor in weight.tensors().items()}
    return replace(weight, shape=weight.shape[1:]).with_tensors(named)


def take(stack: F, index: torch.Tensor) -> F | None:
    """The matrices of `index` `[n]`, on the stack's device, as a stack; None if they have no tensors in common."""
    from qbench.format.mixed import Mixed

    if isinstance(stack, Mixed):
        return None
    once = _shared(stack)
    named = {key: tensor if key in once else tensor.index_select(0, index) for key, tensor in stack.tensors().items()}
    return replace(stack, shape=(len(index), *stack.shape[1:]), diagnostics={}).with_tensors(named)


def _form(weight: Format) -> dict[str, Any]:
    described = {key: value for key, value in weight.describe().items() if key not in ("method", "diagnostics")}
    tensors = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in weight.tensors().items()}
    return {"format": weight.name} | described | {"tensors": tensors}
