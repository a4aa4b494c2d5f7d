"""Launching wide_linear.cu for the experts of a mixture: every block takes a slot of routes.py, one expert's pairs."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from qbench.kernels import cuda, nvrtc
from qbench.kernels.blocks import WidePlan
from qbench.kernels.routes import Routes
from qbench.kernels.tiles import COLUMNS, ROWS, Tiles


class _Problem(ctypes.Structure):  # of wide_linear.cu, with EXPERTS
    _fields_ = [
        *cuda._fields(ctypes.c_void_p, "tiles", "x", "codebook", "bias", "y"),
        ("t_up", ctypes.c_float),
        *cuda._fields(ctypes.c_int, "M", "N", "strips", "chunks", "per", "stages"),
        ("slots", ctypes.c_void_p),
    ]


def plan(routes: Routes, tiles: Tiles, device: int) -> WidePlan | None:
    """How the product with a stack is cut into blocks; None if nothing fits."""
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return _plan(routes.rows, *tiles.shape[-2:], (tiles.nbits, tiles.group_size, tiles.has_zero), limit)


@cache
def _plan(rows: int, N: int, K: int, form: tuple[int, int, bool], limit: int) -> WidePlan | None:
    """Two blocks a multiprocessor, so that one ends while another begins; large slots hold so much of x that one with
    more rows of the weight is better (docs/lab/mixtures.md).
    """
    chunks, strips = -(-K // COLUMNS), -(-N // ROWS)
    groups, at_a_time = {192: (3, 1), 128: (4, 1)}.get(rows, (2, 2))
    for stages in (4, 3, 2) if at_a_time == 2 else (3, 2):
        one = WidePlan(rows // 8, min(groups, -(-strips // 4)), 1, 1, stages)
        if at_a_time * (one.shared_bytes(rows, chunks, *form) + 1024) <= limit or stages == 2:
            return one if one.shared_bytes(rows, chunks, *form) <= limit else None
    return None


def linear(x: Tensor, tiles: Tiles, routes: Routes, gather: bool, chosen: WidePlan) -> Tensor:
    """y `[pairs, N]` in sorted order; x fp16 or bf16 is `[tokens, K]` with `gather`, else `[pairs, K]` and sorted."""
    N, K = tiles.shape[-2:]
    strips, chunks = tiles.data.shape[-3:-1]
    pairs, slots, device = len(routes.token), len(routes.slots), x.device.index
    y = x.new_empty(pairs, N)
    shape = {"NB": chosen.batch_blocks, "GROUPS": chosen.warpgroups, "WK": chosen.splits_in_block}
    defines = cuda._linear_defines(tiles, x.dtype, EXPERTS=1, **shape)
    image = x.new_empty(slots * routes.rows * chunks * COLUMNS)
    address, down = cuda._address, cuda._down(x.dtype, tiles)
    token = routes.token if gather else None
    pointers = (x, tiles.input_scale, tiles.permutation, image)
    nvrtc.launch(
        nvrtc.load("tile_input", device, defines),
        (pairs, -(-chunks // 8), 1),
        128,
        0,
        cuda._stream(x.device),
        [
            *(ctypes.c_void_p(address(part)) for part in pointers),
            *(ctypes.c_uint64(x.stride(0)), ctypes.c_int(K), ctypes.c_int(chunks), ctypes.c_float(down)),
            *(ctypes.c_void_p(address(part)) for part in (token, routes.expert, routes.row)),
        ],
        early=cuda.EARLY_START,
    )
    problem = _Problem(
        *map(address, (tiles.data, image, tiles.codebook, None, y)),
        1 / down,
        *(pairs, N, strips, chunks, -(-chunks // chosen.splits), chosen.stages),
        address(routes.slots),
    )
    nvrtc.launch(
        nvrtc.load("wide_linear", device, defines),
        (-(-strips // (4 * chosen.warpgroups)) * chosen.splits, slots, 1),
        128 * chosen.warpgroups * chosen.splits_in_block + 32,
        chosen.shared_bytes(routes.rows, chunks, tiles.nbits, tiles.group_size, tiles.has_zero),
        cuda._stream(x.device),
        [problem],
        chosen.splits,
        early=cuda.EARLY_START,
    )
    return y
