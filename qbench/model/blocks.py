"""Finds a model's list of decoder blocks: what a pass walks over, and what a source reads one at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class NotAChainError(Exception):
    """The model is not a plain chain of blocks; the message is one sentence that says where it breaks."""


def find_blocks(model: Any) -> tuple[str, list[nn.Module]]:
    """The name of the list that holds the decoder blocks, as in `model.layers`, and the blocks in order.

    It is the outermost nn.ModuleList with the most bytes of weights; those on the meta device count as well. Raises
    NotAChainError for a model without such a list, and for blocks that share weights: one block could not be read,
    quantized or dropped without another.
    """
    kind = type(model).__name__
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = {name: module for name, module in lists.items() if not any(name.startswith(f"{o}.") for o in lists)}
    if not outermost:
        raise NotAChainError(f"{kind} keeps no list of blocks")
    name = max(outermost, key=lambda name: sum(tensor.nbytes for tensor in _tensors(outermost[name])))
    blocks = list(outermost[name])
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
    return name, blocks


def block_of(key: str, prefix: str) -> int | None:
    """The number of the block that the tensor `key` belongs to, `prefix` being the list's name; None outside of them.

    >>> block_of("model.layers.17.mlp.up_proj.weight", "model.layers")
    17
    """
    number = key.removeprefix(f"{prefix}.").partition(".")[0]
    return int(number) if key.startswith(f"{prefix}.") and number.isdigit() else None


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
