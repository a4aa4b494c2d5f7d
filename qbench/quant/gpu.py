"""Decides between the fused Triton kernels of qbench.kernels and plain torch, which is the reference for them.

The kernels take weights on a CUDA device when Triton can be imported; QBENCH_KERNELS=0 in the environment keeps
everything on plain torch. Both compute the same but for the order of sums, which can decide a tie: `pytest -m gpu
tests/kernels` compares them.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDEST_TILE = 256  # columns of a Sinkhorn tile, of which a program holds 16 rows or more
WIDEST = 16384  # columns of a group that one program holds in registers


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def enabled(tensor: Tensor) -> bool:
    """Whether a kernel may run on this tensor."""
    return tensor.is_cuda and has_triton() and os.environ.get("QBENCH_KERNELS", "1") != "0"


def fused(weight: Tensor, width: int) -> bool:
    """Whether the kernels take a weight `[out, in]`, or a stack of them, in groups of `width` columns.

    A group must start on a byte of packed codes at every bit-width, hence whole bytes of one bit per code.
    """
    return (
        enabled(weight)
        and weight.ndim in (2, 3)
        and weight.dtype in FLOATS
        and weight.stride(-1) == 1
        and width <= WIDEST
        and (width % 8 == 0 or width >= weight.shape[-1])
    )
