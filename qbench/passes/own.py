"""What a variant has in place of the original's other parameters: norms, biases, routers, embeddings, head.

A quantizer that only rounds linears has none of its own. A file that somebody else made may hold all of them, and they
are used where they are not the original's, bit for bit, and reported (record/quantization.py OtherRow).
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import PointError
from qbench.format.format import Format
from qbench.quant.quantizer import Quantizer
from qbench.record.quantization import OtherRow

EMBEDDING, HEAD, REST = "embedding", "head", "rest"


def has_own(quantizer: Quantizer) -> bool:
    """Whether it may have any; most say nothing about other parameters."""
    return type(quantizer).in_place_of is not Quantizer.in_place_of


def sharing(block: nn.Module) -> nn.Module:
    """A copy of a block's structure over the same tensors and configurations."""
    return copy.deepcopy(block, {id(t): t for t in (*block.parameters(), *block.buffers())} | configs_of(block))


def configs_of(block: nn.Module) -> dict[int, Any]:
    """The configurations that parts of a module hold, as a memo for a deep copy that shares them."""
    return {id(part.config): part.config for part in block.modules() if hasattr(part, "config")}


def take_own(
    module: nn.Module, quantizer: Quantizer, prefix: str = "", without: Collection[str] = (), places: Any = None
) -> list[OtherRow]:
    """Puts the quantizer's own parameters in their places in `module`, whose name begins with `prefix`.

    The module's own tensors are not written: it holds others afterwards. `without` are the full names of parameters
    that are left alone. `places` is the model whose embedding and head are told from the rest. A parameter that the
    module holds under two names stays one, unless the quantizer has one for each. Raises PointError for what does not
    fit.
    """
    if not has_own(quantizer):
        return []
    named = [(n, p) for n, p in module.named_parameters(remove_duplicate=False) if prefix + n not in without]
    rows: list[OtherRow] = []
    new: dict[int, nn.Parameter] = {}
    for first in (True, False):  # then the other names of what has been replaced
        for name, old in named:
            if not first and (id(old) not in new or _get(module, name) is not old):
                continue
            own = _own(quantizer, prefix + name, old) if first else None
            if own is not None:
                made, row = _made(prefix + name, old, own, _place(module, name, places))
                if row is not None:
                    rows.append(row)
                new.setdefault(id(old), made)
                _put(module, name, made)
            elif not first:
                _put(module, name, new[id(old)])
    return rows


def _own(quantizer: Quantizer, name: str, old: Tensor) -> Format | Tensor | None:
    try:
        return quantizer.in_place_of(name, old)
    except ValueError as error:
        raise PointError(f"{name}: {error}") from error


def _made(name: str, old: Tensor, own: Format | Tensor, place: str) -> tuple[nn.Parameter, OtherRow | None]:
    """The parameter, and what is to be said of it: nothing where it is the original's, in 16 bit or more."""
    dense = own.to(old.device) if isinstance(own, Tensor) else own.dequantize(torch.float32).to(old.device)
    if tuple(dense.shape) != tuple(old.shape):
        raise PointError(f"{name}: the variant has the shape {list(dense.shape)}, the model {list(old.shape)}")
    made = dense.to(old.dtype)
    if not torch.isfinite(made).all():
        raise PointError(f"{name}: what the variant has in its place holds NaN or Inf")
    quantized = isinstance(own, Format)
    if not quantized and torch.equal(made, old):
        return nn.Parameter(made, requires_grad=False), None
    norm = torch.linalg.vector_norm(old.float())
    error = torch.linalg.vector_norm(made.float() - old.float()) / norm.clamp_min(torch.finfo(torch.float32).tiny)
    stored = own.nbytes if isinstance(own, Format) else 2 * own.numel()
    kind = (own.method or own.name) if isinstance(own, Format) else str(own.dtype).removeprefix("torch.")
    return nn.Parameter(made, requires_grad=False), OtherRow(name, place, old.numel(), stored, kind, float(error))


def _place(module: nn.Module, name: str, model: Any) -> str:
    if model is None:
        return REST
    holder, _, key = name.rpartition(".")
    part = module.get_submodule(holder)
    if isinstance(part, nn.Embedding) and key == "weight":
        return EMBEDDING
    return HEAD if part is model.get_output_embeddings() and key == "weight" else REST


def _get(module: nn.Module, name: str) -> Tensor:
    holder, _, key = name.rpartition(".")
    return getattr(module.get_submodule(holder), key)


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    holder, _, key = name.rpartition(".")
    setattr(module.get_submodule(holder), key, parameter)
