"""A rotation of x on the GPU: which kernels take it on their way or undo it in W, and one that does nothing else."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from qbench.format.rotation import Rotation
from qbench.kernels import cuda, nvrtc
from qbench.kernels.blocks import AnyPlan, PromptPlan
from qbench.kernels.tiles import COLUMNS, Tiles

MOST_ROTATED = 1024  # columns of a rotation's block that a warp can take; see rotate.cuh


def takes(tiles: Tiles, chosen: AnyPlan, M: int) -> bool:
    """Whether `cuda.linear` can rotate M rows of x itself, on their way to x * t; else they are handed in rotated.

    Of one row every block rotates the columns that it multiplies, which then have to be whole blocks of the rotation.
    """
    if tiles.rotation is None:
        return True
    if isinstance(chosen, PromptPlan):  # which reads x as it is
        return False
    columns = -(-tiles.data.shape[-2] // chosen.splits) * COLUMNS
    within = M > 1 or chosen.splits == 1 or columns % tiles.rotation.block == 0
    return can_rotate(tiles.rotation) and tiles.permutation is None and within


def can_rotate(rotation: Rotation) -> bool:
    return 8 <= rotation.block <= MOST_ROTATED


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x R `[M, K]` for x `[M, K]`, fp16 or bf16, by itself; of a rotation that it `can_rotate`."""
    y, (M, K), turns = x.new_empty(x.shape), x.shape, max(1, rotation.block // 256)
    chunks = -(-K // COLUMNS)
    defines = cuda._defines(4, 64, True, False, BF16=int(x.dtype == torch.bfloat16), ROTATE=rotation.block)
    arguments = [ctypes.c_void_p(cuda._address(part)) for part in (x, rotation.signs, y)]
    arguments += [ctypes.c_uint64(x.stride(0)), ctypes.c_int(K), ctypes.c_int(chunks)]
    function, grid = nvrtc.load("rotate_input", x.device.index, defines), (M, -(-chunks // (8 * turns)), 1)
    nvrtc.launch(function, grid, 128, 2048 * turns, cuda._stream(x.device), arguments, early=cuda._early(x.device))
    return y


def undoes(tiles: Tiles, dtype: torch.dtype) -> bool:
    """Whether `cuda.dequantize` can give W in its own basis: in bf16, whose rounding hides fp16's on the way."""
    if tiles.rotation is None:
        return True
    return dtype == torch.bfloat16 and can_rotate(tiles.rotation) and tiles.permutation is None
