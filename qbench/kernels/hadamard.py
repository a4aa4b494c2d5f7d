"""The rotation of a layer's input, R^T x: signs and the fast Walsh-Hadamard transform of format/rotation.py, in one go.

    rotate(x [..., in], rotation) -> [..., in] in x's dtype

A program holds one block of one row in registers, in fp32, and goes through the same sums and differences in the same
order as the reference: in fp32 both agree to the bit. Blocks up to LARGEST_BLOCK; a larger one is left to the
reference, as is every tensor off the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.format.rotation import Rotation

LARGEST_BLOCK = 4096


@triton.jit
def _round(values, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Sums and differences of the elements of `values` `[BLOCK]` that are STEP apart."""
    pairs = tl.permute(tl.reshape(values, (BLOCK // (2 * STEP), 2, STEP)), (0, 2, 1))
    first, second = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), (BLOCK,))


@triton.jit
def _rotate(x, signs, y, columns, norm, SIGNED: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * columns + channel
    values = tl.load(x + at).to(tl.float32)
    if SIGNED:
        minus = (tl.load(signs + channel // 8).to(tl.int32) >> (channel % 8)) & 1
        values = tl.where(minus == 1, -values, values)
    for i in tl.static_range(ROUNDS):
        values = _round(values, BLOCK, 1 << i)
    tl.store(y + at, (values * norm).to(y.dtype.element_ty))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x `[..., in]` as the rotated weight `[out, in]` is multiplied with it, on x's device; in x's dtype."""
    x = x.contiguous()
    y, columns, block = torch.empty_like(x), x.shape[-1], rotation.block
    signs = x if rotation.signs is None else rotation.signs
    with torch.cuda.device_of(x):
        _rotate[(x.numel() // columns, columns // block)](
            x, signs, y, columns, block**-0.5,
            SIGNED=rotation.signs is not None, BLOCK=block, ROUNDS=block.bit_length() - 1,
            num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip
    return y
