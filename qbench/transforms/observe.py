"""Finds what of a block can be folded, by running it, not by a list of architectures.

A few tokens go through the block. A norm is a module with one weight a channel whose output is `unit * (shift + weight)
+ bias`, which is tried; its readers are all modules with a weight that are handed that very tensor or a view of it. A
linear feeds another if factors on its output channels come out as the same factors on the other's input channels. So
the output is multiplied by factors that all differ, the factors that come out say which channel went where, and other
factors must then come out alike for every token. A linear may feed with a part of its channels: with values, where
queries and keys are of the same matrix, or with up, where gate is.

What is found so is what a transform may try. That nothing else depends on it is verified when it is folded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qbench.layers.expert_form import Activation, expert_weights, refusal, stacked_parameters
from qbench.model.linears import matrix
from qbench.transforms.block import ExpertFeed, Feed, Norm, transposed

Run = Callable[[], Any]  # sends the tokens through the block, `[1, tokens, hidden]`

NEAR = 1e-4  # relative; a channel that another one had been taken for would be off by the factors' spacing at least
FINEST = 4.0  # the factors span so much: from 1/2 to 2


@dataclass
class Observed:
    norms: list[Norm] = field(default_factory=list)
    feeds: list[Feed] = field(default_factory=list)
    expert_feeds: list[ExpertFeed] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)  # linears that no token came to


@dataclass
class Seen:
    """One call of a module; holding the tensors keeps others from taking their places in memory."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input: Tensor
    output: Any


@torch.no_grad()
def observe(block: nn.Module, run: Run, whole: bool = True) -> Observed:
    """What can be folded in a block, or in any module, in fp32; with `whole=False` the norms alone, and
    linears that are not reached read none."""
    calls = trace(block, run)
    found = Observed(norms=norms(calls))
    linears = {call.name: call.module for call in calls if _is_linear(call.module)}
    if not whole:
        return found
    reading = {reader for norm in found.norms for reader in norm.readers}
    found.feeds = feeds(run, linears, [name for name in linears if name not in reading])
    found.expert_feeds = [ExpertFeed(c.name) for c in calls if _experts(c.module) and _linear_in_up(c.module)]
    every = {name for name, module in block.named_modules() if _is_linear(module)}
    found.unreached = sorted(every - linears.keys())
    if found.unreached:  # they may read a norm: which one cannot be seen, and their share would not be compensated
        widths = {matrix(block.get_submodule(name)).shape[1] for name in found.unreached}
        found.norms = [n for n in found.norms if block.get_submodule(n.name).weight.numel() not in widths]
    return found


def trace(block: nn.Module, run: Run) -> list[Seen]:
    """Every call of a module that holds weights of its own, in the order in which they begin to compute."""
    calls: list[Seen] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, *, name: str) -> None:
        input = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if input is not None:
            calls.append(Seen(name, module, args, kwargs, input, output))

    own = [(n, m) for n, m in block.named_modules() if next(m.parameters(recurse=False), None) is not None]
    handles = [m.register_forward_hook(partial(note, name=n), with_kwargs=True) for n, m in own]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def norms(calls: list[Seen]) -> list[Norm]:
    """The norms that weights read, each called once."""
    found = []
    for call in calls:
        weight = getattr(call.module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(call.output, Tensor):
            continue
        readers = [other for other in calls if other is not call and same_values(other.input, call.output)]
        readers = [r for r in readers if _experts(r.module) or _width(r.module) == weight.numel()]
        once = sum(other.name == call.name for other in calls) == 1
        if readers and once and (shift := _shift(call)) is not None:
            found.append(Norm(call.name, shift, tuple(dict.fromkeys(r.name for r in readers))))
    return found


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same numbers in memory, in whatever shape."""
    return (
        one.numel() == other.numel()
        and one.storage_offset() == other.storage_offset()
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )


def _shift(call: Seen) -> float | None:
    """s where the norm gives unit * (s + weight) + bias; None where it does not."""
    own = dict(call.module.named_parameters())
    if not own.keys() <= {"weight", "bias"}:
        return None

    def with_weight(value: float) -> Tensor:
        held = {key: torch.full_like(p, value if key == "weight" else 0.0) for key, p in own.items()}
        return functional_call(call.module, held, call.args, call.kwargs)

    at_zero, unit = with_weight(0.0), with_weight(1.0)
    unit = unit - at_zero
    shift = float((at_zero * unit).sum() / (unit * unit).sum().clamp_min(1e-30))
    shift = round(shift) if abs(shift - round(shift)) < NEAR else shift
    close = torch.allclose(at_zero, shift * unit, rtol=NEAR, atol=NEAR * float(unit.abs().max()))
    return float(shift) if close else None


def feeds(run: Run, linears: dict[str, nn.Module], consumers: list[str]) -> list[Feed]:
    """For each consumer the linear that feeds all of its input channels, the first that is found."""
    found: list[Feed] = []
    plain = _handed(run, {name: linears[name] for name in consumers}) if consumers else {}
    for producer in linears:
        for part in _parts(len(matrix(linears[producer]))):
            left = [c for c in consumers if c != producer and all(feed.consumer != c for feed in found)]
            if not left:
                return found
            inputs = {name: linears[name] for name in left}
            factors = _factors(part, linears[producer], seed=0)
            changed = _handed(run, inputs, linears[producer], lambda out, by=factors: out * by)
            for consumer in left:
                if not _alike(plain.get(consumer), changed.get(consumer)):
                    continue
                channels = _channels(plain[consumer], changed[consumer], factors, part)
                if channels is None:
                    continue
                others = torch.ones_like(factors)
                others[channels] = _factors(part, linears[producer], seed=1)[channels]
                again = _handed(run, {consumer: linears[consumer]}, linears[producer], lambda o, by=others: o * by)
                expected = plain[consumer] * others[channels]
                if _alike(again.get(consumer), expected) and _near(again[consumer], expected):
                    heads = _heads(run, linears[producer], linears[consumer], channels)
                    found.append(Feed(producer, consumer, channels, heads))
            if any(feed.producer == producer for feed in found):
                break
    return found


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are of as many tokens: a routed linear may be handed others, or none."""
    return one is not None and other is not None and one.shape == other.shape


def _parts(rows: int) -> Iterator[Tensor]:
    """Parts of a linear's output channels that may feed: all, halves one after the other or taking turns."""
    every = torch.arange(rows)
    yield every
    if rows % 2 == 0 and rows > 2:
        yield from (every[rows // 2 :], every[: rows // 2], every[1::2], every[::2])


def _factors(part: Tensor, producer: nn.Module, seed: int) -> Tensor:
    """A factor for every output channel, 1 outside of the part, all others different, in random order."""
    count, weight = len(part), matrix(producer)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    factors = torch.ones(len(weight), dtype=torch.float64)
    factors[part] = FINEST ** ((order.double() + 0.25) / count - 0.5)
    return factors.to(weight)


def _handed(
    run: Run, watched: dict[str, nn.Module], changed: nn.Module | None = None, change: Any = None
) -> dict[str, Tensor]:
    """What the linears are handed, `[tokens, in]`, while the output of one is changed."""
    handed: dict[str, Tensor] = {}

    def note(module: nn.Module, args: tuple, *, name: str) -> None:
        handed.setdefault(name, args[0].detach().flatten(0, -2).clone())

    handles = [module.register_forward_pre_hook(partial(note, name=name)) for name, module in watched.items()]
    if changed is not None:
        handles.append(changed.register_forward_hook(lambda module, args, output: change(output)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return handed


def _channels(plain: Tensor, changed: Tensor, factors: Tensor, part: Tensor) -> Tensor | None:
    """The output channel behind each input channel, read off its factor; None unless every one has one.

    The first token attends to nothing but itself, so that queries and keys of the same matrix, whose factors change
    the attention to others, do not show; a channel that is zero there is read off the token where it is largest.
    """
    at = torch.where(plain[0] != 0, 0, plain.abs().argmax(0))
    columns = torch.arange(plain.shape[1], device=plain.device)
    ratios = changed[at, columns].double() / plain[at, columns].double()
    if not torch.isfinite(ratios).all():
        return None
    values, order = factors.double()[part.to(factors.device)].sort()
    right = torch.searchsorted(values, ratios.contiguous()).clamp(1, max(1, len(values) - 1))
    nearest = torch.where((ratios - values[right - 1]).abs() < (ratios - values[right]).abs(), right - 1, right)
    spacing = FINEST ** (1 / len(values)) - 1
    if ((ratios / values[nearest] - 1).abs() > min(NEAR, spacing / 4)).any():
        return None
    return part.to(factors.device)[order[nearest]]


def _heads(run: Run, producer: nn.Module, consumer: nn.Module, channels: Tensor) -> tuple[tuple[int, ...], ...]:
    """Runs of the consumer's input channels in which tokens are mixed alike: one number a token stays one number."""
    generator = torch.Generator().manual_seed(2)

    def even(output: Tensor) -> Tensor:
        tokens = torch.randn(output.shape[:-1], generator=generator).to(output)
        output = output.clone()
        output[..., channels.unique()] = tokens[..., None]
        return output

    handed = _handed(run, {"": consumer}, producer, even)[""]
    alike = (handed[:, 1:] - handed[:, :-1]).norm(dim=0) <= NEAR * handed.norm(dim=0).clamp_min(1e-30)[1:]
    starts = [0, *((~alike).nonzero().flatten() + 1).tolist(), handed.shape[1]]
    return tuple(tuple(range(first, last)) for first, last in itertools.pairwise(starts))


def _near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= NEAR * other.norm())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or transposed(module)


def _width(module: nn.Module) -> int | None:
    """Input channels of a module that multiplies with a matrix: a linear, a router."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return weight.shape[0] if transposed(module) else weight.shape[1]


def _experts(module: nn.Module) -> bool:
    return bool(stacked_parameters(module)) and refusal(module) is None


def _linear_in_up(experts: Any) -> bool:
    """Whether factors on an expert's up come out as factors on what its down reads."""
    activation = Activation(experts)
    *first, down = expert_weights(experts, 0)
    random = torch.Generator().manual_seed(3)
    outputs = [torch.randn(8, down.shape[1], generator=random).to(down) for _ in first]
    factors = FINEST ** (torch.rand(down.shape[1], generator=random).to(down) - 0.5)
    return _near(activation([*outputs[:-1], outputs[-1] * factors], 0), activation(outputs, 0) * factors)
