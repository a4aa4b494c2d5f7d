"""Transform: what changes the original's weights but not its function, before they are quantized.

    [project.entry-points."qbench.transforms"]
    mine = "my_package.mine:Mine"

A transform is a frozen dataclass whose fields are its settings (`transform=mine transform.FIELD=`). It is handed one
block after the other (block.py): the block in fp32, with the linears that will be quantized and what has been observed
of them, which norm each reads and which linear feeds which. It yields folds. Each is put in place and verified before
the next is asked for: the block's output may move by LIMIT, relative, in fp32. One that moves it further is taken back,
and the result says so.

    @dataclass(frozen=True)
    class Mine(Transform):
        def folds(self, block):
            for norm in block.norms:
                yield block.scaled(norm, factors)      # the norm's gain times factors, its readers' inputs divided

A transform that turns the residual stream says in which basis; which parameters that changes is not its concern.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from qbench.transforms.block import Block, Fold

LIMIT = 1e-5  # by how much a block's output may move, ||y' - y|| / ||y|| in fp32


@dataclass(frozen=True)
class Transform:
    """Base of every transform; by itself it changes nothing."""

    def folds(self, block: Block) -> Iterator[Fold]:
        """The changes of one block, one after the other; the block has the former ones when it yields the next."""
        return iter(())

    def basis(self, channels: int, device: torch.device) -> Tensor | None:
        """An orthogonal `[channels, channels]` in fp32: the residual stream x becomes x Q. None leaves it as it is."""
        return None

    def choices(self, quantizer: str) -> Sequence[Self]:
        """The settings to choose from by what `quantizer`, a method's name, makes of each on the calibration text."""
        return [self]

    def settings(self) -> dict[str, Any]:
        """The fields, by name."""
        return dict(vars(self))


@dataclass(frozen=True)
class NoTransform(Transform):
    """transform=none: weights are quantized as they are."""
