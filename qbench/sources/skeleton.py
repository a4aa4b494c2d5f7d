"""Models on the meta device: made, copied, and given the values that no file holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from qbench.model.blocks import NotAChainError, block_of


def make(config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """The configuration's causal language model without any weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval().requires_grad_(False)


def copy_of(module: nn.Module, skeleton: Any) -> Any:
    """A copy of `skeleton` or of a part of it; it shares the configurations, so a model's settings reach its blocks."""
    configs = {id(part.config): part.config for part in skeleton.modules() if hasattr(part, "config")}
    return copy.deepcopy(module, configs)


def initialize(
    skeleton: Any, name: str, module: nn.Module, device: torch.device, only: Collection[str] | None = None
) -> None:
    """Brings what is left on the meta device of one module to `device`, with the values that the model itself gives it.

    Those are rotary frequencies, causal masks and the like, which from_pretrained makes in the same way. They are made
    on the CPU, since another device rounds its powers otherwise. Submodules are left alone, as are tensors that carry
    transformers' mark of having been loaded, and what is not in `only`. `name` is the module's in the model, whose
    innermost part that is a transformers model knows the values. Raises NotAChainError for a tensor that it leaves as
    it was, because that is made with the whole model (Falcon-H1's multipliers).
    """
    from transformers import PreTrainedModel, initialization

    tensors = [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]
    absent = {key: tensor for key, tensor in tensors if tensor.is_meta and (only is None or key in only)}
    if not absent:
        return
    models = [(n, m) for n, m in skeleton.named_modules() if isinstance(m, PreTrainedModel)]
    owner = [m for n, m in models if f"{name}.".startswith(f"{n}." if n else "")][-1]
    made: list[dict[str, torch.Tensor]] = []
    for before in (0, 1):  # what is not written differs
        for key, tensor in absent.items():
            _put(module, key, torch.full_like(tensor, before, device="cpu"))
        with torch.no_grad(), initialization.guard_torch_init_functions():
            owner._init_weights(module)
        made.append({key: getattr(module, key).detach() for key in absent})
    for key, tensor in made[0].items():
        if not torch.equal(tensor, made[1][key]):
            raise NotAChainError(
                f"{type(skeleton).__name__} makes {name}.{key} with the whole model, not with its block"
            )
        _put(module, key, tensor.to(device))


def _put(module: nn.Module, key: str, tensor: torch.Tensor) -> None:
    setattr(module, key, nn.Parameter(tensor, requires_grad=False) if key in module._parameters else tensor)


Named = list[tuple[str, nn.Module]]  # modules with their names in the model


def filled_rest(skeleton: Any, prefix: str, fill: Callable[[Named], None], device: torch.device) -> Any:
    """A copy of a model without storage, all but its blocks, whose list is `prefix`, filled and on the device."""
    model = copy_of(skeleton, skeleton)
    outside = [(n, m) for n, m in model.named_modules() if block_of(f"{n}.", prefix) is None]
    fill(outside)
    model.tie_weights()
    for name, module in outside:
        initialize(model, name, module, device)
    return model


def filled_block(
    skeleton: Any, blocks: Sequence[nn.Module], i: int, prefix: str, fill: Callable[[Named], None], device: torch.device
) -> nn.Module:
    """A copy of block `i`, filled and on the device; nobody else holds it."""
    block = copy_of(blocks[i], skeleton)
    inside = list(block.named_modules(prefix=f"{prefix}.{i}"))
    fill(inside)
    for name, module in inside:
        initialize(skeleton, name, module, device)
    return block
