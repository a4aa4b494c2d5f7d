"""A model's weights a block at a time, so that neither a GPU nor host memory ever holds the model."""

from __future__ import annotations

import typing
from typing import Any

from torch import nn


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
