"""Codes of 2, 3, 4 or 8 bits, stored in exactly that many bits.

A code is cut into bit planes whose widths divide a byte: 8 = 8, 4 = 4, 3 = 2 + 1, 2 = 2. Within a plane,
consecutive input channels share a byte, the first in the lowest bits, so a row stays contiguous along `in`
and a kernel reads it with wide loads. Only the last byte of a row can hold padding. The alternative for
3 bits, ten codes in 32 bits, costs 3.2 bits and lets groups of 64 straddle words.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # what a weight may be quantized to
WIDTHS = PLANES | {1: (1,), 6: (4, 2)}  # signs; the codes of two weights at once


def pack(codes: Tensor, nbits: int) -> tuple[Tensor, ...]:
    """Packs integer codes `[..., out, in]` into uint8 planes `[..., out, ceil(in * width / 8)]`, low bits first.

    Raises ValueError for another bit-width, or a code outside `0 .. 2**nbits - 1`.
    """
    if nbits not in WIDTHS:
        raise ValueError(f"nbits must be one of {sorted(WIDTHS)}, got {nbits}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**nbits):
        low, high = int(codes.min()), int(codes.max())
        raise ValueError(f"codes of {nbits} bits lie in 0..{2**nbits - 1}, got {low}..{high}")
    codes = codes.to(torch.uint8)
    planes, shift = [], 0
    for width in WIDTHS[nbits]:
        planes.append(_pack_plane((codes >> shift) & (2**width - 1), width))
        shift += width
    return tuple(planes)


def unpack(planes: tuple[Tensor, ...], nbits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 codes `[..., out, columns]`."""
    codes, shift = None, 0
    for plane, width in zip(planes, WIDTHS[nbits], strict=True):
        part = _unpack_plane(plane, width, columns) << shift
        codes = part if codes is None else codes | part
        shift += width
    assert codes is not None
    return codes


def _pack_plane(values: Tensor, width: int) -> Tensor:
    per_byte = 8 // width
    if per_byte == 1:
        return values.contiguous()
    padding = -values.shape[-1] % per_byte
    values = torch.nn.functional.pad(values, (0, padding)).unflatten(-1, (-1, per_byte))
    packed = values[..., 0].clone()
    for slot in range(1, per_byte):
        packed |= values[..., slot] << (slot * width)
    return packed.contiguous()


def _unpack_plane(plane: Tensor, width: int, columns: int) -> Tensor:
    if width == 8:
        return plane
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
    values = (plane.unsqueeze(-1) >> shifts) & (2**width - 1)
    return values.flatten(-2)[..., :columns]
