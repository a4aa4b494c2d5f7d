"""Fused experts of a mixture: which modules hold them, and the module that holds them quantized.

transformers 5 keeps a block's experts in two 3-D parameters, gate_up_proj `[experts, 2 * intermediate, hidden]` and
down_proj `[experts, hidden, intermediate]`. Nearly all of its mixtures (Qwen, DeepSeek, Mixtral, GLM, OLMoE, ...)
share one forward; the exceptions (transposed or interleaved weights, biases, a clamped activation) say so through
flags that the decorator `use_experts_implementation` leaves on the module. Only the common form is accepted, since
a wrong guess would give a wrong model without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.kernels import ops
from qbench.kernels.tiles import Tiles
from qbench.quant.linear import PackedWeight
from qbench.quant.stack import select
from qbench.quant.weight import QuantizedWeight

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ARGUMENTS = ["hidden_states", "top_k_index", "top_k_weights"]
FLAGS = {  # attribute: the value of the common form, what another value means
    "is_transposed": (False, "its weights are transposed, [experts, in, out]"),
    "has_bias": (False, "its experts have biases"),
    "is_concatenated": (True, "its gate and up rows are interleaved"),
    "has_gate": (True, "its experts have no gate"),
    "has_post_expert_norm": (False, "it normalizes after each expert"),
}


def stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D parameters that the module itself holds; not of a convolution, whose kernels are 3-D as well."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return {}
    return {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}


def refusal(module: nn.Module) -> str | None:
    """Why this module with 3-D parameters is not of the form that QuantExperts computes; None if it is."""
    parameters = dict(module.named_parameters(recurse=False))
    for flag, (common, meaning) in FLAGS.items():
        if getattr(module, flag, common) != common:
            return meaning
    if set(parameters) != {"gate_up_proj", "down_proj"}:
        return f"its parameters are {', '.join(parameters)}, not gate_up_proj and down_proj"
    experts, hidden, intermediate = module.down_proj.shape
    if getattr(module, "num_experts", None) != experts:
        return f"down_proj has {experts} matrices, num_experts is {getattr(module, 'num_experts', 'missing')}"
    if module.gate_up_proj.shape != (experts, 2 * intermediate, hidden):
        shapes = f"{list(module.gate_up_proj.shape)} and {list(module.down_proj.shape)}"
        return f"its shapes {shapes} are not [experts, 2 * intermediate, hidden] and [experts, hidden, intermediate]"
    if not callable(getattr(module, "act_fn", None)):
        return "it has no act_fn"
    if others := [name for name, _ in module.named_children() if name != "act_fn"]:
        return f"it also holds {', '.join(others)}"
    return _other_forward(module)


def _other_forward(module: Any) -> str | None:
    from transformers.integrations.moe import _default_apply_gate

    if not hasattr(module, "is_transposed"):
        return "it does not declare its layout, as use_experts_implementation does"
    if type(module)._apply_gate is not _default_apply_gate:
        return "it combines gate and up in a way of its own"
    if list(inspect.signature(module.forward).parameters) != ARGUMENTS:
        return f"its forward does not take {', '.join(ARGUMENTS)}"
    return None


def expert_weights(module: Any, index: int) -> list[Tensor]:
    """Gate, up `[intermediate, hidden]` and down `[hidden, intermediate]` of one expert, as views."""
    gate, up = module.gate_up_proj.detach()[index].chunk(2)
    return [gate, up, module.down_proj.detach()[index]]


def gated(gate: Tensor, up: Tensor, act_fn: Any) -> Callable[[Tensor], Tensor]:
    """act(gate x) * up x, `[tokens, hidden]` -> `[tokens, intermediate]`: what down reads; weights `[out, in]`."""

    def activation(x: Tensor) -> Tensor:
        return act_fn(F.linear(x, gate)) * F.linear(x, up)

    return activation


def is_router(path: str, rows: int, experts: int) -> bool:
    """Whether a weight of `rows` rows at `path` within a block of `experts` experts weighs experts against each other.

    Counts the score per expert and the one number that gates a shared expert; the linears of shared experts, whose
    paths also lead through the block, are told apart by their names.
    """
    child, _, deeper = path.partition(".")
    return rows in (1, experts) and (not deeper or "gate" in child or "router" in child)


class QuantExperts(nn.Module):
    """The experts of one block, packed in stacks `[experts, out, in]`; a drop-in for the module they came from.

    x `[tokens, hidden]`, top_k_index and top_k_weights `[tokens, k]` -> `[tokens, hidden]` in x's dtype. One
    expert at a time is multiplied, and only those that some token is sent to; in the kernels' layout (see
    quant/linear.py) up to EXPERT_PAIRS pairs of token and expert take one launch per projection instead.
    """

    def __init__(self, gate: QuantizedWeight, up: QuantizedWeight, down: QuantizedWeight, act_fn: Any) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = down.shape
        self.gate_proj, self.up_proj, self.down_proj = PackedWeight(gate), PackedWeight(up), PackedWeight(down)
        self.act_fn = act_fn

    def packed(self) -> dict[str, QuantizedWeight]:
        """Its weights by the prefix of their buffers' names; what a checkpoint describes."""
        return {f"{name}.": getattr(self, name).weight for name in PROJECTIONS}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tiles = [getattr(self, name).tiles for name in PROJECTIONS]
        if None not in tiles:
            return self._on_kernels(hidden_states, top_k_index, top_k_weights, *tiles)
        stacks = [getattr(self, name).weight for name in PROJECTIONS]
        output = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index >= self.num_experts:  # transformers' mark for an expert that lives elsewhere
                continue
            token, slot = torch.where(top_k_index == index)
            x = hidden_states[token]
            gate, up, down = (select(weight, index).dequantize(x.dtype) for weight in stacks)
            y = F.linear(gated(gate, up, self.act_fn)(x), down)
            y = y * top_k_weights[token, slot, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output

    def _on_kernels(
        self, x: Tensor, index: Tensor, weights: Tensor, gate_tiles: Tiles, up_tiles: Tiles, down_tiles: Tiles
    ) -> Tensor:
        here = index < self.num_experts  # transformers' mark for an expert that lives elsewhere
        index, weights = index.clamp_max(self.num_experts - 1), weights * here
        if index.numel() <= ops.EXPERT_PAIRS:
            gate, up = (ops.linear_experts(x, index, tiles) for tiles in (gate_tiles, up_tiles))
            y = ops.linear_experts((self.act_fn(gate) * up).flatten(0, 1), index.reshape(-1, 1), down_tiles)
            return (y.view(*index.shape, -1) * weights.unsqueeze(-1)).sum(1).to(x.dtype)
        output = torch.zeros_like(x)
        for expert in index[here].unique().tolist():
            token, slot = torch.where((index == expert) & here)
            gate, up = (ops.linear(x[token], ops.select(tiles, expert)) for tiles in (gate_tiles, up_tiles))
            y = ops.linear(self.act_fn(gate) * up, ops.select(down_tiles, expert)) * weights[token, slot, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output
