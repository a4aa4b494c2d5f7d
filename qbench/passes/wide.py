"""One block in fp32, beside the one that runs: what transforms change and verify first.

How far a change moves a block is told on a few tokens. A mixture is not smooth: where two experts are tied for a token,
the last bit decides, and an honest change may move that token by a whole expert. So if a block moves too far, tokens
that it gives something else for as soon as its input is off by NUDGE, relative, are not looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qbench.layers.expert_form import stacked_parameters
from qbench.passes.chain import Call
from qbench.passes.own import sharing

NUDGE, NUDGES = 3e-6, 8
UNSETTLED = 1e-4  # a nudge moves what a token's experts give out by about itself, and another expert by far more
MOST_UNSETTLED = 0.5  # share of the tokens


class Wide:
    """`module` is the copy; calling it sends states `[1, tokens, hidden]` through it as the model would."""

    def __init__(self, block: nn.Module, call: Call, states: Tensor) -> None:
        self.module, self.states = in_fp32(block), states
        self._block, self._call = block, in_fp32_call(call)

    def __call__(self, states: Tensor) -> Tensor:
        return self._call.run(self.module, states.clone())

    def moved(self, one: Tensor, expected: Tensor, limit: float) -> float:
        """||one - expected|| / ||expected||; if that is above the limit, over the settled tokens alone."""
        moved = relative(one, expected)
        if moved <= limit or self._settled.float().mean() <= 1 - MOST_UNSETTLED:
            return moved
        return relative(one[:, self._settled], expected[:, self._settled])

    @cached_property
    def _settled(self) -> Tensor:
        """Whether each token comes out alike, `[tokens]`, of the block as it was, when its input is nudged."""
        block, random = in_fp32(self._block), torch.Generator().manual_seed(0)
        plain = self._call.run(block, self.states.clone())[0]
        settled = torch.ones(len(plain), dtype=torch.bool, device=plain.device)
        for _ in range(NUDGES):
            nudge = 1 + NUDGE * torch.randn(self.states.shape, generator=random).to(self.states)
            other = self._call.run(block, self.states * nudge)[0]
            settled &= (other - plain).norm(dim=-1) <= UNSETTLED * plain.norm(dim=-1)
        return settled


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


def in_fp32(block: nn.Module) -> nn.Module:
    """A copy of a block whose floating-point numbers are in fp32; those that are already are shared."""
    wide = sharing(block)
    for module in wide.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().float(), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())
        if stacked_parameters(module) and hasattr(module, "config"):  # kernels for experts may know 16 bit alone
            module.config = copy.copy(module.config)
            vars(module.config)["_experts_implementation_internal"] = "eager"
    return wide


def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives the module other parameters; the old ones are not written."""
    for name, tensor in tensors.items():
        holder, _, key = name.rpartition(".")
        setattr(module.get_submodule(holder), key, nn.Parameter(tensor.detach(), requires_grad=False))


def get(module: nn.Module, name: str) -> Tensor:
    holder, _, key = name.rpartition(".")
    return getattr(module.get_submodule(holder), key).detach()


def in_fp32_call(call: Call) -> Call:
    """Masks and rotary embeddings are in the precision of the run."""
    return Call(tuple(map(_in_fp32, call.args)), {name: _in_fp32(value) for name, value in call.kwargs.items()})


def _in_fp32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    return tuple(map(_in_fp32, value)) if type(value) is tuple else value
