"""In which form a module holds the fused experts of a mixture, and how to read single matrices out of it.

transformers 5 keeps a block's experts in 3-D parameters. The decorator `use_experts_implementation` leaves flags on the
module that say how (its integrations/moe.py computes with nothing but them and `_apply_gate`):

    gated        gate_up_proj and down_proj; otherwise up_proj and down_proj (NemotronH)
    transposed   `[experts, in, out]` instead of `[experts, out, in]` (gpt-oss, Aria)
    interleaved  gate and up take turns, column by column, instead of one after the other (gpt-oss)
    biases       `[experts, out]` beside the weights (gpt-oss)

Llama 4's experts carry no flags: their forward is handed, one after the other, every expert's share of all tokens,
already scaled by the router. A forward without flags is accepted only if it computes, on small experts of random
weights, what such a forward is taken to compute. Whatever is not understood is refused with a reason, since a wrong
guess would give a wrong model without a word.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.kernels.grouped import silu_times


@dataclass(frozen=True)
class ExpertForm:
    gated: bool
    transposed: bool
    interleaved: bool
    routed: bool  # its forward takes the routing; otherwise every expert's share of the tokens

    @property
    def first(self) -> str:
        """The parameter that reads the block's input."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def projections(self) -> tuple[str, ...]:
        """The matrices of one expert, in the order in which they are called; down is the last."""
        return ("gate_proj", "up_proj", "down_proj") if self.gated else ("up_proj", "down_proj")


def stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D parameters that the module itself holds; not of a convolution, whose kernels are 3-D as well."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return {}
    return {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}


def form(module: Any) -> ExpertForm:
    """The form of a module that `refusal` accepts."""
    if not hasattr(module, "is_transposed"):
        return ExpertForm(gated=True, transposed=True, interleaved=False, routed=False)
    return ExpertForm(module.has_gate, module.is_transposed, not module.is_concatenated, routed=True)


def refusal(module: Any) -> str | None:
    """Why this module with 3-D parameters is not of a form that QuantExperts computes; None if it is."""
    declared = hasattr(module, "is_transposed")
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if not declared and arguments != ["hidden_states"]:
        return "it does not declare its layout, as use_experts_implementation does"
    how = form(module)
    weights = [how.first, "down_proj"]
    expected = weights + [f"{name}_bias" for name in weights if getattr(module, "has_bias", False)]
    parameters = [name for name, _ in module.named_parameters(recurse=False)]
    if set(parameters) != set(expected):
        return f"its parameters are {', '.join(parameters)}, not {', '.join(expected)}"
    if reason := _wrong_shapes(module, how):
        return reason
    own_gate = how.gated and declared and not _gates_by_default(module)
    if not own_gate and not callable(getattr(module, "act_fn", None)):
        return "it has no act_fn"
    known = {"act_fn", "post_expert_norm"} if getattr(module, "has_post_expert_norm", False) else {"act_fn"}
    if others := [name for name, _ in module.named_children() if name not in known]:
        return f"it also holds {', '.join(others)}"
    if declared and (len(arguments) != 3 or arguments[0] != "hidden_states"):
        return f"its forward takes {', '.join(arguments)}, not hidden states, indices and weights of the experts"
    if not declared and not _computes_shares(module):
        return "its forward does not compute what a gated expert's does"
    return None


def _wrong_shapes(module: Any, how: ExpertForm) -> str | None:
    first, down = (_upright(getattr(module, name), how) for name in (how.first, "down_proj"))
    experts, hidden, intermediate = down.shape
    if getattr(module, "num_experts", None) != experts:
        return f"down_proj has {experts} matrices, num_experts is {getattr(module, 'num_experts', 'missing')}"
    rows = (2 if how.gated else 1) * intermediate
    if first.shape != (experts, rows, hidden):
        names = f"{how.first} {list(getattr(module, how.first).shape)} and down_proj {list(module.down_proj.shape)}"
        order = "transposed " if how.transposed else ""
        return f"the {order}shapes of {names} do not fit each other"
    for name, out in ((how.first, rows), ("down_proj", hidden)):
        bias = getattr(module, f"{name}_bias", None)
        if bias is not None and bias.shape != (experts, out):
            return f"{name}_bias has the shape {list(bias.shape)}, not [experts, out]"
    return None


def _gates_by_default(module: Any) -> bool:
    from transformers.integrations.moe import _default_apply_gate

    return getattr(type(module), "_apply_gate", _default_apply_gate) is _default_apply_gate


def _upright(weight: Tensor, how: ExpertForm) -> Tensor:
    """`[..., out, in]`, as a view."""
    return weight.mT if how.transposed else weight


def expert_weights(module: Any, index: int) -> list[Tensor]:
    """The matrices `[out, in]` of one expert, in the order of `form(module).projections`; views where they can be."""
    how = form(module)
    first, down = (_upright(getattr(module, name).detach()[index], how) for name in (how.first, "down_proj"))
    if not how.gated:
        return [first.contiguous(), down.contiguous()]
    gate, up = (first[::2], first[1::2]) if how.interleaved else first.chunk(2)
    return [gate.contiguous(), up.contiguous(), down.contiguous()]


def expert_slice(module: Any, experts: slice) -> list[Tensor]:
    """What the module holds of these experts, as it holds it: views of both of its parameters."""
    return [getattr(module, name).detach()[experts] for name in (form(module).first, "down_proj")]


def stack_views(module: Any, held: list[Tensor]) -> list[Tensor]:
    """The matrices `[experts, out, in]` in what `expert_slice` gives, a view for each of `form(module).projections`."""
    how = form(module)
    first, down = (_upright(part, how) for part in held)
    if not how.gated:
        return [first, down]
    return [*((first[:, ::2], first[:, 1::2]) if how.interleaved else first.chunk(2, 1)), down]


def stacks_of(module: Any, held: list[Tensor]) -> list[Tensor]:
    """As `stack_views`, but every matrix is contiguous."""
    return [stack if stack[0].is_contiguous() else stack.contiguous() for stack in stack_views(module, held)]


def put_expert(module: Any, index: int, weights: list[Tensor]) -> None:
    """Writes what `expert_weights` reads: the matrices `[out, in]` of one expert into the module's parameters."""
    how = form(module)
    first, down = (_upright(getattr(module, name).detach()[index], how) for name in (how.first, "down_proj"))
    parts = [first]
    if how.gated:
        parts = [first[::2], first[1::2]] if how.interleaved else list(first.chunk(2))
    for part, weight in zip((*parts, down), weights, strict=True):
        part.copy_(weight)


class Activation(nn.Module):
    """What lies between an expert's first matrices and down: biases, the gate, the activation.

    Made from the original module, whose own `_apply_gate` it keeps where there is one (clamped or shifted gates).
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.form = form(module)
        own_gate = self.form.gated and not _gates_by_default(module)
        self.act_fn = None if own_gate else module.act_fn
        self.silu = type(self.act_fn).__name__ in ("SiLU", "SiLUActivation")  # torch's and transformers'
        self.gate = _without_parameters(module) if own_gate else None
        self.bias = getattr(module, f"{self.form.first}_bias", None)  # [experts, out], in the original's order

    def forward(self, outputs: list[Tensor], expert: int | Tensor) -> Tensor:
        """What gate and up (or up alone) give, each `[..., intermediate]` -> what down reads, of the same shape.

        `expert` is the expert's index, or those of all leading dimensions.
        """
        if self.gate is None and self.bias is None and not self.form.interleaved:
            *gate, up = outputs
            if gate and self.silu and up.is_cuda:
                return silu_times(gate[0], up)
            return self.act_fn(gate[0]) * up if gate else self.act_fn(up)
        both = torch.stack(outputs, -1).flatten(-2) if self.form.interleaved else torch.cat(outputs, -1)
        if self.bias is not None:
            both = both + self.bias[expert]
        if self.gate is not None:
            return self.gate._apply_gate(both)
        if not self.form.gated:
            return self.act_fn(both)
        gate, up = both.chunk(2, -1)  # as transformers' default gate does, interleaved or not
        return self.act_fn(gate) * up


def _without_parameters(module: nn.Module) -> nn.Module:
    """A module of the same class with the same settings, which keeps none of the weights alive."""
    shell = copy.copy(module)
    shell.__dict__ = {key: value for key, value in vars(module).items() if key != "forward"}
    shell._parameters, shell._buffers = {}, {}
    shell._modules = {key: child for key, child in module._modules.items() if key == "act_fn"}
    return shell


@torch.no_grad()
def _computes_shares(module: Any) -> bool:
    """Whether the forward is that of gated, transposed experts on shares of tokens: tried with two small experts."""
    experts, hidden, intermediate = module.gate_up_proj.shape[0], module.down_proj.shape[2], module.down_proj.shape[1]
    small = _without_parameters(module)
    for key, value in vars(module).items():
        if type(value) is int and value != hidden and value in (experts, intermediate):
            vars(small)[key] = 2 if value == experts else 3
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        gate, up = (torch.randn(2, hidden, 3, generator=generator) / hidden**0.5 for _ in range(2))
        down, x = torch.randn(2, 3, hidden, generator=generator), torch.randn(2, 4, hidden, generator=generator)
        small._parameters = {"gate_up_proj": nn.Parameter(torch.cat([gate, up], -1)), "down_proj": nn.Parameter(down)}
        expected = (module.act_fn(x @ gate) * (x @ up)) @ down
        try:
            computed = type(module).forward(small, x.flatten(0, 1))
        except Exception:  # whatever it needs besides, it is another forward
            return False
    same_shape = isinstance(computed, Tensor) and computed.numel() == expected.numel()
    return same_shape and torch.allclose(computed.view_as(expected), expected, rtol=1e-4, atol=1e-4)
