"""Moves the gains of norms into the linears that read them, so that every gain is 1: what a rotation starts from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qbench.transforms.block import Block, Fold
from qbench.transforms.transform import Transform


@dataclass(frozen=True)
class Gains(Transform):
    least: float = 1e-3

    def folds(self, block: Block) -> Iterator[Fold]:
        for norm in block.norms:
            gain = block.module.get_submodule(norm.name).weight + norm.shift
            if bool((gain.abs() >= self.least).all()):
                yield block.scaled(norm, 1 / gain)
