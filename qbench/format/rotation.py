"""Rotation: a block Hadamard matrix with signs on the input channels, which spreads outliers before rounding.

    R = D H,   D = diag(+-1) `[in, in]`,   H = diag(H_block, .., H_block) / sqrt(block),   R R^T = 1
    W x = (W R)(R^T x)

A weight is quantized as W R `[out, in]`, the rotated basis, and its input is multiplied as R^T x. Both are the same
walk over the last dimension: signs first, then the fast Walsh-Hadamard transform of every block of `block` adjacent
channels, log2(block) rounds of sums and differences (Fino and Algazi 1976; for outliers: QuIP#, arXiv 2402.04396, and
QuaRot, arXiv 2404.00456). `undo` goes back. The rounds are elementwise, so that a row comes out to the bit the same
whatever stands beside it, and on a GPU as in kernels/hadamard.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.format.packing import pack, unpack


@dataclass(frozen=True)
class Rotation:
    """What a format stores of its rotation: the block, and a bit a channel for the signs; without signs, all plus."""

    block: int  # a power of two that divides the input channels
    signs: Tensor | None = None  # uint8 [in / 8], rounded up; the first channel in the lowest bit, 1 for minus

    @staticmethod
    def seeded(columns: int, block: int, seed: int, device: torch.device | str = "cpu") -> Rotation:
        """Signs for `columns` input channels, drawn on the CPU: the same on every device."""
        drawn = torch.randint(0, 2, (1, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return Rotation(block, _pack_bits(drawn).to(device))

    def __call__(self, values: Tensor) -> Tensor:
        """Rows `[..., in]` in the rotated basis, W R or R^T x: fp32, or fp64 if they are."""
        signs = self._factors(values)
        return hadamard(values if signs is None else values * signs, self.block)

    def undo(self, values: Tensor) -> Tensor:
        """What `__call__` was given, up to rounding."""
        signs = self._factors(values)
        back = hadamard(values, self.block)
        return back if signs is None else back.mul_(signs)

    def _factors(self, like: Tensor) -> Tensor | None:
        """+1 or -1 a channel `[in]`, in the precision of the arithmetic."""
        if self.signs is None:
            return None
        bits = unpack((self.signs,), 1, like.shape[-1])
        return 1 - 2 * bits.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def largest_block(columns: int, limit: int) -> int:
    """The largest power of two that divides `columns` and is at most `limit`; 1 for an odd number."""
    return min(columns & -columns, 1 << (limit.bit_length() - 1))


def hadamard(values: Tensor, block: int) -> Tensor:
    """`[..., in]` times the symmetric, orthonormal H of blocks of `block` channels; a new tensor, fp32 or fp64."""
    wide = values if values.dtype == torch.float64 else values.float()
    # the channels of a block in front: every round then adds and subtracts contiguous rows
    rows = wide.reshape(-1, block).T.clone(memory_format=torch.contiguous_format)
    step = 1
    while step < block:
        first, second = rows.view(block // (2 * step), 2, step, rows.shape[1]).unbind(1)
        difference = first - second
        first += second
        second.copy_(difference)
        step *= 2
    return rows.mul_(block**-0.5).T.reshape(values.shape)


def _pack_bits(bits: Tensor) -> Tensor:
    return pack(bits, 1)[0][0]
