"""A model's weights a block at a time, so that neither a GPU nor host memory ever holds the model."""

from __future__ import annotations

import typing
from typing import Any

from torch import nn
from tqdm import tqdm

from qbench.model.blocks import block_of, find_blocks


class Stream(typing.Protocol):
    """What `Source.stream` gives: folder.Folder and random.Drawn are such, and Whole of a model that is in memory."""

    prefix: str  # name of the list of blocks, as in `model.layers`
    resident: bool  # the blocks are the model's own and stay where they are; else each is new and may be let go
    note: str  # as LoadedModel.note: what a reader of its numbers must know

    def __len__(self) -> int: ...

    def bytes_of_block(self, i: int | None) -> int:
        """What block `i` takes where it comes from; None: all that lies outside of the blocks."""
        ...

    def rest(self) -> Any:
        """The model in eval mode, all but its blocks real; its blocks on the meta device unless `resident`."""
        ...

    def block(self, i: int) -> nn.Module:
        """Block `i` in eval mode on the device. Raises PointError when it cannot be read any more."""
        ...


class Whole:
    """The stream of a model that is in memory, in eval mode: what a source has that cannot be read block by block.

    Its blocks may share weights with each other. Raises NotAChainError for a model without a list of blocks.
    """

    resident = True

    def __init__(self, model: Any, note: str = "") -> None:
        self.prefix, self._blocks = find_blocks(model, resident=True)
        self._model, self.note = model, note

    def __len__(self) -> int:
        return len(self._blocks)

    def bytes_of_block(self, i: int | None) -> int:
        """What the parameters of block `i` take in memory, one that blocks share counted in the first of them."""
        return parameter_bytes(self._model, self.prefix, i)

    def rest(self) -> Any:
        """The model itself, its blocks in their places."""
        return self._model

    def block(self, i: int) -> nn.Module:
        return self._blocks[i]


def assembled(stream: Stream, offload: bool = False) -> Any:
    """The whole model of a stream that is not resident, its blocks read one by one, in eval mode on its device.

    With `offload` each block goes to host memory as it comes, so that the device never holds the model.
    """
    model = stream.rest()
    blocks = model.get_submodule(stream.prefix)
    for i in tqdm(range(len(stream)), desc="loading", unit="block"):
        blocks[i] = stream.block(i).to("cpu") if offload else stream.block(i)
    return model


def parameter_bytes(model: Any, prefix: str, i: int | None) -> int:
    """What the parameters of block `i` take, `prefix` being the list's name; None: of all that lies outside of it."""
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if block_of(name, prefix) == i)
