"""The ops behind the kernel of dual-scale, registered with torch.library under `qbench::`.

    dual_linear(x [..., in], tiles) -> [..., out]                  y = (x t) (scale (codes - zero))^T + bias
                                                                   with a rotation R, x R in place of x
    dual_linear_experts(x [tokens, in], index [tokens, k], tiles of a stack) -> [tokens, k, out]

Accumulation is in fp32 and deterministic. On CUDA, fp16 and bf16: the fused kernel that blocks.py chooses by the rows
of x, or, where that is faster, one kernel that writes W in x's dtype and cuBLAS; fp32 always dequantizes. On the CPU:
unpack, then fp32 matmul. The ops have fake implementations, so they work under torch.compile(fullgraph=True); in a CUDA
graph they need one eager call of the same shape before the capture, which compiles the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qbench.kernels import blocks, cuda, cuda_rotate
from qbench.kernels import tiles as layout
from qbench.kernels.tiles import Tiles

TRITON_BATCH = 64  # rows of x up to which the Triton kernel is faster than dequantizing
UNDO_SHARE = 0.3  # rows of x per row of W from which on a rotation is undone in a W that is written, not put on x
EXPERT_PAIRS = 64  # (token, expert) pairs up to which each is multiplied for itself; more are sorted (grouped.py)
HALF = (torch.float16, torch.bfloat16)


def linear(x: Tensor, tiles: Tiles, bias: Tensor | None = None) -> Tensor:
    """x `[..., in]` times the weight `[out, in]` in `tiles`, plus bias `[out]`; in x's dtype."""
    return dual_linear(x, *tiles.flat(), bias)


def linear_experts(x: Tensor, index: Tensor, tiles: Tiles) -> Tensor:
    """x `[tokens, in]` times matrices index `[tokens, k]` of a stack `[experts, out, in]`: `[tokens, k, out]`."""
    return dual_linear_experts(x, index, *tiles.flat())


def linear_both_experts(x: Tensor, index: Tensor, first: Tiles, second: Tiles) -> list[Tensor]:
    """The same for two stacks that read the same x; in one launch where it can be."""
    return dual_linear_both_experts(x, index, *first.flat(), *second.flat())


def wanted() -> bool:
    """Whether the environment lets the kernels run: QBENCH_KERNELS=0 asks for plain torch."""
    return os.environ.get("QBENCH_KERNELS", "1") != "0"


def backend(device: torch.device, dtype: torch.dtype) -> str:
    """What multiplies with tiles on `device`, for activations of `dtype`."""
    if device.type != "cuda":
        return "unpack + matmul"
    runs = [kernel for kernel in cuda.KERNELS if cuda.refusal(device.index or 0, kernel) is None]
    dense = "cuda" if "dequantize" in runs else "triton" if _has_triton() else "torch"
    dense, fused = f"dequantize ({dense}) + matmul", [kernel for kernel in runs if kernel.endswith("_linear")]
    if dtype not in HALF:
        return dense
    if "dual_linear" not in fused and _has_triton():
        return f"dual_linear (triton), {dense} above batch {TRITON_BATCH}"
    if fused == ["dual_linear"]:
        return f"dual_linear (cuda), {dense} above batch {blocks.NARROW}"
    return f"{', '.join(fused)} (cuda) or {dense}, by batch" if fused else dense


@torch.library.custom_op("qbench::dual_linear", mutates_args=())
def dual_linear(x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int], bias: Tensor | None) -> Tensor:
    """The op behind `linear`, over what `Tiles.flat` gives. This is the CPU's implementation."""
    tiles = Tiles.over(tensors, numbers)
    _check(x, tiles)
    x, tiles, dtype = *_rotated(x.float(), tiles), x.dtype
    return F.linear(x, layout.dequantize(tiles), None if bias is None else bias.float()).to(dtype)


@dual_linear.register_fake
def _(x, tensors, numbers, bias):
    return x.new_empty(*x.shape[:-1], Tiles.over(tensors, numbers).shape[-2])


@dual_linear.register_kernel("cuda")
def _(x, tensors, numbers, bias):
    tiles = Tiles.over(tensors, numbers)
    _check(x, tiles)
    return _linear_on_gpu(x.reshape(-1, x.shape[-1]), tiles, bias).view(*x.shape[:-1], tiles.shape[-2])


@torch.library.custom_op("qbench::dual_linear_experts", mutates_args=())
def dual_linear_experts(x: Tensor, index: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tensor:
    """The op behind `linear_experts`; on the CPU expert by expert. Rows of experts that live elsewhere are any."""
    tiles = Tiles.over(tensors, numbers)
    return _expert_by_expert(x, index.clamp_max(tiles.data.shape[0] - 1), tiles)


@dual_linear_experts.register_fake
def _(x, index, tensors, numbers):
    return x.new_empty(*index.shape, Tiles.over(tensors, numbers).shape[-2])


@dual_linear_experts.register_kernel("cuda")
def _(x, index, tensors, numbers):
    return _pairs_on_gpu(x, index, [Tiles.over(tensors, numbers)])[0]


@torch.library.custom_op("qbench::dual_linear_both_experts", mutates_args=())
def dual_linear_both_experts(
    x: Tensor,
    index: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    second_tensors: Sequence[Tensor | None],
    second_numbers: Sequence[int],
) -> list[Tensor]:
    """The op behind `linear_both_experts`."""
    both = (tensors, numbers), (second_tensors, second_numbers)
    return [dual_linear_experts(x, index, *one) for one in both]


@dual_linear_both_experts.register_fake
def _(x, index, tensors, numbers, second_tensors, second_numbers):
    both = Tiles.over(tensors, numbers), Tiles.over(second_tensors, second_numbers)
    return [x.new_empty(*index.shape, tiles.shape[-2]) for tiles in both]


@dual_linear_both_experts.register_kernel("cuda")
def _(x, index, tensors, numbers, second_tensors, second_numbers):
    first, second = Tiles.over(tensors, numbers), Tiles.over(second_tensors, second_numbers)
    if _launch_together(first, second, x.dtype):
        return _pairs_on_gpu(x, index, [first, second])
    return [_pairs_on_gpu(x, index, [tiles])[0] for tiles in (first, second)]


@torch.library.custom_op("qbench::dual_linear_gated_experts", mutates_args=())
def dual_linear_gated_experts(
    gate: Tensor, up: Tensor, index: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]
) -> Tensor:
    """`dual_linear_experts` of silu(gate) * up, `[tokens, in]` both; a compiled mixture comes here (rewrite.py)."""
    return dual_linear_experts(F.silu(gate) * up, index, tensors, numbers)


@dual_linear_gated_experts.register_fake
def _(gate, up, index, tensors, numbers):
    return gate.new_empty(*index.shape, Tiles.over(tensors, numbers).shape[-2])


@dual_linear_gated_experts.register_kernel("cuda")
def _(gate, up, index, tensors, numbers):
    return _pairs_on_gpu(gate, index, [Tiles.over(tensors, numbers)], up)[0]


@torch.library.custom_op("qbench::dual_linear_summed_experts", mutates_args=())
def dual_linear_summed_experts(
    gate: Tensor,
    up: Tensor,
    index: Tensor,
    scores: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    more: Tensor | None,
) -> Tensor:
    """Over a token's pairs the sum of scores times `dual_linear_gated_experts`, as `grouped.combine` adds them up.

    gate, up `[tokens * k, in]`, index and scores `[tokens, k]` -> `[tokens, out]`; plus `more`, of that shape and of
    gate's dtype.
    """
    return _gated_and_added(gate, up, index, scores, tensors, numbers, more)


@dual_linear_summed_experts.register_fake
def _(gate, up, index, scores, tensors, numbers, more):
    return gate.new_empty(len(index), Tiles.over(tensors, numbers).shape[-2])


@dual_linear_summed_experts.register_kernel("cuda")
def _(gate, up, index, scores, tensors, numbers, more):
    tiles, device = Tiles.over(tensors, numbers), gate.device.index
    _check(gate, tiles)
    few = gate.dtype in HALF and 0 < index.numel() <= EXPERT_PAIRS and cuda.refusal(device) is None
    if few and _as_chosen(index) and tiles.rotation is None and gate.is_contiguous() and up.is_contiguous():
        plan = blocks.summed_plan(index.shape[1], tiles, device)
        if plan is not None:
            with torch.cuda.device(gate.device):
                more = None if more is None else more.contiguous()
                return cuda.summed_experts(gate, up, index, scores, tiles, plan, more)
    return _gated_and_added(gate, up, index, scores, tensors, numbers, more)


def _gated_and_added(gate, up, index, scores, tensors, numbers, more):
    from qbench.kernels import grouped

    y = dual_linear_gated_experts(gate, up, index.reshape(-1, 1), tensors, numbers)
    total = grouped.combine(y.flatten(0, 1), index, scores, Tiles.over(tensors, numbers).data.shape[0])
    return total if more is None else total + more


def _as_chosen(index: Tensor) -> bool:
    """Whether a kernel reads it from where it is, and not a copy that the kernel in front may still be writing."""
    return index.dtype == torch.int64 and index.is_contiguous()


def _launch_together(first: Tiles, second: Tiles, dtype: torch.dtype) -> bool:
    """Whether one launch serves both: they differ in nothing but what they hold."""
    alike = first.shape == second.shape and first.nbits == second.nbits and first.group_size == second.group_size
    stored = [[tensor is None for tensor in tiles.flat()[0]] for tiles in (first, second)]
    scaled = dtype == torch.bfloat16 or first.exponent == second.exponent
    own = first.codebook is not None or first.rotation is not None or second.rotation is not None
    return alike and first.has_zero == second.has_zero and stored[0] == stored[1] and scaled and not own


def _pairs_on_gpu(x: Tensor, index: Tensor, stacks: list[Tiles], up: Tensor | None = None) -> list[Tensor]:
    """For each stack `[tokens, k, out]`; in one launch if they are few, else sorted. With `up` of silu(x) * up."""
    tiles, device, pairs = stacks[0], x.device.index, index.numel()
    _check(x, tiles)
    rows, fused = tiles.shape[-2], x.dtype in HALF and 0 < pairs <= EXPERT_PAIRS and cuda.refusal(device) is None
    if up is not None and not (fused and _as_chosen(index) and tiles.rotation is None and x.stride() == up.stride()):
        from qbench.kernels.grouped import silu_times

        x, up = silu_times(x, up), None
    if fused:
        plan = blocks.pair_plan(rows * pairs * len(stacks))
        x, stacks[0] = _rotated(x, tiles)  # there is no second one then
        with torch.cuda.device(x.device):
            x, up = _unit_stride(x), up if up is None else _unit_stride(up)
            return [y.view(*index.shape, rows) for y in cuda.experts(x, index, stacks, plan, up)]
    from qbench.kernels import grouped, routes

    held = routes.route(index, tiles.data.shape[0])
    found = [grouped.dual_linear(x, one, held, gather=True).index_select(0, held.place) for one in stacks]
    return [y.view(*index.shape, rows) for y in found]


def _expert_by_expert(x: Tensor, index: Tensor, tiles: Tiles) -> Tensor:
    _check(x, tiles)
    y = x.new_empty(*index.shape, tiles.shape[-2])
    for expert in index.unique().tolist():
        token, slot = torch.where(index == expert)
        y[token, slot] = linear(x[token], tiles.select(expert))
    return y


def _check(x: Tensor, tiles: Tiles) -> None:
    if x.shape[-1] != tiles.shape[-1]:
        raise ValueError(f"x must be [..., {tiles.shape[-1]}], got {list(x.shape)}")


def _rotated(x: Tensor, tiles: Tiles) -> tuple[Tensor, Tiles]:
    """x in the basis of the tiles, and the tiles as they are multiplied with it."""
    if tiles.rotation is None:
        return x, tiles
    half = x.is_cuda and x.dtype in HALF and x.numel() > 0
    if half and cuda_rotate.can_rotate(tiles.rotation) and cuda.refusal(x.device.index, "rotate_input") is None:
        with torch.cuda.device(x.device):
            y = cuda_rotate.rotate(_unit_stride(x.reshape(-1, x.shape[-1])), tiles.rotation)
        return y.view(x.shape), replace(tiles, rotation=None)
    if x.is_cuda and _has_triton():
        from qbench.kernels import hadamard

        if tiles.rotation.block <= hadamard.LARGEST_BLOCK:
            return hadamard.rotate(x, tiles.rotation), replace(tiles, rotation=None)
    return tiles.rotation(x).to(x.dtype), replace(tiles, rotation=None)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _linear_on_gpu(x: Tensor, tiles: Tiles, bias: Tensor | None) -> Tensor:
    device = x.device.index
    if not len(x):
        return x.new_empty(0, tiles.shape[0])
    with torch.cuda.device(x.device):
        if x.dtype in HALF:
            bias = None if bias is None else bias.to(x.dtype).contiguous()
            plan = blocks.plan(len(x), *tiles.shape, tiles, device)
            if plan is not None and cuda.refusal(device, plan.kernel) is None:
                if not cuda_rotate.takes(tiles, plan, len(x)):
                    x, tiles = _rotated(x, tiles)
                return cuda.linear(_unit_stride(x), tiles, bias, plan)
            if len(x) <= TRITON_BATCH and cuda.refusal(device) is not None and _has_triton():
                from qbench.kernels import triton_linear

                x, tiles = _rotated(x, tiles)
                y = triton_linear.linear(_unit_stride(x), tiles)
                return y if bias is None else y + bias
        if (
            len(x) < UNDO_SHARE * tiles.shape[0]
            or not cuda_rotate.undoes(tiles, x.dtype)
            or cuda.refusal(device, "dequantize") is not None
        ):
            x, tiles = _rotated(x, tiles)
        weight = _dequantize_on_gpu(tiles, x.dtype)
        if tiles.permutation is not None:
            x = x.index_select(-1, tiles.permutation)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _dequantize_on_gpu(tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """W `[out, in]` in stored column order; the allocator hands the same buffer to layer after layer."""
    computed = dtype if dtype in (*HALF, torch.float32) else torch.float32
    if cuda.refusal(tiles.data.device.index, "dequantize") is None:
        return cuda.dequantize(tiles, computed).to(dtype)
    if _has_triton():
        from qbench.kernels import triton_linear

        return triton_linear.dequantize(tiles, computed).to(dtype)
    weight = layout.dequantize(tiles, dtype)
    return weight if tiles.permutation is None else weight.index_select(-1, tiles.permutation)


def _has_triton() -> bool:
    from torch.utils._triton import has_triton_package

    return has_triton_package()
