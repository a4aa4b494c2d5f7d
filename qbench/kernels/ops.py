"""The ops that QuantLinear and QuantExperts call, registered with torch.library under `qbench::`.

    dual_linear(x [..., in], tiles) -> [..., out]                  y = (x t) (scale (codes - zero))^T + bias
    dual_linear_experts(x [tokens, in], index [tokens, k], tiles of a stack) -> [tokens, k, out]

Accumulation is in fp32 and deterministic. On CUDA, fp16 and bf16: up to FUSED_BATCH rows of x a fused kernel, above
it one kernel that writes W in x's dtype and cuBLAS; fp32 always dequantizes. On the CPU: unpack, then fp32 matmul. The
ops have fake implementations, so they work under torch.compile(fullgraph=True); in a CUDA graph they need one eager
call of the same shape before the capture, which compiles the kernels.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from qbench.kernels import blocks, cuda
from qbench.kernels import tiles as layout
from qbench.kernels.tiles import Tiles

FUSED_BATCH = 512  # above it, dequantizing once and cuBLAS is as fast on an H200 (docs/performance.md)
TRITON_BATCH = 64  # the same for the Triton kernels
EXPERT_PAIRS = 64  # (token, expert) pairs that one grouped launch serves; more go expert by expert
HALF = (torch.float16, torch.bfloat16)


def linear(x: Tensor, tiles: Tiles, bias: Tensor | None = None) -> Tensor:
    """x `[..., in]` times the weight `[out, in]` in `tiles`, plus bias `[out]`; in x's dtype."""
    return dual_linear(x, *_parts(tiles), bias, *tiles.numbers)


def linear_experts(x: Tensor, index: Tensor, tiles: Tiles) -> Tensor:
    """x `[tokens, in]` times matrices index `[tokens, k]` of a stack `[experts, out, in]`: `[tokens, k, out]`."""
    return dual_linear_experts(x, index, *_parts(tiles), *tiles.numbers)


def wanted() -> bool:
    """Whether the environment lets the kernels run: QBENCH_KERNELS=0 asks for plain torch."""
    return os.environ.get("QBENCH_KERNELS", "1") != "0"


def backend(device: torch.device, dtype: torch.dtype) -> str:
    """What multiplies with tiles on `device`, for activations of `dtype`."""
    if device.type != "cuda":
        return "unpack + matmul"
    which = "cuda" if cuda.refusal(device.index or 0) is None else "triton" if _has_triton() else "torch"
    if dtype not in HALF or which == "torch":
        return f"dequantize ({which}) + matmul"
    limit = FUSED_BATCH if which == "cuda" else TRITON_BATCH
    return f"dual_linear ({which}), dequantize + matmul above batch {limit}"


def _parts(tiles: Tiles) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return tiles.data, tiles.input_scale, tiles.codebook, tiles.permutation


@torch.library.custom_op("qbench::dual_linear", mutates_args=())
def dual_linear(
    x: Tensor,
    data: Tensor,
    input_scale: Tensor | None,
    codebook: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    rows: int,
    columns: int,
    nbits: int,
    group_size: int,
    has_zero: bool,
    exponent: int,
) -> Tensor:
    """The op behind `linear`; `data` and what follows are the fields of Tiles. This is the CPU's implementation."""
    tiles = Tiles.over(data, input_scale, codebook, permutation, rows, columns, nbits, group_size, has_zero, exponent)
    _check(x, columns)
    y = F.linear(x.float(), layout.dequantize(tiles), None if bias is None else bias.float())
    return y.to(x.dtype)


@dual_linear.register_fake
def _(x, data, input_scale, codebook, permutation, bias, rows, columns, nbits, group_size, has_zero, exponent):
    return x.new_empty(*x.shape[:-1], rows)


@dual_linear.register_kernel("cuda")
def _(x, data, input_scale, codebook, permutation, bias, rows, columns, nbits, group_size, has_zero, exponent):
    tiles = Tiles.over(data, input_scale, codebook, permutation, rows, columns, nbits, group_size, has_zero, exponent)
    _check(x, columns)
    flat = x.reshape(-1, columns)
    return _linear_on_gpu(flat, tiles, bias).view(*x.shape[:-1], rows)


@torch.library.custom_op("qbench::dual_linear_experts", mutates_args=())
def dual_linear_experts(
    x: Tensor,
    index: Tensor,
    data: Tensor,
    input_scale: Tensor | None,
    codebook: Tensor | None,
    permutation: Tensor | None,
    rows: int,
    columns: int,
    nbits: int,
    group_size: int,
    has_zero: bool,
    exponent: int,
) -> Tensor:
    """The op behind `linear_experts`: expert by expert, reading back which are needed."""
    tiles = Tiles.over(data, input_scale, codebook, permutation, rows, columns, nbits, group_size, has_zero, exponent)
    return _expert_by_expert(x, index, tiles)


@dual_linear_experts.register_fake
def _(x, index, data, input_scale, codebook, permutation, rows, columns, nbits, group_size, has_zero, exponent):
    return x.new_empty(*index.shape, rows)


@dual_linear_experts.register_kernel("cuda")
def _(x, index, data, input_scale, codebook, permutation, rows, columns, nbits, group_size, has_zero, exponent):
    tiles = Tiles.over(data, input_scale, codebook, permutation, rows, columns, nbits, group_size, has_zero, exponent)
    if x.dtype in HALF and 0 < index.numel() <= EXPERT_PAIRS and cuda.refusal(x.device.index) is None:
        _check(x, columns)
        plan = blocks.plan(1, rows, columns, tiles, x.device.index)
        if plan is not None:
            with torch.cuda.device(x.device):
                return cuda.experts(_unit_stride(x), index, tiles, plan).view(*index.shape, rows)
    return _expert_by_expert(x, index, tiles)


def _expert_by_expert(x: Tensor, index: Tensor, tiles: Tiles) -> Tensor:
    _check(x, tiles.shape[-1])
    y = x.new_empty(*index.shape, tiles.shape[-2])
    for expert in index.unique().tolist():
        token, slot = torch.where(index == expert)
        y[token, slot] = linear(x[token], select(tiles, expert))
    return y


def select(tiles: Tiles, index: int) -> Tiles:
    """One matrix of a stack, as views."""
    return Tiles(
        tiles.data[index],
        tiles.shape[1:],
        tiles.nbits,
        tiles.group_size,
        tiles.has_zero,
        None if tiles.input_scale is None else tiles.input_scale[index],
        tiles.codebook,
        None if tiles.permutation is None else tiles.permutation[index],
        tiles.exponent,
    )


def _check(x: Tensor, columns: int) -> None:
    if x.shape[-1] != columns:
        raise ValueError(f"x must be [..., {columns}], got {list(x.shape)}")


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _linear_on_gpu(x: Tensor, tiles: Tiles, bias: Tensor | None) -> Tensor:
    device = x.device.index
    if not len(x):
        return x.new_empty(0, tiles.shape[0])
    native = cuda.refusal(device) is None
    with torch.cuda.device(x.device):
        if x.dtype in HALF and len(x) <= FUSED_BATCH:
            bias = None if bias is None else bias.to(x.dtype).contiguous()
            plan = blocks.plan(len(x), *tiles.shape, tiles, device) if native else None
            if plan is not None:
                return cuda.linear(_unit_stride(x), tiles, bias, plan)
            if len(x) <= TRITON_BATCH and _has_triton():
                from qbench.kernels import triton_linear

                y = triton_linear.linear(_unit_stride(x), tiles)
                return y if bias is None else y + bias
        weight = _dequantize_on_gpu(tiles, x.dtype, native)
        if tiles.permutation is not None:
            x = x.index_select(-1, tiles.permutation)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _dequantize_on_gpu(tiles: Tiles, dtype: torch.dtype, native: bool) -> Tensor:
    """W `[out, in]` in stored column order; the allocator hands the same buffer to layer after layer."""
    computed = dtype if dtype in (*HALF, torch.float32) else torch.float32
    if native:
        return cuda.dequantize(tiles, computed).to(dtype)
    if _has_triton():
        from qbench.kernels import triton_linear

        return triton_linear.dequantize(tiles, computed).to(dtype)
    weight = layout.dequantize(tiles, dtype)
    return weight if tiles.permutation is None else weight.index_select(-1, tiles.permutation)


def _has_triton() -> bool:
    from torch.utils._triton import has_triton_package

    return has_triton_package()
