"""Products over the experts of a mixture, for pairs that are sorted by expert (routes.py): ops of torch.library.

    grouped_mm(x [pairs, in], stack [experts, out, in]) -> [pairs, out]      every pair times its expert's matrix
    dual_linear_grouped(x, tiles of a stack) -> [pairs, out]                 the same for the kernel of dual-scale
    combine(y [pairs, hidden], index, scores [tokens, k]) -> [tokens, hidden]    the sum over a token's pairs

None of them asks the GPU which experts were chosen: they run in a CUDA graph and under torch.compile(fullgraph=True).
On a CPU they go expert by expert. Rows of pairs whose expert lives elsewhere hold anything; combine leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qbench.format.format import Format
from qbench.format.stack import part, take
from qbench.kernels import cuda, cuda_experts, ops
from qbench.kernels import tiles as layout
from qbench.kernels.routes import Routes, has_triton
from qbench.kernels.tiles import Tiles

DENSE_BYTES = 2**32  # of a stack in 16 or 32 bits that is written as one; a larger one is multiplied in parts
TRANSIENT_NUMBERS = 2**27  # that a format without a kernel dequantizes at a time: it may need several copies in fp32
FUSED_PAIRS = 896  # pairs an expert above which writing its matrices and multiplying those is faster


def multiply(x: Tensor, weight: Format, routes: Routes, gather: bool) -> Tensor:
    """x times a stack `[experts, out, in]` of any format: `[pairs, out]` in sorted order.

    With `gather` x is `[tokens, in]`, else `[pairs, in]` and sorted.
    """
    experts, out, columns = weight.shape
    x = x.index_select(0, routes.token) if gather else x
    if 0 < len(x) <= experts // 2 and (y := _own_matrices(x, weight, routes.expert)) is not None:
        return y

    def dense(first: int, last: int) -> Tensor:
        step = max(1, TRANSIENT_NUMBERS // (out * columns))
        if step >= last - first == experts:
            return weight.dequantize(x.dtype)
        stack = x.new_empty(last - first, out, columns)
        for at in range(first, last, step):
            end = min(at + step, last)
            stack[at - first : end - first] = part(weight, slice(at, end)).dequantize(x.dtype)
        return stack

    return _in_parts(x, dense, routes, out)


def _own_matrices(x: Tensor, weight: Format, expert: Tensor) -> Tensor | None:
    """Rows of x `[pairs, in]` times the matrix of each, all dequantized: less than the stack where pairs are few.

    None for a format whose tensors no index on the device can choose from.
    """
    step = max(1, TRANSIENT_NUMBERS // (weight.shape[1] * weight.shape[2]))
    parts = []
    for at in range(0, len(x), step):
        some = take(weight, expert[at : at + step])
        if some is None:
            return None
        parts.append(torch.bmm(some.dequantize(x.dtype), x[at : at + step].unsqueeze(-1)).squeeze(-1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def dual_linear(x: Tensor, tiles: Tiles, routes: Routes, gather: bool) -> Tensor:
    """The same for tiles."""
    return dual_linear_grouped(x, gather, routes.flat(), routes.rows, *tiles.flat())


def combine(y: Tensor, index: Tensor, scores: Tensor, experts: int, routes: Routes | None = None) -> Tensor:
    """The sum over a token's pairs of scores `[tokens, k]` times y `[pairs, hidden]`, in fp32, then y's dtype.

    y is in the order of `routes`, or without them in that of index `[tokens, k]`. Pairs whose index is `experts` or
    above count nothing, whatever y holds of them.
    """
    return combined(y, index, scores, experts, None if routes is None else routes.place)


def _one_by_one(y: Tensor, x: Tensor, stack: Tensor, first_expert: int, routes: Sequence[Tensor], rows: int) -> None:
    """What `grouped_mm_part` does, for the CPU and where there is no Triton."""
    ends = Routes.over(routes, rows).starts[first_expert : first_expert + len(stack) + 1].tolist()
    for matrix, first, last in zip(stack, ends, ends[1:], strict=False):
        y[first:last] = F.linear(x[first:last], matrix)


@torch.library.custom_op("qbench::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, stack: Tensor, routes: Sequence[Tensor], rows: int) -> Tensor:
    """x `[pairs, in]`, sorted, times the matrices of a whole stack `[experts, out, in]`."""
    y = x.new_zeros(len(x), stack.shape[1])
    _one_by_one(y, x, stack, 0, routes, rows)
    return y


@grouped_mm.register_fake
def _(x, stack, routes, rows):
    return x.new_empty(len(x), stack.shape[1])


@grouped_mm.register_kernel("cuda")
def _(x, stack, routes, rows):
    if _torch_groups(x, stack):
        return F.grouped_mm(x, stack.mT, offs=Routes.over(routes, rows).starts[1:])
    y = x.new_empty(len(x), stack.shape[1])
    _into(y, x, stack, 0, routes, rows)
    return y


@torch.library.custom_op("qbench::grouped_mm_part", mutates_args=("y",))
def grouped_mm_part(
    y: Tensor, x: Tensor, stack: Tensor, first_expert: int, routes: Sequence[Tensor], rows: int
) -> None:
    """Writes the rows of y that belong to the experts of `stack`, from `first_expert` on."""
    _one_by_one(y, x, stack, first_expert, routes, rows)


@grouped_mm_part.register_fake
def _(y, x, stack, first_expert, routes, rows):
    return None


@grouped_mm_part.register_kernel("cuda")
def _(y, x, stack, first_expert, routes, rows):
    _into(y, x, stack, first_expert, routes, rows)


@torch.library.custom_op("qbench::dual_linear_grouped", mutates_args=())
def dual_linear_grouped(
    x: Tensor,
    gather: bool,
    routes: Sequence[Tensor],
    rows: int,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
) -> Tensor:
    """The op behind `dual_linear`, over what `Routes.flat` and `Tiles.flat` give. On the CPU in fp32."""
    tiles, held, dtype = Tiles.over(tensors, numbers), Routes.over(routes, rows), x.dtype
    ops._check(x, tiles)
    x, tiles = ops._rotated(x.float(), tiles)
    x = x.index_select(0, held.token) if gather else x
    return grouped_mm(x, layout.dequantize(tiles), routes, rows).to(dtype)


@dual_linear_grouped.register_fake
def _(x, gather, routes, rows, tensors, numbers):
    return x.new_empty(len(routes[0]), Tiles.over(tensors, numbers).shape[-2])


@dual_linear_grouped.register_kernel("cuda")
def _(x, gather, routes, rows, tensors, numbers):
    tiles, held = Tiles.over(tensors, numbers), Routes.over(routes, rows)
    ops._check(x, tiles)
    x, tiles = ops._rotated(x, tiles)
    few, device = 0 < len(held.token) <= FUSED_PAIRS * held.experts, x.device.index
    with torch.cuda.device(x.device):
        if few and x.dtype in ops.HALF and cuda.refusal(device, "wide_linear") is None:
            plan = cuda_experts.plan(held, tiles, device)
            if plan is not None:
                return cuda_experts.linear(ops._unit_stride(x), tiles, held, gather, plan)
        x = x.index_select(0, held.token) if gather else x
        if tiles.permutation is not None:
            x = x.gather(1, tiles.permutation.index_select(0, held.expert).long())
        return _in_parts(x, _dense(tiles, x.dtype), held, tiles.shape[-2])


def _added_up(y: Tensor, index: Tensor, scores: Tensor, experts: int, place: Tensor | None) -> Tensor:
    found = (y if place is None else y.index_select(0, place)).view(*scores.shape, -1).float() * scores.unsqueeze(-1)
    return torch.where((index < experts).unsqueeze(-1), found, 0).sum(1).to(y.dtype)


@torch.library.custom_op("qbench::combined", mutates_args=())
def combined(y: Tensor, index: Tensor, scores: Tensor, experts: int, place: Tensor | None) -> Tensor:
    """The op behind `combine`."""
    return _added_up(y, index, scores, experts, place)


@combined.register_fake
def _(y, index, scores, experts, place):
    return y.new_empty(len(scores), y.shape[1])


@combined.register_kernel("cuda")
def _(y, index, scores, experts, place):
    if not has_triton():
        return _added_up(y, index, scores, experts, place)
    from qbench.kernels import triton_experts

    out = y.new_empty(len(scores), y.shape[1])
    if len(out):
        triton_experts.combine(y, index, scores, experts, place, out)
    return out


@torch.library.custom_op("qbench::silu_times", mutates_args=())
def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, each rounded to their dtype; on a GPU in one launch."""
    return F.silu(gate) * up


@silu_times.register_fake
def _(gate, up):
    return torch.empty_like(gate)


@silu_times.register_kernel("cuda")
def _(gate, up):
    if not has_triton() or not gate.numel():
        return F.silu(gate) * up
    from qbench.kernels import triton_experts

    return triton_experts.silu_times(gate, up)


def _in_parts(x: Tensor, dense: Callable[[int, int], Tensor], routes: Routes, out: int) -> Tensor:
    """x `[pairs, in]` times the matrices of experts first to last that `dense(first, last)` gives, all if they fit."""
    experts = routes.experts
    step = max(1, DENSE_BYTES // (out * x.shape[1] * x.element_size()))
    if step >= experts:
        return grouped_mm(x, dense(0, experts), routes.flat(), routes.rows)
    y = x.new_zeros(len(x), out)
    for first in range(0, experts, step):
        grouped_mm_part(y, x, dense(first, min(first + step, experts)), first, routes.flat(), routes.rows)
    return y


def _dense(tiles: Tiles, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    """What gives the matrices of some experts in stored column order; the allocator hands the same buffer to each."""

    def some(first: int, last: int) -> Tensor:
        chosen = tiles.span(first, last)
        if cuda.refusal(tiles.data.device.index, "dequantize") is None:
            return cuda.dequantize(chosen, dtype)
        if has_triton():
            from qbench.kernels import triton_linear

            return triton_linear.dequantize(chosen, dtype)
        weight = layout.dequantize(chosen, dtype)
        if chosen.permutation is None:
            return weight
        return weight.gather(-1, chosen.permutation.long().unsqueeze(1).expand(weight.shape))

    return some


def _into(y: Tensor, x: Tensor, stack: Tensor, first_expert: int, routes: Sequence[Tensor], rows: int) -> None:
    if not has_triton():
        _one_by_one(y, x, stack, first_expert, routes, rows)
    elif len(x):
        from qbench.kernels import triton_experts

        triton_experts.multiply(x, stack, Routes.over(routes, rows), y, first_expert)


def _torch_groups(x: Tensor, stack: Tensor) -> bool:
    """Whether torch's own grouped product takes them without asking the GPU for the groups' sizes."""
    if x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm") or not len(x):
        return False
    return torch.cuda.get_device_capability(x.device)[0] in (9, 10) and all(size % 8 == 0 for size in stack.shape[1:])
