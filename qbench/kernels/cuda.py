"""Launching the CUDA C++ kernels of dual_linear.cu: which block shape for which problem, and with which arguments.

They need compute capability 9.0 (bulk copies, clusters). `refusal` says why a device or a machine cannot run them;
ops.py then takes the Triton kernels instead.
"""

from __future__ import annotations

import ctypes
import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qbench.kernels import nvrtc
from qbench.kernels.tiles import COLUMNS, ROWS, Tiles, chunk_bytes

log = logging.getLogger(__name__)

EARLY_START = True  # let a kernel fetch its first weights while the kernel in front of it ends
BUCKETS = (1, 8, 16, 32, 64)
BATCH_PER_BLOCK = 64  # rows of x that one pass over the weights serves


@dataclass(frozen=True)
class Plan:
    """How a problem is cut. `strips * splits_in_block` warps a block; the blocks of one cluster share the same rows."""

    batch_blocks: int  # MB: 8 rows of x each
    strips_per_warp: int  # RT
    strips: int  # warps along the output rows
    splits_in_block: int  # warps along K
    splits: int  # blocks along K, one cluster
    stages: int  # chunks in flight per warp
    ring: bool = False  # in flight to shared memory by bulk copies, instead of to registers

    @property
    def most_warps(self) -> int:
        """In a block: what its accumulators leave of the registers (launch bounds in dual_linear.cu)."""
        return 8 if self.batch_blocks * self.strips_per_warp >= (16 if self.ring else 8) else 16

    def shared_bytes(self, batch: int, chunks: int, nbits: int, group_size: int, has_zero: bool) -> int:
        chunk = chunk_bytes(nbits, group_size, has_zero)
        warps = self.strips * self.splits_in_block
        per = -(-chunks // self.splits)
        rings = -(-warps * self.stages * (self.strips_per_warp * chunk + 8) // 128) * 128 if self.ring else 0
        rows_of_x = batch if self.batch_blocks == 1 and batch < 8 else 8 * self.batch_blocks
        x = rows_of_x * (per * 256 + 64)
        sums = per * (COLUMNS // min(group_size, 64)) * 8 * self.batch_blocks * 8
        rows = ROWS * self.strips_per_warp * self.strips
        partial = self.splits_in_block * 8 * self.batch_blocks * (rows + 4) * 4
        return max(rings + x + sums, partial)


class _Problem(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("tiles", "x", "t", "permutation", "codebook", "bias", "experts", "sums", "y")
        ),
        ("x_stride", ctypes.c_uint64),
        ("t_down", ctypes.c_float),
        ("t_up", ctypes.c_float),
        *(
            (name, ctypes.c_int)
            for name in ("M", "N", "K", "strips", "chunks", "splits_in_block", "stages", "pairs_per_row")
        ),
    ]


@cache
def refusal(device: int) -> str | None:
    """Why the CUDA C++ kernels cannot run on CUDA device `device`; None if they can. Said once in the log."""
    major, minor = torch.cuda.get_device_capability(device)
    reason = None
    if major < 9:
        reason = f"compute capability {major}.{minor} is below 9.0"
    else:
        try:
            nvrtc.load("dequantize", device, _defines(4, 64, True, False, OUT=0))
        except nvrtc.KernelError as error:
            reason = str(error)
    if reason:
        log.warning("the CUDA C++ kernels cannot run here, Triton's take over: %s", reason)
    return reason


def plan(M: int, N: int, K: int, tiles: Tiles, device: int) -> Plan | None:
    """The block shape for x `[M, K]` and W `[N, K]`: from the tuned table, else by rule; None if nothing fits."""
    properties = torch.cuda.get_device_properties(device)
    form = (tiles.nbits, tiles.group_size, tiles.has_zero)
    return _plan(min(M, BATCH_PER_BLOCK), N, K, form, properties.name, properties.shared_memory_per_block_optin)


def table_key(M: int, N: int, K: int, nbits: int) -> str:
    """The name of a tuned entry: batches share one up to 1, 8, 16, 32 and 64."""
    bucket = next(size for size in BUCKETS if size >= M)
    return f"{nbits} bit {N}x{K} batch {bucket}"


@cache
def _table(gpu: str) -> dict[str, list[int]]:
    path = Path(__file__).with_name("plans") / f"{gpu.replace(' ', '-').lower()}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@cache
def _plan(M: int, N: int, K: int, form: tuple[int, int, bool], gpu: str, limit: int) -> Plan | None:
    chunks, strips = -(-K // COLUMNS), -(-N // ROWS)
    tuned = _table(gpu).get(table_key(M, N, K, form[0]))
    if tuned is not None:
        found = Plan(*tuned[:6], bool(tuned[6]))
        if found.shared_bytes(M, chunks, *form) <= limit:
            return found
    blocks = next(size for size in (1, 2, 4, 8) if 8 * size >= M)
    if M == 1:
        shapes = [(1, 4, 4)] if strips >= 512 else [(1, 2, 8)] if strips >= 192 else [(1, 1, 16)]
    elif blocks <= 2:
        shapes = [(1, 4, 4), (1, 4, 2)] if strips >= 192 else [(1, 1, 8)]
    else:
        shapes = [(2, 8, 1), (2, 4, 1)] if blocks == 8 else [(2, 4, 2), (2, 4, 1)]
    for rt, wr, wk in shapes:
        for splits in (1, 2, 4, 8):
            for stages, ring in ((2, True), (1, False)):
                found = Plan(blocks, rt, wr, wk, splits, stages, ring)
                enough = -(-strips // (rt * wr)) * splits >= 120 or splits == 8 or chunks < 4 * splits * wk
                if enough and found.shared_bytes(M, chunks, *form) <= limit:
                    return found
    return None


def linear(x: Tensor, tiles: Tiles, bias: Tensor | None, chosen: Plan) -> Tensor:
    """y `[M, N]` for x `[M, K]`, fp16 or bf16, in one launch."""
    y = x.new_empty(len(x), tiles.shape[-2])
    _launch_linear(x, tiles, bias, y, chosen, blocks_m=-(-len(x) // (8 * chosen.batch_blocks)))
    return y


def experts(x: Tensor, index: Tensor, tiles: Tiles, chosen: Plan) -> Tensor:
    """y `[tokens * k, N]`: row p is x[p // k] times the matrix index[p // k, p % k] of the stack, in one launch."""
    y = x.new_empty(index.numel(), tiles.shape[-2])
    _launch_linear(x, tiles, None, y, chosen, 1, index.int().contiguous(), index.numel() // len(x))
    return y


def _launch_linear(
    x: Tensor,
    tiles: Tiles,
    bias: Tensor | None,
    y: Tensor,
    chosen: Plan,
    blocks_m: int,
    index: Tensor | None = None,
    pairs_per_row: int = 1,
) -> None:
    N, K = tiles.shape[-2:]
    M = len(x) if index is None else 1
    strips, chunks = tiles.data.shape[-3:-1]
    device, stream = x.device.index, _stream(x.device)
    defines = _defines(
        tiles.nbits,
        tiles.group_size,
        tiles.has_zero,
        tiles.codebook is not None,
        GEMM=1,
        BF16=int(x.dtype == torch.bfloat16),
        MB=chosen.batch_blocks,
        RT=chosen.strips_per_warp,
        **({"RING": 1} if chosen.ring else {"DEPTH": chosen.stages}),
    )
    down = 2.0**-tiles.exponent
    stride, t, permutation, sums = x.stride(0), tiles.input_scale, tiles.permutation, None
    if M > 1:  # x * t once for all blocks; a single row is scaled by each block while its weights are on their way
        subs = COLUMNS // min(tiles.group_size, 64)
        scaled = x.new_empty(M, chunks * COLUMNS)
        sums = torch.empty(blocks_m * chunks * subs * 8 * chosen.batch_blocks, 2, dtype=torch.float32, device=x.device)
        arguments = [*map(_pointer, (x, t, permutation, scaled, sums)), ctypes.c_uint64(stride)]
        arguments += [ctypes.c_int(K), ctypes.c_int(chunks), ctypes.c_float(down)]
        scale_input = nvrtc.load("scale_input", device, defines)
        nvrtc.launch(scale_input, (-(-chunks // 8), M, 1), 128, 0, stream, arguments, early=EARLY_START)
        x, stride, t, permutation = scaled, chunks * COLUMNS, None, None
    problem = _Problem(
        *(None if part is None else part.data_ptr() for part in (tiles.data, x, t, permutation, tiles.codebook)),
        *(None if part is None else part.data_ptr() for part in (bias, index, sums, y)),
        stride,
        down,
        1 / down,
        M,
        N,
        K,
        strips,
        chunks,
        chosen.splits_in_block,
        chosen.stages,
        pairs_per_row,
    )
    blocks_n = -(-strips // (chosen.strips_per_warp * chosen.strips))
    nvrtc.launch(
        nvrtc.load("dual_linear", device, defines),
        (blocks_n * chosen.splits, blocks_m, 1 if index is None else index.numel()),
        32 * chosen.strips * chosen.splits_in_block,
        chosen.shared_bytes(M, chunks, tiles.nbits, tiles.group_size, tiles.has_zero),
        stream,
        [problem],
        chosen.splits,
        early=EARLY_START,
    )


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def dequantize(tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """W `[N, K]` in fp16, bf16 or fp32, in stored column order, t included: read once, written once."""
    N, K = tiles.shape
    strips, chunks = tiles.data.shape[-3:-1]
    w = torch.empty(N, K, dtype=dtype, device=tiles.data.device)
    out = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}[dtype]
    defines = _defines(tiles.nbits, tiles.group_size, tiles.has_zero, tiles.codebook is not None, OUT=out)
    function = nvrtc.load("dequantize", w.device.index, defines)
    arguments = [*map(_pointer, (tiles.data, tiles.input_scale, tiles.codebook, w))]
    arguments += [ctypes.c_int(value) for value in (N, K, strips, chunks)]
    stream = _stream(w.device)
    nvrtc.launch(function, (-(-strips * chunks // 8), 1, 1), 256, 0, stream, arguments)
    return w


def _defines(nbits: int, group_size: int, has_zero: bool, codebook: bool, **others: int) -> tuple[tuple[str, int], ...]:
    found = {"BITS": nbits, "GROUP": min(group_size, COLUMNS), "ZERO": int(has_zero), "CODEBOOK": int(codebook)}
    return tuple(sorted((found | others).items()))
