"""`quantizer=noise`: the original with rounding noise of its own precision after every block, the floor of a board.

Two programs that run one model in one precision do not agree to the bit: sums are taken in another order, and every
rounding falls a little elsewhere. What that does to a KL or a perplexity is measured here, by multiplying what each
block gives out by 1 + s g, g standard normal and seeded: a variant of a pass like any other, in which nothing is
quantized. A difference between two methods that is no larger than this one's to the original says nothing of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.quant.original import Original

# standard deviation s: in 16 bit a quarter of the spacing of numbers just above 1, about that of one rounding, and in
# fp32 half of it, that of a sum's few roundings
SPREAD = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-24, torch.float64: 2**-53}


@dataclass(frozen=True)
class Noise(Original):
    """The same seed, block and batch give the same noise, whatever else is in the pass."""

    seed: int = 0

    def after_block(self, states: Tensor, i: int, batch: int) -> None:
        """Changes what block `i` gave out for a batch, `[rows, tokens, hidden]`, in place."""
        hashed = hashlib.sha256(f"{self.seed} {i} {batch}".encode()).digest()
        generator = torch.Generator(states.device).manual_seed(int.from_bytes(hashed[:4]))
        wide = torch.float32 if states.dtype.itemsize == 2 else torch.float64  # which holds the noise
        for row in states:
            factor = torch.randn(row.shape, generator=generator, device=row.device, dtype=wide)
            row.copy_(row.to(wide) * factor.mul_(SPREAD[row.dtype]).add_(1))
