"""Finds the linear weights of a model, and measures how many of them were really quantized.

Everything two-dimensional that a decoder block multiplies with counts, fused experts included: transformers 5
keeps the experts of a mixture as three-dimensional parameters, which a walk over nn.Linear would skip without
a word. The output head and the embeddings stay in 16 bit, as in the papers, and do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from qbench.quant.linear import QuantLinear


@dataclass(frozen=True)
class Skipped:
    """A linear weight that stays as it is, and why."""

    name: str
    weights: int
    reason: str


@dataclass(frozen=True)
class Linears:
    """The linear layers to quantize, by name in module order, and the linear weights that are left out."""

    layers: dict[str, nn.Linear]
    skipped: list[Skipped]


def find_linears(model: Any) -> Linears:
    """Walks the model; the output head is left out silently, every other omission is listed."""
    head = model.get_output_embeddings()
    layers: dict[str, nn.Linear] = {}
    skipped: list[Skipped] = []
    for name, module in model.named_modules():
        if module is head or isinstance(module, nn.Embedding):
            continue
        if isinstance(module, nn.Linear):
            layers[name] = module
            continue
        for key, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{key}"
            if parameter.dim() == 3:
                skipped.append(Skipped(full_name, parameter.numel(), "fused experts are not quantized yet"))
            elif parameter.dim() == 2:
                skipped.append(Skipped(full_name, parameter.numel(), "a raw parameter, such as a router"))
    return Linears(layers, skipped)


def linear_weights(model: Any) -> int:
    """Number of linear weights that count for coverage, quantized or not."""
    left = find_linears(model)
    rest = sum(layer.weight.numel() for layer in left.layers.values()) + sum(s.weights for s in left.skipped)
    return _quantized_weights(model) + rest


def coverage(model: Any) -> float:
    """Share of the linear weights that QuantLinear holds, 0 to 1; 0 for a model without linear weights."""
    return _quantized_weights(model) / max(1, linear_weights(model))


def _quantized_weights(model: Any) -> int:
    return sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear))


def replace_module(model: Any, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
