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
        one_row, prompt = isinstance(plan, blocks.Plan), isinstance(plan, blocks.PromptPlan)
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
    problems, clusters = _problems(len(weights))(), 0
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
            **{"log_splits_in_block": chosen.splits_in_block.bit_length() - 1, "pairs_per_row": 1},
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

    Linears of one x become `dual_linears`, and with `choices` a mixture's router is rewritten to choose.py's.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Together(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            merge(graph)
            if choices:
                choose.rewrite(graph)

        def uuid(self) -> bytes:  # what inductor's cache tells passes apart by
            return b"".join(Path(file).read_bytes() for file in (__file__, choose.__file__)) + bytes([choices])

    return Together()


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
