"""A model that does not fit on the GPU in 16 bits: its linear weights wait in host memory until they are quantized.

Everything else (embeddings, norms, routers, head) is on the GPU from the start. It is little, the blocks are called
with tensors there, and `model.device`, where transformers and lm-eval put the tokens, is the device of the first
parameter: the embeddings'. Once all linears are quantized the whole model is on the GPU like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qbench.model.linears import find_linears


def leave_linears_on_host(model: Any, device: torch.device) -> None:
    """Moves all of a model in host memory to `device` but what will be quantized; tied parameters stay tied."""
    waiting = {id(parameter) for module in _quantizable(model) for parameter in module.parameters()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in waiting:
            tensor.data = tensor.data.to(device)


@contextmanager
def runs_offloaded(model: Any, offloaded: bool) -> Iterator[None]:
    """While it lasts, an offloaded model can be called: each weight is on the GPU while its module computes.

    These are the hooks of accelerate's cpu_offload. They copy when a weight is needed and not before, so a forward
    pass takes as long as copying all weights does. Afterwards the model is as it was.
    """
    if not offloaded:
        yield
        return
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    modules = _quantizable(model)
    try:
        for module in modules:
            cpu_offload(module, execution_device=model.device)
        yield
    finally:
        for module in modules:
            remove_hook_from_module(module, recurse=True)
            # left behind by accelerate; it refers to the module, whose weights would outlive their replacement
            vars(module).pop("forward", None)


def _quantizable(model: Any) -> list[nn.Module]:
    found = find_linears(model)
    return [*found.layers.values(), *found.experts.values()]
