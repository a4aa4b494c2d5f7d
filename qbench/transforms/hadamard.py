"""`transform=hadamard`: rotations folded into the weights, as QuaRot has them (arXiv 2404.00456), inputs in 16 bit.

Two rotations leave a model's function as it is and cost nothing when it runs:

    the residual stream, x -> x Q    the gains of norms go into what reads them; embedding, head and all that writes to
                                     the stream are turned (passes/turned.py)
    values, head by head             v's rows by H, o's columns by its inverse; heads that share values share H

Q and H are Hadamard matrices with random signs. A width that is no power of two is 2^k * m, m odd: the Hadamard matrix
of 2^k times, as a Kronecker product, a random orthogonal one of m. What reads a product, such as down, would have to be
turned while the model runs, and is left alone; `rotation=hadamard` of a method does that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.format.rotation import hadamard
from qbench.model.linears import matrix
from qbench.transforms.block import Block, Feed, Fold, on_inputs, on_outputs
from qbench.transforms.transform import Transform


@dataclass(frozen=True)
class Hadamard(Transform):
    """`residual` and `values`: which of the two rotations."""

    residual: bool = True
    values: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.residual or self.values):
            raise ValueError("residual=false and values=false together rotate nothing; leave one of them true")

    def basis(self, channels: int, device: torch.device) -> Tensor | None:
        return orthogonal(channels, self.seed).to(device) if self.residual else None

    def folds(self, block: Block) -> Iterator[Fold]:
        for feed in block.feeds if self.values else ():
            if (turned := self._values(block, feed)) is not None:
                yield turned

    def _values(self, block: Block, feed: Feed) -> Fold | None:
        """None unless the feed is one of heads, each of which has a head of values of its own or shares a whole one."""
        channels, heads = feed.channels.tolist(), [list(head) for head in feed.heads]
        values = [[channels[i] for i in head] for head in heads]
        apart = {tuple(head) for head in values}
        if min(map(len, heads)) < 2 or sum(map(len, apart)) != len({c for head in apart for c in head}):
            return None
        device = matrix(block.module.get_submodule(feed.consumer)).device
        turns = {size: orthogonal(size, self.seed).to(device) for size in {len(head) for head in heads}}

        def rows(weight: Tensor) -> Tensor:
            weight = weight.clone()
            for head in map(list, apart):
                weight[head] = turns[len(head)].T @ weight[head]
            return weight

        def columns(weight: Tensor) -> Tensor:
            weight = weight.clone()
            for head in heads:
                weight[:, head] = weight[:, head] @ turns[len(head)]
            return weight

        tensors = on_outputs(block.module, feed.producer, rows) | on_inputs(block.module, feed.consumer, columns)
        return Fold(f"{feed.producer} -> {feed.consumer}", (feed.consumer,), tensors)


def orthogonal(channels: int, seed: int) -> Tensor:
    """A Hadamard matrix with signs, fp32 `[channels, channels]`; Kronecker, of an odd part, a random orthogonal one."""
    random = torch.Generator().manual_seed(seed)
    block = channels & -channels
    signs = torch.randint(0, 2, (channels, 1), generator=random, dtype=torch.float64) * 2 - 1
    odd, _ = torch.linalg.qr(torch.randn(channels // block, channels // block, generator=random, dtype=torch.float64))
    mixed = hadamard(torch.eye(block, dtype=torch.float64), block)
    return (signs * torch.kron(odd.contiguous(), mixed.contiguous())).float()
