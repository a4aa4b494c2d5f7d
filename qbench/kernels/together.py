"""Several weights that multiply the same x in one launch: q, k and v; gate and up; of one row, or of a prompt's.

    dual_linears(x [..., in], tiles of each) -> [..., out] of each         as `dual_linear` of each
    normed_dual_linears(x, weight [in], epsilon, tiles of each)            the same of x after an RMS norm

At batch 1 a small matrix does not fill a GPU, and every launch has its start and its end. Serving engines therefore
keep such matrices as one; here each weight stays its own, with its own t, and only the launch is shared. A norm is one
number a row, with which the product of x and the norm's weight is multiplied: of one row no launch is left of it. A
compiled model gets there by itself (rewrite.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from qbench.kernels import blocks, cuda, cuda_prompt, cuda_rotate, nvrtc, ops
from qbench.kernels.routes import has_triton
from qbench.kernels.tiles import Tiles

TENSORS, NUMBERS = 5, 7  # of `Tiles.flat`
SUMS_BYTES = 64  # of the warps' sums of squares


@torch.library.custom_op("qbench::dual_linears", mutates_args=())
def dual_linears(x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> list[Tensor]:
    """`tensors` and `numbers` are those of `Tiles.flat`, of one weight after the other."""
    return [ops.dual_linear(x, *each.flat(), None) for each in _each(tensors, numbers)]


@dual_linears.register_fake
def _(x, tensors, numbers):
    return [x.new_empty(*x.shape[:-1], each.shape[-2]) for each in _each(tensors, numbers)]


@dual_linears.register_kernel("cuda")
def _(x, tensors, numbers):
    weights = _each(tensors, numbers)
    M, device = x.numel() // max(x.shape[-1], 1), x.device.index
    fits = x.dtype in ops.HALF and M > 0 and x.shape[-1] == weights[0].shape[-1] and _alike(weights)
    if fits and not cuda._plain(device):
        rows = sum(each.shape[0] for each in weights)
        found = blocks.plan if M == 1 else blocks.prompt_plan
        plan = found(M, rows, x.shape[-1], weights[0], device)
        one_row, prompt = isinstance(plan, blocks.Plan), isinstance(plan, blocks.PromptPlan)
        fused = (one_row or (prompt and _prompts(weights))) and all(cuda_rotate.takes(w, plan, M) for w in weights)
        if fused and cuda.refusal(device, plan.kernel) is None:
            run = launch if one_row else cuda_prompt.linears
            with torch.cuda.device(x.device):
                ys = run(ops._unit_stride(x.reshape(M, -1)), weights, plan)
            return [y.view(*x.shape[:-1], -1) for y in ys]
    return [ops.dual_linear(x, *each.flat(), None) for each in weights]


@torch.library.custom_op("qbench::normed_dual_linears", mutates_args=())
def normed_dual_linears(
    x: Tensor, weight: Tensor, epsilon: float, tensors: Sequence[Tensor | None], numbers: Sequence[int]
) -> list[Tensor]:
    """`dual_linears` of weight * x / sqrt(mean(x^2) + epsilon), as RMSNorm computes it: rounded before the weight."""
    return dual_linears(_normed(x, weight, epsilon), tensors, numbers)


@normed_dual_linears.register_fake
def _(x, weight, epsilon, tensors, numbers):
    return [x.new_empty(*x.shape[:-1], each.shape[-2]) for each in _each(tensors, numbers)]


@normed_dual_linears.register_kernel("cuda")
def _(x, weight, epsilon, tensors, numbers):
    weights, K, device = _each(tensors, numbers), x.shape[-1], x.device.index
    plain = (
        weight.dtype == x.dtype == torch.bfloat16 and weight.is_contiguous() and x.numel() == K == weights[0].shape[1]
    )
    if plain and _alike(weights) and all(each.rotation is None for each in weights) and not cuda._plain(device):
        plan = blocks.plan(1, sum(each.shape[0] for each in weights), K, weights[0], device)
        if isinstance(plan, blocks.Plan) and plan.splits == 1 and cuda.refusal(device) is None:
            with torch.cuda.device(x.device):
                ys = launch(ops._unit_stride(x.reshape(1, K)), weights, plan, weight, epsilon)
            return [y.view(*x.shape[:-1], -1) for y in ys]
    if not has_triton() or weight.dtype != x.dtype:
        return dual_linears(_normed(x, weight, epsilon), tensors, numbers)
    from qbench.kernels import triton_experts

    return dual_linears(triton_experts.rms_norm(x, weight, epsilon), tensors, numbers)


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def launch(
    x: Tensor,
    weights: Sequence[Tiles],
    chosen: blocks.Plan,
    norm: Tensor | None = None,
    epsilon: float = 0.0,
) -> list[Tensor]:
    """y `[1, N]` of each weight for x `[1, K]`, fp16 or bf16, in one launch; after a norm of that weight, bf16 alone.

    x times the norm's weight, not yet divided, may be too large for fp16. A block adds up all columns: splits is 1.
    """
    outputs = [x.new_empty(1, each.shape[0]) for each in weights]
    chunks = weights[0].data.shape[-2]
    problems, clusters, log_warps = _problems(len(weights))(), 0, chosen.splits_in_block.bit_length() - 1
    for i, (tiles, y) in enumerate(zip(weights, outputs, strict=True)):
        down, strips = cuda._down(x.dtype, tiles), tiles.data.shape[-3]
        addresses = {
            name: cuda._address(tensor)
            for name, tensor in (
                *(("tiles", tiles.data), ("x", x), ("t", tiles.input_scale), ("permutation", tiles.permutation)),
                *(("signs", cuda._signs(tiles)), ("codebook", tiles.codebook), ("y", y), ("factors", norm)),
            )
        }
        problems.each[i] = cuda._Problem(
            **addresses,
            **{"x_stride": x.stride(0), "t_down": down, "t_up": 1 / down, "M": 1, "N": tiles.shape[0], "K": x.shape[1]},
            **{"strips": strips, "chunks": chunks, "per": -(-chunks // chosen.splits), "stages": chosen.stages},
            **{"log_splits_in_block": log_warps, "log_warps_of_row": log_warps, "pairs_per_row": 1, "epsilon": epsilon},
        )
        problems.first[i] = clusters
        clusters += -(-strips // (chosen.strips_per_warp * chosen.strips))
    depth = {"RING": 1} if chosen.ring else {"DEPTH": chosen.stages}
    shape = {"MB": 1, "RT": chosen.strips_per_warp, "ONE": 1, "TOGETHER": len(weights)}
    shape |= {} if norm is None else {"NORM": 1}
    shared_bytes = chosen.shared_bytes(1, chunks, weights[0].nbits, weights[0].group_size, weights[0].has_zero)
    form = weights[0]
    defines = cuda._for(x.device.index, cuda._linear_defines(form, x.dtype, **shape, **depth))
    nvrtc.launch(
        nvrtc.load("dual_linear", x.device.index, defines),
        (clusters * chosen.splits, 1, 1),
        32 * chosen.strips * chosen.splits_in_block,
        shared_bytes + (0 if norm is None else SUMS_BYTES),
        cuda._stream(x.device),
        [problems],
        chosen.splits,
        early=cuda._early(x.device),
    )
    return outputs


def _each(tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> list[Tiles]:
    count = len(tensors) // TENSORS
    return [Tiles.over(tensors[TENSORS * i :][:TENSORS], numbers[NUMBERS * i :][:NUMBERS]) for i in range(count)]


def _alike(weights: Sequence[Tiles]) -> bool:
    """Whether one compilation of the kernel serves all."""
    blocks_rotated = {None if each.rotation is None else each.rotation.block for each in weights}
    forms = {(each.nbits, each.group_size, each.has_zero, each.codebook is None, each.shape[1]) for each in weights}
    return len(forms) == len(blocks_rotated) == 1


def _prompts(weights: Sequence[Tiles]) -> bool:
    """Whether one launch of prompt_linear.cu takes them: x as it is, t of all or none."""
    stored = {(each.input_scale is None, each.permutation is None, each.codebook is None) for each in weights}
    return stored in ({(True, True, True)}, {(False, True, True)})


@cache
def _problems(count: int) -> type[ctypes.Structure]:
    fields = [("each", cuda._Problem * count), ("first", ctypes.c_int * count)]
    return type("_Problems", (ctypes.Structure,), {"_fields_": fields})
