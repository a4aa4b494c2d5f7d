"""The fused experts of a mixture, quantized: the module that stands where they stood, and which weights route to it.

Which modules hold experts, and in which of transformers' forms, is told in expert_form.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qbench.format.format import Format
from qbench.kernels.grouped import combine
from qbench.kernels.routes import route
from qbench.layers.expert_form import Activation, expert_weights, form, refusal, stacked_parameters
from qbench.layers.linear import PackedWeight

__all__ = ["QuantExperts", "expert_weights", "form", "is_router", "refusal", "stacked_parameters"]

Multiply = Callable[[Tensor, int], Tensor]  # x [tokens, in] and an expert's index -> [tokens, out]


def sorts(x: Tensor) -> bool:
    """Whether pairs are sorted and multiplied with whole stacks: on a GPU. On a CPU, expert by expert is no slower."""
    return x.is_cuda


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
    On a GPU the pairs of token and expert are sorted by expert and multiplied with the stack as a whole
    (kernels/grouped.py), which never waits for the GPU to say which experts were chosen; in the layout of a kernel that
    can do it (layers/linear.py), a small number of pairs takes one launch per projection instead. On a CPU one expert
    at a time is multiplied, and only those that some token is sent to.

    `stacks` are those of `form(original).projections`; `original` gives everything else: biases, gate, activation.
    """

    def __init__(self, stacks: Sequence[Format], original: Any) -> None:
        super().__init__()
        how = form(original)
        self.routed, self.projections = how.routed, how.projections
        self.num_experts, self.hidden_dim, self.intermediate_dim = stacks[-1].shape
        for name, stack in zip(self.projections, stacks, strict=True):
            setattr(self, name, PackedWeight(stack))
        self.activation = Activation(original)
        self.down_proj_bias = getattr(original, "down_proj_bias", None)
        self.post_expert_norm = getattr(original, "post_expert_norm", None)

    def packed(self) -> dict[str, Format]:
        """Its weights by the prefix of their buffers' names; what a checkpoint describes."""
        return {f"{name}.": getattr(self, name).quantized for name in self.projections}

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        held = [getattr(self, name) for name in self.projections]
        if top_k_index is None or top_k_weights is None:
            return self._shares(hidden_states, held)
        kernels = [one.kernel for one in held]
        if all(kernel is not None and top_k_index.numel() <= kernel.pairs for kernel in kernels) and (
            kernels[:-1] == kernels[:1] * (len(kernels) - 1)  # what reads x is multiplied together
        ):
            return self._pairs(hidden_states, top_k_index, top_k_weights, held)
        if sorts(hidden_states):
            return self._sorted(hidden_states, top_k_index, top_k_weights, held)
        multiply = [one.multiply_with_matrix() for one in held]
        output = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index >= self.num_experts:  # transformers' mark for an expert that lives elsewhere
                continue
            token, slot = torch.where(top_k_index == index)
            y = self._expert(index, hidden_states[token], multiply) * top_k_weights[token, slot, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output

    def _sorted(self, x: Tensor, index: Tensor, scores: Tensor, held: list[PackedWeight]) -> Tensor:
        routes = route(index, self.num_experts)
        *first, down = held
        inner = self.activation([one.multiply_sorted(x, routes, gather=True) for one in first], routes.expert)
        y = self._finish(down.multiply_sorted(inner, routes, gather=False), routes.expert)
        return combine(y, index, scores, self.num_experts, routes).to(x.dtype)

    def _expert(self, index: int, x: Tensor, multiply: list[Multiply]) -> Tensor:
        """What one expert makes of the tokens x `[tokens, hidden]`."""
        *first, down = multiply
        return self._finish(down(self.activation([one(x, index) for one in first], index), index), index)

    def _finish(self, y: Tensor, expert: int | Tensor) -> Tensor:
        y = y if self.down_proj_bias is None else y + self.down_proj_bias[expert]
        return y if self.post_expert_norm is None else self.post_expert_norm(y)

    def _shares(self, x: Tensor, held: list[PackedWeight]) -> Tensor:
        """The rows that are zero were not sent; experts without biases keep them so."""
        if sorts(x):
            tokens = len(x) // self.num_experts
            expert = torch.arange(len(x), device=x.device) // tokens
            index = torch.where(x.any(-1), expert, self.num_experts).unsqueeze(-1)
            return self._sorted(x, index, x.new_ones(len(x), 1), held)
        multiply = [one.multiply_with_matrix() for one in held]
        shares = x.reshape(self.num_experts, -1, self.hidden_dim)
        output = torch.zeros_like(shares)
        for index, share in enumerate(shares):
            sent = torch.where(share.any(-1))[0]
            if len(sent):
                output[index, sent] = self._expert(index, share[sent], multiply).to(output.dtype)
        return output.view(-1, self.hidden_dim)

    def _pairs(self, x: Tensor, index: Tensor, scores: Tensor, held: list[PackedWeight]) -> Tensor:
        biased = self.activation.bias is not None or self.down_proj_bias is not None
        chosen = index.clamp_max(self.num_experts - 1) if biased else index
        *first, down = held
        outputs = first[0].kernel.experts(x, index, [one.layout for one in first])
        inner = self.activation(outputs, chosen).flatten(0, 1)
        (y,) = down.kernel.experts(inner, index.reshape(-1, 1), [down.layout])
        y = self._finish(y.flatten(0, 1), chosen.flatten())
        return combine(y, index, scores, self.num_experts).to(x.dtype)
