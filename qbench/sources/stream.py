"""A model's weights a block at a time, so that neither a GPU nor host memory ever holds the model."""

from __future__ import annotations

import typing
from typing import Any

from torch import nn

from qbench.model.blocks import find_blocks


class Stream(typing.Protocol):
    """What `Source.stream` gives: folder.Folder and the random shapes are such, and Whole of a model that is here."""

    prefix: str  # name of the list of blocks, as in `model.layers`
    resident: bool  # the blocks are the model's own and stay where they are; else each is new and may be let go

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
    """A model that is in memory, as a stream: its blocks are its own, and stay."""

    resident = True

    def __init__(self, model: Any) -> None:
        """Raises NotAChainError for a model without a list of blocks of their own."""
        self.model = model
        self.prefix, self._blocks = find_blocks(model)

    def __len__(self) -> int:
        return len(self._blocks)

    def bytes_of_block(self, i: int | None) -> int:
        own = [sum(p.nbytes for p in block.parameters()) for block in self._blocks]
        return own[i] if i is not None else sum(p.nbytes for p in self.model.parameters()) - sum(own)

    def rest(self) -> Any:
        return self.model

    def block(self, i: int) -> nn.Module:
        return self._blocks[i]
