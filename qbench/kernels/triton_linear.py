"""The fused linear and the dequantization in Triton, over the same tiles: for GPUs that dual_linear.cu does not serve.

Every element finds its word by arithmetic, so several lanes load the same word; that is served by the L1 cache and
costs instructions, not bandwidth. Correct everywhere that Triton runs, including its interpreter; not fast.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.kernels.tiles import COLUMNS, Tiles

BLOCK_N, BLOCK_K = 32, 32


@triton.jit
def _decode(
    words,
    halves,
    codebook,
    rows,
    columns,
    chunks,
    BITS: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr,
):
    """scale * (code - zero) in fp32 for `rows` [n] x stored `columns` [k]; both must lie within the padded weight."""
    PARTS: tl.constexpr = 2 if ZERO else 1
    CHUNK: tl.constexpr = 256 * BITS + PER_CHUNK * 32 * PARTS
    n, k = rows[:, None], columns[None, :]
    tile = (n // 16).to(tl.int64) * chunks + k // 128
    r, g = (n % 16) // 8, n % 8
    unit, tig, j = (k % 128) // 32, (k % 32) // 8, k % 8
    lane = 4 * g + tig
    pair, half = j // 2, 16 * (j % 2)
    word = tile * (CHUNK // 4)
    if BITS == 8:
        q = (tl.load(words + word + 128 * unit + 4 * lane + 2 * r + j // 4) >> (8 * (j % 4))) & 255
    elif BITS == 4:
        bit = 4 * j if CODEBOOK else 4 * pair + half
        q = (tl.load(words + word + 128 * (unit // 2) + 4 * lane + 2 * (unit % 2) + r) >> bit) & 15
    elif BITS == 2:
        q = (tl.load(words + word + 4 * lane + 2 * (unit // 2) + r) >> (2 * (4 * (unit % 2) + pair) + half)) & 3
    else:
        place = 4 * unit + pair
        at = word + 2 * lane + r
        q = (tl.load(words + at + 64 * tl.minimum(place // 5, 2)) >> (3 * (place % 5) + half)) & 7
        spare = (tl.load(words + at) >> (15 + half)) & 1
        spare |= ((tl.load(words + at + 64) >> (15 + half)) & 1) << 1
        spare |= ((tl.load(words + at + 128) >> (15 + half)) & 1) << 2
        q = tl.where(place == 15, spare, q)
    group = (k % 128) * PER_CHUNK // 128
    aux = tile * (CHUNK // 2) + 128 * BITS + ((group * 8 + g) * 2 + r) * PARTS
    if CODEBOOK:
        value = tl.load(codebook + q)
    elif ZERO:
        value = q.to(tl.float32) - tl.load(halves + aux + 1).to(tl.float32)
    else:
        value = q.to(tl.float32) - 2 ** (BITS - 1)
    return value * tl.load(halves + aux).to(tl.float32)


@triton.jit
def _linear(
    x,
    words,
    halves,
    t,
    permutation,
    codebook,
    partial,
    M,
    N,
    K,
    chunks,
    x_stride,
    t_down,
    PER_SPLIT: tl.constexpr,
    HAS_T: tl.constexpr,
    PERMUTED: tl.constexpr,
    BITS: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of y `[M, N]` over one split of K, in fp32, to partial `[splits, M, N]`."""
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    padded = (N + 15) // 16 * 16
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(PER_SPLIT * (128 // BLOCK_K)):
        k = split * PER_SPLIT * 128 + step * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = k < K
        source = tl.load(permutation + k, mask=inside, other=0) if PERMUTED else k
        a = tl.load(x + m[:, None] * x_stride + source[None, :], mask=(m[:, None] < M) & inside[None, :], other=0.0)
        if HAS_T:
            factor = tl.load(t + k, mask=inside, other=0.0).to(tl.float32) * t_down
            a = (a.to(tl.float32) * factor[None, :]).to(x.dtype.element_ty)
        rows, columns = tl.minimum(n, padded - 1), tl.minimum(k, chunks * 128 - 1)
        w = _decode(words, halves, codebook, rows, columns, chunks, BITS, PER_CHUNK, ZERO, CODEBOOK)
        total = tl.dot(a, tl.trans(w.to(x.dtype.element_ty)), total)
    at = (split * M + m[:, None]).to(tl.int64) * N + n[None, :]
    tl.store(partial + at, total, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def _dequantize(
    words,
    halves,
    t,
    codebook,
    w,
    N,
    K,
    chunks,
    matrix_bytes,
    HAS_T: tl.constexpr,
    BITS: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    padded, matrix = (N + 15) // 16 * 16, tl.program_id(2).to(tl.int64)
    rows = tl.minimum(n, padded - 1)
    words += matrix * matrix_bytes // 4
    halves += matrix * matrix_bytes // 2
    value = _decode(words, halves, codebook, rows, k, chunks, BITS, PER_CHUNK, ZERO, CODEBOOK)
    if HAS_T:
        value *= tl.load(t + matrix * chunks * 128 + k).to(tl.float32)[None, :]
    at = (matrix * N + n[:, None]) * K + k[None, :]
    tl.store(w + at, value.to(w.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))


def linear(x: Tensor, tiles: Tiles) -> Tensor:
    """y `[M, N]` for x `[M, K]`; the splits of K are summed in a fixed order."""
    M, (N, K) = len(x), tiles.shape
    chunks = tiles.data.shape[-2]
    splits = min(chunks, 8)
    per_split = -(-chunks // splits)
    block_m = 16 if M <= 16 else 32
    partial = torch.empty(splits, M, N, dtype=torch.float32, device=x.device)
    down = 2.0**-tiles.exponent
    _linear[(-(-N // BLOCK_N), splits, -(-M // block_m))](
        x,
        *_views(tiles),
        tiles.input_scale if tiles.input_scale is not None else x,
        tiles.permutation if tiles.permutation is not None else x,
        tiles.codebook if tiles.codebook is not None else x,
        partial,
        M,
        N,
        K,
        chunks,
        x.stride(0),
        down,
        PER_SPLIT=per_split,
        HAS_T=tiles.input_scale is not None,
        PERMUTED=tiles.permutation is not None,
        BLOCK_M=block_m,
        **_constants(tiles),
    )
    return (partial.sum(0) / down).to(x.dtype)


def dequantize(tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """W `[..., N, K]` in `dtype`, in stored column order, t included."""
    N, K = tiles.shape[-2:]
    chunks = tiles.data.shape[-2]
    w = torch.empty(tiles.shape, dtype=dtype, device=tiles.data.device)
    _dequantize[(-(-N // BLOCK_N), chunks * (COLUMNS // BLOCK_K), tiles.data.shape[:-3].numel())](
        *_views(tiles),
        tiles.input_scale if tiles.input_scale is not None else w,
        tiles.codebook if tiles.codebook is not None else w,
        w,
        N,
        K,
        chunks,
        tiles.data.shape[-3:].numel(),
        HAS_T=tiles.input_scale is not None,
        **_constants(tiles),
    )
    return w


def _views(tiles: Tiles) -> tuple[Tensor, Tensor]:
    return tiles.data.view(torch.int32), tiles.data.view(torch.float16)


def _constants(tiles: Tiles) -> dict[str, object]:
    return {
        "BITS": tiles.nbits,
        "PER_CHUNK": COLUMNS // min(tiles.group_size, COLUMNS),
        "ZERO": tiles.has_zero,
        "CODEBOOK": tiles.codebook is not None,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
    }
