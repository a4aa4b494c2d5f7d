"""Linears whose weight a model reads instead of calling them (Mamba's and Jamba's dt_proj), found by watching.

Such a linear cannot be replaced by a packed one, whose weight has no numbers. Which ones those are is told by no
configuration, and the code of a model reads some weights only on paths that are never taken here (training, a fused
kernel). So the model itself is watched for PROBE_TOKENS tokens on the device where it is going to run: every linear
hands out its weight marked, and what is computed with a marked weight outside of that linear's own call is noted.
Asking a weight for its shape or device is not computing with it, a packed one answers that too. The pass costs at most
what the first window of the evaluation does; a model without storage (torch's meta device) is watched the same way,
for a plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qbench.model.linears import Linears, find_linears
from qbench.model.offload import runs_offloaded

PROBE_TOKENS = 8
ASKED = (Tensor.shape.__get__, Tensor.device.__get__)  # what a quantized linear's weight answers as well


class Marked(Tensor):
    """A weight outside of its linear's call: the first computation with it notes the linear."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function not in ASKED:
            for value in _flat((args, kwargs or {})):
                if isinstance(value, Marked):
                    value.reader.append(value.linear)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(tuple(value.values()))
    else:
        yield value


@torch.no_grad()
def mark_read_weights(model: Any, offloaded: bool = False) -> list[str]:
    """Names of the linears whose weight the model reads; from now on `find_linears` leaves them in 16 bit.

    Those of an offloaded model (offload.py) are moved to the model's device: they will not be packed.
    """
    found = find_linears(model)
    with runs_offloaded(model, offloaded), _watched(found) as read:
        tokens = torch.arange(PROBE_TOKENS, device=model.device)[None] % _vocabulary(model)
        model(tokens, use_cache=False)
    names = [name for name in found.layers if name in read]
    for name in names:
        found.layers[name].read_by_model = True
        if offloaded:
            found.layers[name].to(model.device)
    return names


def mark_without_storage(model: Any) -> None:
    """The same for a model on the meta device: experts are stepped over, and what asks for a value is told "no".

    A model that cannot be followed there is left unmarked.
    """
    experts = list(find_linears(model).experts.values())
    for module in experts:
        module.forward = lambda hidden_states, *routing: hidden_states
    try:
        with contextlib.suppress(Exception), _NoValues():
            mark_read_weights(model)
    finally:
        for module in experts:
            del module.forward


class _NoValues(TorchFunctionMode):
    """Answers False where a tensor without storage is asked whether it is true: masks are built either way."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__bool__ and args[0].device.type == "meta":
            return False
        return function(*args, **(kwargs or {}))


@contextmanager
def _watched(found: Linears) -> Iterator[list[str]]:
    """While it lasts, the linears' classes are replaced by ones that hand out marked weights."""
    read: list[str] = []
    kinds = {name: type(layer) for name, layer in found.layers.items()}
    try:
        for name, layer in found.layers.items():
            layer.__class__ = _watching(kinds[name], name, read)
        yield read
    finally:
        for name, layer in found.layers.items():
            layer.__class__ = kinds[name]


def _watching(kind: type[nn.Module], name: str, read: list[str]) -> type[nn.Module]:
    inside = 0

    class Watching(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            inside += 1
            try:
                return super().__call__(*args, **kwargs)
            finally:
                inside -= 1

        def __getattr__(self, key: str) -> Any:
            value = super().__getattr__(key)
            if key != "weight" or inside or not isinstance(value, Tensor):
                return value
            marked = value.detach().as_subclass(Marked)
            marked.reader, marked.linear = read, name
            return marked

    return Watching


def _vocabulary(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]
