"""Finds the linear weights of a model, and measures how many of them were really quantized.

Everything two-dimensional that a decoder block multiplies with counts, fused experts included: transformers 5
keeps the experts of a mixture as three-dimensional parameters, which a walk over nn.Linear would skip without
a word. Whatever stays in 16 bit is listed with a reason:

- routers, since a wrong choice of expert costs more than their few bytes; so a mixture's coverage is a little below 1
- linears whose weight the model reads instead of calling them (readers.py)
- subclasses of nn.Linear with a forward of their own: what their weight means is not known

- linears in another list of layers than the decoder blocks

These count against coverage. Listed without counting is what lies beside the blocks: a projection of the embeddings,
which no calibrated method reaches and which all methods therefore leave, as they leave the embeddings; and what lies
outside the language model (a vision tower, its projector), since no text ever passes it. The output head and the
embeddings stay in 16 bit, as in the papers, and are not listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qbench.format.format import Format
from qbench.format.mixed import quantized_numel
from qbench.layers.experts import QuantExperts, is_router, refusal, stacked_parameters
from qbench.layers.linear import PackedWeight, packed_weights

ROUTER = "router, kept in 16 bit"
OUTSIDE = "outside the decoder blocks"
TOWER = "outside the language model: no text passes it"
READ = "its weight is read by the model, not only called"


@dataclass(frozen=True)
class Skipped:
    """A linear weight that stays as it is, and why; `counted` is False if coverage is not concerned with it."""

    name: str
    weights: int
    reason: str
    counted: bool = True


@dataclass(frozen=True)
class Linears:
    """What to quantize, by name in module order, and the linear weights that are left out."""

    layers: dict[str, nn.Module]  # nn.Linear, or GPT-2's Conv1D; `matrix` gives the weight `[out, in]` of either
    experts: dict[str, nn.Module]  # fused experts of a form that layers/expert_form.py accepts
    skipped: list[Skipped]

    @property
    def quantizable(self) -> int:
        """Number of weights in the layers and experts."""
        linear = sum(layer.weight.numel() for layer in self.layers.values())
        return linear + sum(p.numel() for module in self.experts.values() for p in stacked_parameters(module).values())

    @property
    def weights(self) -> int:
        """Number of weights that count for coverage, quantizable or not."""
        return self.quantizable + sum(s.weights for s in self.skipped if s.counted)


def matrix(layer: nn.Module) -> Tensor:
    """The weight `[out, in]` of a layer in `Linears.layers`, as a view: Conv1D stores it transposed."""
    weight = layer.weight.detach()
    return weight if isinstance(layer, nn.Linear) else weight.T


def find_linears(model: Any) -> Linears:
    """Walks the model; the output head is left out silently, every other omission is listed."""
    head = model.get_output_embeddings()
    mixtures = _expert_blocks(model)
    towers, language, blocks = _places(model)
    found = Linears({}, {}, [])
    for name, module in model.named_modules():
        if module is head or isinstance(module, (nn.Embedding, PackedWeight)):
            continue
        in_blocks = blocks is None or _within(name, blocks)
        if _within(name, towers) and not _within(name, language):
            found.skipped.extend(_left_out(name, module, TOWER, counted=False))
        elif isinstance(module, (nn.Linear, _conv1d())):
            if _routes(name, module.weight, mixtures):
                found.skipped.extend(_left_out(name, module, ROUTER))
            elif type(module).forward not in (nn.Linear.forward, _conv1d().forward):
                # bitsandbytes' layers, for one, are subclasses of nn.Linear whose weights are codes
                found.skipped.extend(_left_out(name, module, f"{type(module).__name__} has a forward of its own"))
            elif not in_blocks:
                found.skipped.extend(_left_out(name, module, OUTSIDE, counted=_in_a_list(model, name)))
            elif getattr(module, "read_by_model", False):
                found.skipped.extend(_left_out(name, module, READ))
            else:
                found.layers[name] = module
        elif stacked_parameters(module) and not in_blocks:
            found.skipped.extend(_left_out(name, module, OUTSIDE, counted=_in_a_list(model, name)))
        elif stacked_parameters(module) and refusal(module) is None:
            found.experts[name] = module
        else:
            found.skipped.extend(_raw_parameters(name, module, mixtures))
    return found


def block_list(model: Any) -> str | None:
    """Name of the list of decoder blocks: of the language model's ModuleLists, the one with most linear weights.

    Of a list within a list the outer one; None if there is no list with linear weights.
    """
    return _places(model)[2]


def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def _places(model: Any) -> tuple[str, str, str | None]:
    """Names of the base model, of the language model within it (transformers' decoder), and of its list of blocks.

    "" is the whole model. What the first holds beside the second no text passes: a vision tower, its projector.
    """
    base = getattr(model, "base_model", model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    names = {id(module): name for name, module in model.named_modules()}
    if id(decoder) in names and (blocks := _largest_list(model, names[id(decoder)])) is not None:
        return names.get(id(base), ""), names[id(decoder)], blocks
    return "", "", _largest_list(model, "")


def _largest_list(model: Any, prefix: str) -> str | None:
    held: dict[str, int] = {}  # in the order of the modules: outer lists come first
    for name, module in model.named_modules():
        if not _within(name, prefix) or isinstance(module, nn.Embedding):
            continue
        if isinstance(module, nn.ModuleList):
            held[name] = 0
        if isinstance(module, PackedWeight):
            weights = module.format.numel
        else:
            weights = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() in (2, 3))
        while weights and name:
            name = name.rpartition(".")[0]
            if name in held:
                held[name] += weights
    largest = max(held, key=lambda path: held[path], default=None)
    return largest if largest is not None and held[largest] else None


def _in_a_list(model: Any, name: str) -> bool:
    """Whether the module is part of a list of layers: of such a list there may be as much as of the blocks."""
    while name:
        name = name.rpartition(".")[0]
        if isinstance(model.get_submodule(name), nn.ModuleList):
            return True
    return False


def _within(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _left_out(name: str, module: nn.Module, reason: str, counted: bool = True) -> list[Skipped]:
    """The weights of two dimensions or more, fused experts and linears, that the module itself holds."""
    if isinstance(module, (nn.Linear, _conv1d())):
        return [Skipped(name, module.weight.numel(), reason, counted)]
    parameters = {} if isinstance(module, nn.modules.conv._ConvNd) else dict(module.named_parameters(recurse=False))
    return [
        Skipped(f"{name}.{key}", p.numel(), reason, counted)
        for key, p in parameters.items()
        if p.dim() in (2, 3) and not key.endswith("bias")
    ]


def _raw_parameters(name: str, module: nn.Module, mixtures: dict[str, int]) -> list[Skipped]:
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
        elif _routes(name, parameter, mixtures):
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
    return sum(map(quantized_numel, quantized_weights(model))) / max(1, linear_weights(model))


def quantized_weights(model: Any) -> list[Format]:
    """Every quantized weight of a model, one per linear and one stack per projection of fused experts.

    For counting: those that are laid out for the GPU's kernels are described by tensors on the meta device.
    """
    return [module.format for module in packed_weights(model).values()]


def replace_module(model: Any, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
