"""Models on the meta device: made, copied, and given the values that no file holds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def make(config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """The configuration's causal language model without any weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval().requires_grad_(False)


def copy_of(module: nn.Module, skeleton: Any) -> Any:
    """A copy of `skeleton` or of a part of it; it shares the configurations, so a model's settings reach its blocks."""
    configs = {id(part.config): part.config for part in skeleton.modules() if hasattr(part, "config")}
    return copy.deepcopy(module, configs)


def initialize(skeleton: Any, name: str, module: nn.Module, device: torch.device) -> None:
    """Brings what is left on the meta device of one module to `device`, with the values that the model itself gives it.

    Those are rotary frequencies, causal masks and the like, which from_pretrained makes in the same way. They are made
    on the CPU, since another device rounds its powers otherwise. Submodules are left alone, as are tensors that carry
    transformers' mark of having been loaded. `name` is the module's in the model, whose innermost part that is a
    transformers model knows the values.
    """
    from transformers import PreTrainedModel, initialization

    tensors = [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]
    absent = [key for key, tensor in tensors if tensor.is_meta]
    if not absent:
        return
    for key in absent:
        empty = torch.empty_like(getattr(module, key), device="cpu")
        setattr(module, key, nn.Parameter(empty, requires_grad=False) if key in module._parameters else empty)
    models = [(n, m) for n, m in skeleton.named_modules() if isinstance(m, PreTrainedModel)]
    owner = [m for n, m in models if f"{name}.".startswith(f"{n}." if n else "")][-1]
    with torch.no_grad(), initialization.guard_torch_init_functions():
        owner._init_weights(module)
    for key in absent:
        made = getattr(module, key).to(device)
        setattr(module, key, nn.Parameter(made, requires_grad=False) if key in module._parameters else made)
