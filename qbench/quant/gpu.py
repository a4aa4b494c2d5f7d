"""Decides between the fused Triton kernels of qbench.kernels and plain torch, which is the reference for them.

The kernels take weights on a CUDA device when Triton can be imported, by default with the settings that were compared
with a CPU on a real GPU. QBENCH_KERNELS=all in the environment adds what so far agreed in Triton's interpreter alone
(other bits and groups, aux in int8, GPTQ on fixed grids; `pytest -m gpu tests/kernels` proves it), QBENCH_KERNELS=0
keeps everything on plain torch. The choice never changes what is computed.
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


def enabled(tensor: Tensor, proved: bool) -> bool:
    """Whether a kernel may run on this tensor, with settings that were `proved` on a GPU or not."""
    wanted = os.environ.get("QBENCH_KERNELS", "1")
    return tensor.is_cuda and has_triton() and (wanted == "all" or (wanted != "0" and proved))


def usual(nbits: int, group_size: int, symmetric: bool, aux_dtype: str) -> bool:
    """The settings of rounding that were proved on a GPU: those of the benchmark."""
    return (nbits, group_size, symmetric, aux_dtype) == (4, 64, False, "fp16")


def fused(weight: Tensor, width: int, proved: bool) -> bool:
    """Whether the kernels take a weight `[out, in]` in groups of `width` columns.

    A group must start on a byte of packed codes at every bit-width, hence whole bytes of one bit per code.
    """
    return (
        enabled(weight, proved)
        and weight.ndim == 2
        and weight.dtype in FLOATS
        and weight.stride(1) == 1
        and width <= WIDEST
        and (width % 8 == 0 or width >= weight.shape[1])
    )
