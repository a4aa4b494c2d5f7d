"""Finds the linear weights of a model, and measures how many of them were really quantized.

Everything two-dimensional that a decoder block multiplies with counts, fused experts included: transformers 5
keeps the experts of a mixture as three-dimensional parameters, which a walk over nn.Linear would skip without
a word. Routers stay in 16 bit, since a wrong choice of expert costs more than their few bytes; they count among
the linear weights, so a mixture's coverage is a little below 1. The output head and the embeddings stay in
16 bit, as in the papers, and do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from qbench.models.experts import QuantExperts, is_router, refusal, stacked_parameters
from qbench.quant.linear import PackedWeight
from qbench.quant.weight import QuantizedWeight

ROUTER = "router, kept in 16 bit"


@dataclass(frozen=True)
class Skipped:
    """A linear weight that stays as it is, and why."""

    name: str
    weights: int
    reason: str


@dataclass(frozen=True)
class Linears:
    """What to quantize, by name in module order, and the linear weights that are left out."""

    layers: dict[str, nn.Linear]
    experts: dict[str, nn.Module]  # fused experts of the form that models/experts.py accepts
    skipped: list[Skipped]

    @property
    def weights(self) -> int:
        """Number of weights in all three."""
        linear = sum(layer.weight.numel() for layer in self.layers.values())
        fused = sum(p.numel() for module in self.experts.values() for p in stacked_parameters(module).values())
        return linear + fused + sum(s.weights for s in self.skipped)


def find_linears(model: Any) -> Linears:
    """Walks the model; the output head is left out silently, every other omission is listed."""
    head = model.get_output_embeddings()
    blocks = _expert_blocks(model)
    found = Linears({}, {}, [])
    for name, module in model.named_modules():
        if module is head or isinstance(module, (nn.Embedding, PackedWeight)):
            continue
        if isinstance(module, nn.Linear):
            if _routes(name, module.weight, blocks):
                found.skipped.append(Skipped(name, module.weight.numel(), ROUTER))
            else:
                found.layers[name] = module
        elif stacked_parameters(module) and refusal(module) is None:
            found.experts[name] = module
        else:
            found.skipped.extend(_raw_parameters(name, module, blocks))
    return found


def _raw_parameters(name: str, module: nn.Module, blocks: dict[str, int]) -> list[Skipped]:
    """The parameters of two or three dimensions that the module itself holds, biases of fused experts aside."""
    kind = type(module).__name__
    skipped = []
    for key, parameter in module.named_parameters(recurse=False):
        if key in stacked_parameters(module):
            reason = f"fused experts of an unknown layout: {kind}, {refusal(module)}"
        elif parameter.dim() == 3:
            reason = f"a kernel of {kind}"
        elif parameter.dim() != 2 or key.endswith("bias"):
            continue
        elif _routes(name, parameter, blocks):
            reason = ROUTER
        else:
            reason = f"a raw parameter of {kind}"
        skipped.append(Skipped(f"{name}.{key}", parameter.numel(), reason))
    return skipped


def _expert_blocks(model: Any) -> dict[str, int]:
    """The modules that directly hold fused experts, quantized, quantizable or not, and how many experts they hold."""
    blocks = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts):
            blocks[name.rpartition(".")[0]] = module.num_experts
        elif stacked := stacked_parameters(module):
            blocks[name.rpartition(".")[0]] = next(iter(stacked.values())).shape[0]
    return blocks


def _routes(name: str, weight: nn.Parameter, blocks: dict[str, int]) -> bool:
    """Whether the module `name` that holds `weight` `[out, in]` is a router of the nearest block around it."""
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        if parent in blocks:
            return is_router(name.removeprefix(f"{parent}."), weight.shape[0], blocks[parent])
    return False


def linear_weights(model: Any) -> int:
    """Number of linear weights that count for coverage, quantized or not."""
    return find_linears(model).weights + sum(weight.numel for weight in quantized_weights(model))


def coverage(model: Any) -> float:
    """Share of the linear weights that are quantized, 0 to 1; 0 for a model without linear weights."""
    return sum(weight.numel for weight in quantized_weights(model)) / max(1, linear_weights(model))


def quantized_weights(model: Any) -> list[QuantizedWeight]:
    """Every quantized weight of a model, one per linear and one stack per projection of fused experts.

    For counting: those that are laid out for the GPU's kernels are described by tensors on the meta device.
    """
    return [module.format for module in model.modules() if isinstance(module, PackedWeight)]


def replace_module(model: Any, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
