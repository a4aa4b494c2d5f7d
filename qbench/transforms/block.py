"""One block of a model in fp32, with what was observed of it (observe.py), and the arithmetic of folding.

Two things carry a factor from one weight to another without a change of the block's function:

    a norm and what reads it      y = gain * x / rms(x),  W y: gain * t, W / t            for every reader of y
    a linear that feeds another   W2 (a * (W1 x)):             W1's rows * t, W2 / t      a is made without W1

What reads a norm is linears, fused experts, routers and gates: all are divided, or the function is another. A feed has
its channels: v feeds o head by head, and with grouped queries a channel of v feeds a channel of several heads of o.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qbench.layers.expert_form import form, stacked_parameters
from qbench.model.linears import matrix

Tensors = dict[str, Tensor]  # by name of the parameter in the block


@dataclass(frozen=True)
class Norm:
    """A norm and all that is handed the very tensor that it gives out."""

    name: str
    shift: float  # gain = shift + weight: 0, or 1 where the weight is stored as what the gain is above 1
    readers: tuple[str, ...]  # linears, fused experts, routers, gates


@dataclass(frozen=True)
class Feed:
    """A linear whose output channels come out, channel by channel, as factors of another's input channels."""

    producer: str
    consumer: str
    channels: Tensor  # int64 [in of consumer]: the producer's output channel behind each input channel
    # input channels of the consumer that are mixed over tokens by the same weights (a head); single ones elsewhere
    heads: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class ExpertFeed:
    """Fused experts whose up feeds their down."""

    experts: str


@dataclass(frozen=True)
class Fold:
    """Other parameters for a block, which leave its function as it is."""

    where: str  # as a result says it: the norm, or producer and consumer
    linears: tuple[str, ...]  # whose input channels are changed; a stack of experts by the name of its parameter
    tensors: Tensors


@dataclass
class Block:
    """`module` is a copy in fp32 that has all folds so far."""

    name: str  # as in `model.layers.3`
    module: nn.Module
    quantized: Collection[str]  # names of the linears and fused experts that will be quantized
    norms: list[Norm] = field(default_factory=list)
    feeds: list[Feed] = field(default_factory=list)
    expert_feeds: list[ExpertFeed] = field(default_factory=list)

    def inputs(self, norm: Norm) -> list[Tensor]:
        """The weights `[out, in]` that read the norm and will be quantized; experts' matrices on top of each other."""
        return [self._first(name).flatten(0, -2) for name in norm.readers if name in self.quantized]

    def consumer(self, feed: Feed) -> Tensor:
        """The consumer's weight `[out * n, channels]`, rows on top of each other where n of its channels share one."""
        weight = matrix(self.module.get_submodule(feed.consumer))
        order = feed.channels.argsort(stable=True).view(len(feed.channels.unique()), -1)  # [channels, n]
        return weight[:, order].permute(2, 0, 1).flatten(0, 1)

    def downs(self, feed: ExpertFeed) -> Tensor:
        """`[experts, out, in]`"""
        module = self.module.get_submodule(feed.experts)
        return upright(module, module.down_proj.detach())

    def scaled(self, norm: Norm, t: Tensor) -> Fold:
        """The norm's gain times t `[in]`, all readers divided by t."""
        part = self.module.get_submodule(norm.name)
        tensors = {f"{norm.name}.weight": (part.weight + norm.shift) * t - norm.shift}
        if getattr(part, "bias", None) is not None:
            tensors[f"{norm.name}.bias"] = part.bias * t
        covered = []
        for name in norm.readers:
            tensors |= on_inputs(self.module, name, lambda weight: weight / t)
            if name in self.quantized:
                covered.append(self._called(name))
        return Fold(norm.name, tuple(covered), tensors)

    def scaled_feed(self, feed: Feed, t: Tensor) -> Fold:
        """The producer's rows times t `[channels]`, in the order of `consumer`, the consumer's inputs divided by it."""
        rows = torch.ones(len(matrix(self.module.get_submodule(feed.producer))), device=t.device)
        rows[feed.channels.unique()] = t
        tensors = on_outputs(self.module, feed.producer, lambda weight: (weight.mT * rows).mT)
        tensors |= on_inputs(self.module, feed.consumer, lambda weight: weight / rows[feed.channels])
        return Fold(f"{feed.producer} -> {feed.consumer}", (feed.consumer,), tensors)

    def scaled_experts(self, feed: ExpertFeed, t: Tensor) -> Fold:
        """Each expert's up rows times t `[experts, in]`, its down divided by it."""
        module = self.module.get_submodule(feed.experts)
        how, key = form(module), f"{feed.experts}.{form(module).first}"
        first = upright(module, getattr(module, how.first).detach()).clone()
        half = first[:, 1::2] if how.interleaved else first[:, first.shape[1] // 2 :]
        up = half if how.gated else first
        up *= t[..., None]
        down, name = self.downs(feed) / t[:, None], f"{feed.experts}.down_proj"
        tensors = {key: upright(module, first).contiguous(), name: upright(module, down).contiguous()}
        return Fold(f"{feed.experts}: up -> down", (name,), tensors)

    def _first(self, name: str) -> Tensor:
        """A reader's weight `[..., out, in]`."""
        module = self.module.get_submodule(name)
        if not stacked_parameters(module):
            return matrix(module)
        return upright(module, getattr(module, form(module).first).detach())

    def _called(self, name: str) -> str:
        module = self.module.get_submodule(name)
        return f"{name}.{form(module).first}" if stacked_parameters(module) else name


Change = Callable[[Tensor], Tensor]


def on_inputs(block: nn.Module, name: str, change: Change) -> Tensors:
    """A reader's weight after `change`, which maps `[..., out, in]`; of fused experts that of their first matrices."""
    module = block.get_submodule(name)
    if not stacked_parameters(module):
        weight = module.weight.detach()
        return {f"{name}.weight": change(weight.T).T.contiguous() if transposed(module) else change(weight)}
    key = form(module).first
    changed = change(upright(module, getattr(module, key).detach()))
    return {f"{name}.{key}": upright(module, changed).contiguous()}


def on_outputs(block: nn.Module, name: str, change: Change) -> Tensors:
    """A linear's weight and bias after `change`, which maps rows `[out, in]`, and the bias as `[out, 1]`."""
    module = block.get_submodule(name)
    weight = change(matrix(module))
    tensors = {f"{name}.weight": weight.T.contiguous() if transposed(module) else weight}
    if getattr(module, "bias", None) is not None:
        tensors[f"{name}.bias"] = change(module.bias.detach()[:, None])[:, 0]
    return tensors


def transposed(module: nn.Module) -> bool:
    """Whether a linear holds its weight `[in, out]`, as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def upright(experts: nn.Module, stack: Tensor) -> Tensor:
    """A stack as held -> `[experts, out, in]`, and back."""
    return stack.mT if form(experts).transposed else stack
