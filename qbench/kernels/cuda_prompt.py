"""Launching prompt_linear.cu: one weight or several of the same columns, whole prompts of x."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch.nn.functional as F
from torch import Tensor

from qbench.kernels import cuda, nvrtc
from qbench.kernels.blocks import PromptPlan
from qbench.kernels.tiles import COLUMNS, Tiles


class _Weight(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tiles", "t", "bias", "y")),
        *((name, ctypes.c_int) for name in ("N", "strips", "first", "unused")),
    ]


@cache
def _problem(together: int) -> type[ctypes.Structure]:
    fields = [("each", _Weight * together), ("codebook", ctypes.c_void_p)]
    fields += [(name, ctypes.c_int) for name in ("M", "chunks", "row_blocks", "x_blocks", "whole", "clusters")]
    return type("_Problem", (ctypes.Structure,), {"_fields_": fields})


def linears(x: Tensor, weights: Sequence[Tiles], chosen: PromptPlan, bias: Tensor | None = None) -> list[Tensor]:
    """y `[M, N]` of each weight for x `[M, K]` in one launch; several are alike, with neither act-order nor bias."""
    ys = [x.new_empty(len(x), each.shape[-2]) for each in weights]
    form, device, share, M = weights[0], x.device, chosen.share, len(x)
    chunks = form.data.shape[-2]
    if form.permutation is not None:
        x = x.index_select(-1, form.permutation)
    if x.stride(0) % 8 or x.data_ptr() % 16:  # of what box copies read, every row starts at a multiple of 16 bytes
        x = F.pad(x, (0, 8 - x.shape[1] % 8))[:, : x.shape[1]]
    shape = {"GROUPS": chosen.warpgroups, "NB": chosen.batch_blocks, "INPUT_SCALE": int(form.input_scale is not None)}
    shape |= chosen.switches(form.nbits, form.group_size, form.has_zero) | {"TOGETHER": len(weights)}
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
    whole = tiles_of_y = row_blocks * x_blocks
    if share == 2 and chunks > 1 and tiles_of_y % at_work <= at_work // 2:
        whole -= tiles_of_y % at_work  # the rest is parted among twice as many clusters
    clusters = min(2 * tiles_of_y - whole, at_work)
    problem.codebook = cuda._address(form.codebook)
    problem.M, problem.chunks, problem.whole, problem.clusters = M, chunks, whole, clusters
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
