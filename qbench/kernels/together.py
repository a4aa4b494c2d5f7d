"""Several weights that multiply the same x in one launch: q, k and v; gate and up; of one row, or of a prompt's.

    dual_linears(x [..., in], tiles of each) -> [..., out] of each         as `dual_linear` of each

At batch 1 a small matrix does not fill a GPU, and every launch has its start and its end. Serving engines therefore
keep such matrices as one; here each weight stays its own, with its own t, and only the launch is shared. A compiled
model gets there by itself: `graph_pass` gives inductor a pass that finds linears with the same x.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qbench.kernels import blocks, choose, cuda, cuda_prompt, cuda_rotate, nvrtc, ops
from qbench.kernels.tiles import Tiles

MOST = 4  # weights in a launch
TENSORS, NUMBERS = 5, 7  # of `Tiles.flat`
VIEWS = (torch.ops.aten.reshape.default, torch.ops.aten.view.default)
HELD = ("placeholder", "get_attr")  # nodes of weights, which are there before anything is computed


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
        one_row, prompt = isinstance(plan, blocks.Plan), isinstance(plan, (blocks.PromptPlan, blocks.AheadPlan))
        fused = (one_row or (prompt and _prompts(weights))) and all(cuda_rotate.takes(w, plan, M) for w in weights)
        if fused and cuda.refusal(device, plan.kernel) is None:
            run = launch if one_row else cuda_prompt.linears
            with torch.cuda.device(x.device):
                ys = run(ops._unit_stride(x.reshape(M, -1)), weights, plan)
            return [y.view(*x.shape[:-1], -1) for y in ys]
    return [ops.dual_linear(x, *each.flat(), None) for each in weights]


def launch(x: Tensor, weights: Sequence[Tiles], chosen: blocks.Plan) -> list[Tensor]:
    """y `[1, N]` of each weight for x `[1, K]`, fp16 or bf16, in one launch."""
    outputs = [x.new_empty(1, each.shape[0]) for each in weights]
    chunks = weights[0].data.shape[-2]
    problems, clusters, log_warps = _problems(len(weights))(), 0, chosen.splits_in_block.bit_length() - 1
    for i, (tiles, y) in enumerate(zip(weights, outputs, strict=True)):
        down, strips = cuda._down(x.dtype, tiles), tiles.data.shape[-3]
        addresses = {
            name: cuda._address(tensor)
            for name, tensor in (
                *(("tiles", tiles.data), ("x", x), ("t", tiles.input_scale), ("permutation", tiles.permutation)),
                *(("signs", cuda._signs(tiles)), ("codebook", tiles.codebook), ("y", y)),
            )
        }
        problems.each[i] = cuda._Problem(
            **addresses,
            **{"x_stride": x.stride(0), "t_down": down, "t_up": 1 / down, "M": 1, "N": tiles.shape[0], "K": x.shape[1]},
            **{"strips": strips, "chunks": chunks, "per": -(-chunks // chosen.splits), "stages": chosen.stages},
            **{"log_splits_in_block": log_warps, "log_warps_of_row": log_warps, "pairs_per_row": 1},
        )
        problems.first[i] = clusters
        clusters += -(-strips // (chosen.strips_per_warp * chosen.strips))
    depth = {"RING": 1} if chosen.ring else {"DEPTH": chosen.stages}
    shape = {"MB": 1, "RT": chosen.strips_per_warp, "ONE": 1, "TOGETHER": len(weights)}
    form = weights[0]
    defines = cuda._for(x.device.index, cuda._linear_defines(form, x.dtype, **shape, **depth))
    nvrtc.launch(
        nvrtc.load("dual_linear", x.device.index, defines),
        (clusters * chosen.splits, 1, 1),
        32 * chosen.strips * chosen.splits_in_block,
        chosen.shared_bytes(1, chunks, form.nbits, form.group_size, form.has_zero),
        cuda._stream(x.device),
        [problems],
        chosen.splits,
        early=cuda._early(x.device),
    )
    return outputs


def graph_pass(choices: bool) -> Any:
    """For inductor's `post_grad_custom_pre_pass`: fewer launches of the same work.

    Linears of one x become `dual_linears`, what gates experts goes into the product that reads it, and with `choices` a
    mixture's router is rewritten to choose.py's.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Together(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            merge(graph)
            gate(graph)
            if choices:
                choose.rewrite(graph)

        def uuid(self) -> bytes:  # what inductor's cache tells passes apart by
            return b"".join(Path(file).read_bytes() for file in (__file__, choose.__file__)) + bytes([choices])

    return Together()


def gate(graph: fx.Graph) -> None:
    """Experts that multiply what `silu_times` made for them alone become `dual_linear_gated_experts`; with the sum over
    a token's pairs, if that follows, `dual_linear_summed_experts`, which also adds what the sum is added to."""
    for node in list(graph.nodes):
        if node.target is not torch.ops.qbench.dual_linear_experts.default:
            continue
        x, index, *weight = node.args
        made = _base(x)
        if not isinstance(made, fx.Node) or made.target is not torch.ops.qbench.silu_times.default:
            continue
        if not _read_once(x, made):
            continue
        last, target, given = node, torch.ops.qbench.dual_linear_gated_experts.default, (index, *weight)
        total, more = _reader(node), None
        if total is not None and total.target is torch.ops.qbench.combined.default:
            y, pairs, scores, _, place = total.args
            if place is None and _base(y) is node and _read_once(y, node) and _base(index) is _base(pairs):
                last, more = _added(total)
                target, given = torch.ops.qbench.dual_linear_summed_experts.default, (pairs, scores, *weight)
        with graph.inserting_before(last):
            both = [_reshaped(graph, one, _shape(x)) for one in made.args]
            if target is torch.ops.qbench.dual_linear_summed_experts.default:
                given = *given, more if more is None else _reshaped(graph, more, _shape(total))
            fused = graph.call_function(target, (*both, *given))
            fused.meta["val"] = node.meta["val"] if last is node else total.meta["val"]
            # and nothing else of their meta: the inputs that are told there are those of `last`
            last.replace_all_uses_with(fused if more is None else _reshaped(graph, fused, _shape(last)))
    graph.eliminate_dead_code()


def _reader(node: fx.Node) -> fx.Node | None:
    """What alone reads a node, or a view of it."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target not in VIEWS:
            return node
    return None


def _added(total: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The sum that `total` alone goes into, and what it is added to there; or itself and None."""
    reader = _reader(total)
    if reader is None or reader.target is not torch.ops.aten.add.Tensor or reader.kwargs:
        return total, None
    others = [one for one in reader.args if isinstance(one, fx.Node) and _base(one) is not total]
    if len(others) != 1:
        return total, None
    alike = [(one.meta["val"].dtype, one.meta["val"].numel(), _shape(reader)[-1]) for one in (*others, reader, total)]
    same = alike[0] == alike[1] == alike[2] and _shape(total)[-1] == _shape(reader)[-1]
    return (reader, others[0]) if same else (total, None)


def _reshaped(graph: fx.Graph, node: fx.Node, shape: list[int]) -> fx.Node:
    found = graph.call_function(torch.ops.aten.reshape.default, (node, shape))
    found.meta["val"] = node.meta["val"].reshape(shape)
    return found


def _base(node: Any) -> Any:
    """What a node is a view of."""
    while isinstance(node, fx.Node) and node.target in VIEWS:
        node = node.args[0]
    return node


def _read_once(view: fx.Node, base: fx.Node) -> bool:
    """Whether nothing but `view` is made of `base`, and nothing else reads that."""
    while view is not base:
        if len(view.users) > 1:
            return False
        view = view.args[0]
    return len(base.users) == 1


def _shape(node: fx.Node) -> list[int]:
    return list(node.meta["val"].shape)


def merge(graph: fx.Graph) -> None:
    """Replaces linears of one x, without bias, by one call of `dual_linears`, MOST at a time."""
    of_x: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is not torch.ops.qbench.dual_linear.default or node.args[3] is not None:
            continue
        if all(part.op in HELD for part in (*node.args[1], *node.args[2]) if isinstance(part, fx.Node)):
            of_x.setdefault(node.args[0], []).append(node)
    for x, found in of_x.items():
        for start in range(0, len(found), MOST):
            if len(group := found[start : start + MOST]) > 1:
                _merge(graph, x, group)


def _merge(graph: fx.Graph, x: fx.Node, linears: list[fx.Node]) -> None:
    first, tensors, numbers = linears[0], *([part for node in linears for part in node.args[i]] for i in (1, 2))
    for held in dict.fromkeys(part for part in tensors if isinstance(part, fx.Node) and part.op == "get_attr"):
        first.prepend(held)
    with graph.inserting_before(first):
        together = graph.call_function(torch.ops.qbench.dual_linears.default, (x, tensors, numbers))
        together.meta["val"] = [node.meta.get("val") for node in linears]
        each = [graph.call_function(operator.getitem, (together, i)) for i in range(len(linears))]
    for node, one in zip(linears, each, strict=True):
        one.meta = dict(node.meta)
        node.replace_all_uses_with(one)
        graph.erase_node(node)


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
