"""The fused experts of a mixture, quantized: the module that stands where they stood, and which weights route to it.

Which modules hold experts, and in which of transformers' forms, is told in expert_form.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.format.stack import select
from qbench.format.weight import QuantizedWeight
from qbench.kernels import ops
from qbench.kernels.tiles import Tiles
from qbench.layers.expert_form import Activation, expert_weights, form, refusal, stacked_parameters
from qbench.layers.linear import PackedWeight

__all__ = ["QuantExperts", "expert_weights", "form", "is_router", "refusal", "stacked_parameters"]


def is_router(path: str, rows: int, experts: int) -> bool:
    """Whether a weight of `rows` rows at `path` within a block of `experts` experts weighs experts against each other.

    Counts the score per expert and the one number that gates a shared expert; the linears of shared experts, whose
    paths also lead through the block, are told apart by their names.
    """
    child, _, deeper = path.partition(".")
    return rows in (1, experts) and (not deeper or "gate" in child or "router" in child)


class QuantExperts(nn.Module):
    """The experts of one block, packed in stacks `[experts, out, in]`; a drop-in for the module they came from.

    x `[tokens, hidden]`, top_k_index and top_k_weights `[tokens, k]` -> `[tokens, hidden]` in x's dtype; or, where the
    original took no routing, x `[experts * tokens, hidden]`, every expert's share after the other, -> the same shape.
    One expert at a time is multiplied, and only those that some token is sent to; in the kernels' layout (see
    layers/linear.py) up to EXPERT_PAIRS pairs of token and expert take one launch per projection instead.

    `stacks` are those of `form(original).projections`; `original` gives everything else: biases, gate, activation.
    """

    def __init__(self, stacks: Sequence[QuantizedWeight], original: Any) -> None:
        super().__init__()
        how = form(original)
        self.routed, self.projections = how.routed, how.projections
        self.num_experts, self.hidden_dim, self.intermediate_dim = stacks[-1].shape
        for name, stack in zip(self.projections, stacks, strict=True):
            setattr(self, name, PackedWeight(stack))
        self.activation = Activation(original)
        self.down_proj_bias = getattr(original, "down_proj_bias", None)
        self.post_expert_norm = getattr(original, "post_expert_norm", None)

    def packed(self) -> dict[str, QuantizedWeight]:
        """Its weights by the prefix of their buffers' names; what a checkpoint describes."""
        return {f"{name}.": getattr(self, name).weight for name in self.projections}

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        held = [getattr(self, name) for name in self.projections]
        weights = [one.weight if one.tiles is None else one.tiles for one in held]
        if top_k_index is None or top_k_weights is None:
            return self._shares(hidden_states, weights)
        if top_k_index.numel() <= ops.EXPERT_PAIRS and all(isinstance(weight, Tiles) for weight in weights):
            return self._pairs(hidden_states, top_k_index, top_k_weights, weights)
        output = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index >= self.num_experts:  # transformers' mark for an expert that lives elsewhere
                continue
            token, slot = torch.where(top_k_index == index)
            y = self._expert(index, hidden_states[token], weights) * top_k_weights[token, slot, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output

    def _expert(self, index: int, x: Tensor, weights: list[QuantizedWeight | Tiles]) -> Tensor:
        """What one expert makes of the tokens x `[tokens, hidden]`."""

        def multiply(x: Tensor, weight: QuantizedWeight | Tiles) -> Tensor:
            if isinstance(weight, Tiles):
                return ops.linear(x, ops.select(weight, index))
            return F.linear(x, select(weight, index).dequantize(x.dtype))

        *first, down = weights
        y = multiply(self.activation([multiply(x, weight) for weight in first], index), down)
        return self._finish(y, index)

    def _finish(self, y: Tensor, expert: int | Tensor) -> Tensor:
        y = y if self.down_proj_bias is None else y + self.down_proj_bias[expert]
        return y if self.post_expert_norm is None else self.post_expert_norm(y)

    def _shares(self, x: Tensor, weights: list[QuantizedWeight | Tiles]) -> Tensor:
        shares = x.reshape(self.num_experts, -1, self.hidden_dim)
        output = torch.zeros_like(shares)
        for index, share in enumerate(shares):
            sent = torch.where(share.any(-1))[0]  # the other rows are zero, and experts without biases keep them so
            if len(sent):
                output[index, sent] = self._expert(index, share[sent], weights).to(output.dtype)
        return output.view(-1, self.hidden_dim)

    def _pairs(self, x: Tensor, index: Tensor, scores: Tensor, weights: list[Tiles]) -> Tensor:
        here = index < self.num_experts  # transformers' mark for an expert that lives elsewhere
        index, scores = index.clamp_max(self.num_experts - 1), scores * here
        *first, down = weights
        inner = self.activation([ops.linear_experts(x, index, tiles) for tiles in first], index)
        y = ops.linear_experts(inner.flatten(0, 1), index.reshape(-1, 1), down).view(*index.shape, -1)
        return (self._finish(y, index) * scores.unsqueeze(-1)).sum(1).to(x.dtype)
