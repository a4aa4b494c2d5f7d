"""Finds a model's list of decoder blocks: what a pass walks over, and what a source reads one at a time."""

from __future__ import annotations

from typing import Any

from torch import nn

from qbench.model.linears import block_list


class NotAChainError(Exception):
    """The model is not a plain chain of blocks; the message is one sentence that says where it breaks."""


def find_blocks(model: Any, resident: bool = False) -> tuple[str, list[nn.Module]]:
    """The name of the list that holds the decoder blocks (linears.py), as in `model.layers`, and the blocks in order.

    Raises NotAChainError for a model without such a list and, unless `resident`, for blocks that share weights: one
    block could not be read, quantized or dropped without another.
    """
    kind = type(model).__name__
    name = block_list(model)
    if name is None:
        raise NotAChainError(f"{kind} keeps no list of blocks")
    blocks = list(model.get_submodule(name))
    if not resident:
        _refuse_shared_weights(model, name)
    return name, blocks


def _refuse_shared_weights(model: Any, name: str) -> None:
    kind = type(model).__name__
    owners: dict[int, int | None] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        place = block_of(f"{path}.", name)
        for part in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            other = owners.setdefault(id(part), place)
            if other != place:
                rest = "the rest of the model" if None in (place, other) else f"its block {other}"
                raise NotAChainError(
                    f"{kind} shares weights of its block {other if place is None else place} with {rest}"
                )
    for pair in model.all_tied_weights_keys.items():
        if any(block_of(key, name) is not None for key in pair):
            raise NotAChainError(f"{kind} ties {pair[0]} to {pair[1]}, a block's weights to others")


def block_of(key: str, prefix: str) -> int | None:
    """The number of the block that the tensor `key` belongs to, `prefix` being the list's name; None outside of them.

    >>> block_of("model.layers.17.mlp.up_proj.weight", "model.layers")
    17
    """
    number = key.removeprefix(f"{prefix}.").partition(".")[0]
    return int(number) if key.startswith(f"{prefix}.") and number.isdigit() else None
