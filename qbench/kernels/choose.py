"""The choice of a few experts for a token, in one launch; a compiled mixture's graph is rewritten to it.

    choose(logits [tokens, experts], k) -> weights [tokens, k], index [tokens, k]

A mixture's router is a product with a small matrix, a softmax, `topk`, and a division by the sum of what was chosen.
For one token each of them is a kernel or two that does next to nothing. `rewrite` finds them in the graph of a compiled
block and makes one launch of all but the product, and of the product a reduction that fills the GPU.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qbench.kernels.routes import has_triton

aten, prims = torch.ops.aten, torch.ops.prims
MOST_EXPERTS, MOST_CHOSEN, MOST_TOKENS = 512, 32, 64  # of one launch: a warp or two hold the experts of a token
NARROW = 1024  # rows of a matrix up to which the product with one row of x is written as a sum


@torch.library.custom_op("qbench::choose", mutates_args=())
def choose(logits: Tensor, k: int, softmax: bool, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in falling order, as weights `[tokens, k]` in `dtype`, and their int64 index.

    softmax: of the softmax of each row, in fp32; normalize: divided by their sum. Of equal ones the first is taken.
    """
    return _plainly(logits, k, softmax, normalize, dtype)


@choose.register_fake
def _(logits, k, softmax, normalize, dtype):
    return logits.new_empty(len(logits), k, dtype=dtype), logits.new_empty(len(logits), k, dtype=torch.int64)


def _plainly(logits: Tensor, k: int, softmax: bool, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values, index = (logits.float().softmax(-1) if softmax else logits.float()).topk(k, dim=-1)
    return (values / values.sum(-1, keepdim=True) if normalize else values).to(dtype), index


@choose.register_kernel("cuda")
def _(logits, k, softmax, normalize, dtype):
    if not has_triton():
        return _plainly(logits, k, softmax, normalize, dtype)
    from qbench.kernels import triton_experts

    return triton_experts.choose(logits, k, softmax, normalize, dtype)


def rewrite(graph: fx.Graph) -> None:
    """Replaces `topk` over few numbers, with the softmax before it and the division after it, by `choose`.

    And products of one row with a narrow matrix by sums, for which a compiler makes a block a row of the matrix.
    """
    for node in list(graph.nodes):
        if node.target is aten.topk.default and _served(node):
            _choose(graph, node)
        elif node.target is aten.mm.default and _narrow(*map(_value, node.args)):
            _as_sum(graph, node)
    graph.eliminate_dead_code()


def _served(topk: fx.Node) -> bool:
    x, k, *more = topk.args
    dim, largest, _ = (*more, *(-1, True, True)[len(more) :])
    value = _value(x)
    if value is None or value.dim() != 2 or not value.dtype.is_floating_point or value.dtype == torch.float64:
        return False
    tokens, experts = value.shape
    known = isinstance(tokens, int) and isinstance(experts, int) and dim in (-1, 1) and largest
    return known and 0 < tokens <= MOST_TOKENS and k <= MOST_CHOSEN and experts <= MOST_EXPERTS


def _choose(graph: fx.Graph, topk: fx.Node) -> None:
    scores, k = topk.args[:2]
    logits = _softmax_of(scores) if list(scores.users) == [topk] else None
    source, dtype, normalize = scores if logits is None else logits, _value(scores).dtype, False
    last = values = next((user for user in topk.users if user.args[1] == 0), None)
    if values is not None:
        last = _normalized(values)
        normalize = last is not values
        cast = next(iter(last.users), None)
        if len(last.users) == 1 and _is(cast, prims.convert_element_type.default):
            last, dtype = cast, cast.args[1]
    given = k, logits is not None, normalize, dtype
    with graph.inserting_before(topk):
        chosen = graph.call_function(torch.ops.qbench.choose.default, (source, *given))
        weights, index = (graph.call_function(operator.getitem, (chosen, i)) for i in (0, 1))
    like = _value(source)
    weights.meta["val"] = like.new_empty(len(like), k, dtype=dtype)
    index.meta["val"] = like.new_empty(len(like), k, dtype=torch.int64)
    chosen.meta["val"] = weights.meta["val"], index.meta["val"]
    for user in list(topk.users):
        if user.args[1] == 1:
            user.replace_all_uses_with(index)
    if last is not None:
        last.replace_all_uses_with(weights)


def _softmax_of(node: fx.Node) -> fx.Node | None:
    """What `node` is the softmax of, over its last dimension and in fp32, spelled out as a compiler does; or None."""
    if not _is(node, aten.div.Tensor) or _value(node).dtype != torch.float32:
        return None
    exponential, total = node.args
    if not _is(exponential, aten.exp.default) or not _is(total, aten.sum.dim_IntList, exponential, [-1], True):
        return None
    (difference,) = exponential.args
    if not _is(difference, aten.sub.Tensor):
        return None
    x, largest = difference.args
    if not _is(largest, aten.amax.default, x, [-1], True):
        return None
    return x.args[0] if _is(x, prims.convert_element_type.default) and _value(x.args[0]).is_floating_point() else x


def _normalized(values: fx.Node) -> fx.Node:
    """values divided by their sum, if that is all that is made of them; else values."""
    for user in values.users:
        if _is(user, aten.div.Tensor) and user.args[0] is values:
            total = user.args[1]
            if _is(total, aten.sum.dim_IntList, values, [-1], True) and set(values.users) == {user, total}:
                return user if list(total.users) == [user] else values
    return values


def _narrow(x: Tensor | None, matrix: Tensor | None) -> bool:
    """Whether x `[1, in]` times matrix `[in, out]` is a router's: too few columns for a library's kernel to be many
    blocks, each of them in one piece."""
    return (
        x is not None and matrix is not None and x.dtype == matrix.dtype and x.dtype.is_floating_point
        and x.shape[0] == 1 and matrix.shape[1] <= NARROW and matrix.stride(0) == 1
    )  # fmt: skip


def _as_sum(graph: fx.Graph, mm: fx.Node) -> None:
    """sum over `in` of x `[1, 1, in]` times the matrix `[1, out, in]`; the compiler computes both in fp32."""
    x, matrix = mm.args
    with graph.inserting_before(mm):
        row = _call(graph, aten.unsqueeze.default, x, 1)
        turned = _call(graph, aten.permute.default, matrix, [1, 0])
        product = _call(graph, aten.mul.Tensor, row, _call(graph, aten.unsqueeze.default, turned, 0))
        total = _call(graph, aten.sum.dim_IntList, product, [2])
    mm.replace_all_uses_with(total)


def _call(graph: fx.Graph, target: Callable[..., Any], *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(_value(one) if isinstance(one, fx.Node) else one for one in args))
    return node


def _value(node: Any) -> Tensor | None:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _is(node: Any, target: Callable[..., Any], *args: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target and (not args or node.args == args) and not node.kwargs
