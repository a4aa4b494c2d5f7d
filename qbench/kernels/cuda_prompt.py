"""Launching prompt_linear.cu and ahead_linear.cu: one weight or several of the same columns, whole prompts of x."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from qbench.kernels import cuda, nvrtc
from qbench.kernels.blocks import AheadPlan, PromptPlan
from qbench.kernels.tiles import COLUMNS, Tiles


class _Weight(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tiles", "t", "bias", "y")),
        *((name, ctypes.c_int) for name in ("N", "strips", "first", "unused")),
    ]


@cache
def _problem(together: int) -> type[ctypes.Structure]:
    fields = [("each", _Weight * together), ("codebook", ctypes.c_void_p)]
    fields += [(name, ctypes.c_int) for name in ("M", "chunks", "row_blocks", "x_blocks", "clusters")]
    fields += [(name, ctypes.c_void_p) for name in ("left", "ready")]  # by one block for another
    return type("_Problem", (ctypes.Structure,), {"_fields_": fields})


def linears(
    x: Tensor, weights: Sequence[Tiles], chosen: PromptPlan | AheadPlan, bias: Tensor | None = None
) -> list[Tensor]:
    """y `[M, N]` of each weight for x `[M, K]` in one launch; several are alike, with neither act-order nor bias."""
    ys = [x.new_empty(len(x), each.shape[-2]) for each in weights]
    form, device, share, M = weights[0], x.device, chosen.share, len(x)
    chunks = form.data.shape[-2]
    if form.permutation is not None:
        x = x.index_select(-1, form.permutation)
    if x.stride(0) % 8 or x.data_ptr() % 16:  # of what box copies read, every row starts at a multiple of 16 bytes
        x = F.pad(x, (0, 8 - x.shape[1] % 8))[:, : x.shape[1]]
    shape = {"GROUPS": chosen.warpgroups, "NB": chosen.batch_blocks, "INPUT_SCALE": int(form.input_scale is not None)}
    shape |= chosen.switches(form.group_size, form.has_zero) | {"TOGETHER": len(weights)}
    function = nvrtc.load(chosen.kernel, device.index, cuda._linear_defines(form, x.dtype, **shape))
    shared_bytes = chosen.shared_bytes(M, chunks, form.nbits, form.group_size, form.has_zero)
    problem, row_blocks = _problem(len(weights))(), 0
    for i, (tiles, y) in enumerate(zip(weights, ys, strict=True)):
        strips = tiles.data.shape[-3]
        addresses = map(cuda._address, (tiles.data, tiles.input_scale, bias, y))
        problem.each[i] = _Weight(*addresses, y.shape[1], strips, row_blocks)
        row_blocks += -(-strips // (4 * chosen.warpgroups * share))
    x_blocks = -(-M // (8 * chosen.batch_blocks))
    at_work = nvrtc.clusters_at_work(function, chosen.threads, shared_bytes, share)
    split = isinstance(chosen, PromptPlan) and chosen.split
    clusters = min(row_blocks * x_blocks * (chunks if split else 1), at_work)
    if isinstance(chosen, AheadPlan):
        blocks = row_blocks * share
        left = x.new_empty(blocks * 64 * chosen.warpgroups * chunks * COLUMNS)
        ready = torch.empty(blocks * chunks + 1, dtype=torch.int32, device=device)
        _clear(ready, cuda._linear_defines(form, x.dtype, **shape))
        problem.left, problem.ready = left.data_ptr(), ready.data_ptr()
    elif split:  # what a block leaves of a tile that another one finishes
        warps = clusters * share * 4 * chosen.warpgroups
        left = torch.empty(warps * chosen.batch_blocks * 128, device=device)
        ready = torch.zeros(warps, dtype=torch.int32, device=device)
        problem.left, problem.ready = left.data_ptr(), ready.data_ptr()
    problem.codebook = cuda._address(form.codebook)
    problem.M, problem.chunks, problem.clusters = M, chunks, clusters
    problem.row_blocks, problem.x_blocks = row_blocks, x_blocks
    nvrtc.launch(
        function,
        (clusters * share, 1, 1),
        chosen.threads,
        shared_bytes,
        cuda._stream(device),
        [nvrtc.tensor_map(x, 8 * chosen.batch_blocks // share, COLUMNS // 2), problem],
        share,
        early=cuda._early(device),
    )
    return ys


def _clear(flags: Tensor, defines: cuda.Defines) -> None:
    """By a kernel that starts early, which torch's own does not."""
    arguments = [ctypes.c_void_p(flags.data_ptr()), ctypes.c_int(flags.numel())]
    function, blocks = nvrtc.load("clear_flags", flags.device.index, defines), -(-flags.numel() // 256)
    nvrtc.launch(
        function, (blocks, 1, 1), 256, 0, cuda._stream(flags.device), arguments, early=cuda._early(flags.device)
    )
