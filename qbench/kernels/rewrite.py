"""What a compiled block's graph is rewritten to, so that one new token takes fewer launches of the same work."""

from __future__ import annotations

import itertools
import operator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from qbench.kernels import choose, grouped, together  # noqa: F401  (the last two register ops)

MOST = 4  # weights in a launch
MOST_GATED = 1024  # columns that every block of a launch gates for itself; of more, launches of their own are faster
VIEWS = (torch.ops.aten.reshape.default, torch.ops.aten.view.default)
HELD = ("placeholder", "get_attr")  # nodes of weights, which are there before anything is computed


def graph_pass(choices: bool) -> Any:
    """For inductor's `post_grad_custom_pre_pass`: fewer launches of the same work.

    Linears of one x become `dual_linears`, a norm of one row or what gates experts goes into the product that reads it,
    counters do not wait for the end, and with `choices` a mixture's router is rewritten to choose.py's.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Together(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            merge(graph)
            norm(graph)
            gate(graph)
            count_early(graph)
            if choices:
                choose.rewrite(graph)

        def uuid(self) -> bytes:  # what inductor's cache tells passes apart by
            return b"".join(Path(file).read_bytes() for file in (__file__, choose.__file__)) + bytes([choices])

    return Together()


def norm(graph: fx.Graph) -> None:
    """Linears that alone read a norm of one row become `normed_dual_linears`."""
    linear, linears = torch.ops.qbench.dual_linear.default, torch.ops.qbench.dual_linears.default
    target = torch.ops.qbench.normed_dual_linears.default
    for node in list(graph.nodes):
        if node.target not in (linear, linears) or (node.target is linear and node.args[3] is not None):
            continue
        x, tensors, numbers, *_ = node.args
        found = _of_norm(_base(x)) if isinstance(x, fx.Node) and _read_once(x, _base(x)) else None
        if found is None or not _numel(found[0]) == _numel(found[1]) == _shape(x)[-1]:  # a weight of heads is shorter
            continue
        source, weight, epsilon = found
        with graph.inserting_before(node):
            row = _reshaped(graph, source, _shape(x))
            made = graph.call_function(target, (row, weight, epsilon, tensors, numbers))
            value = node.meta["val"]
            made.meta["val"] = value if node.target is linears else [value]
            last = made if node.target is linears else graph.call_function(operator.getitem, (made, 0))
        if last is not made:
            last.meta["val"] = value
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _of_norm(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """x, weight and epsilon, if a node is weight * (x / sqrt(mean(x^2) + epsilon)), the quotient rounded from fp32."""
    aten = torch.ops.aten
    for weight, quotient in itertools.permutations(node.args) if node.target is aten.mul.Tensor else ():
        if not (isinstance(weight, fx.Node) and isinstance(quotient, fx.Node) and weight.meta["val"].dim() == 1):
            continue
        product = _unrounded(quotient)
        if product.target is not aten.mul.Tensor:
            continue
        wide, root = product.args
        shifted = root.args[0] if isinstance(root, fx.Node) and root.target is aten.rsqrt.default else None
        mean = shifted.args[0] if shifted is not None and shifted.target is aten.add.Tensor else None
        if mean is None or mean.target is not aten.mean.dim or mean.args[1:] != ([-1], True):
            continue
        power, epsilon = mean.args[0], shifted.args[1]
        if power.target is aten.pow.Tensor_Scalar and power.args == (wide, 2) and isinstance(epsilon, float):
            x = _unrounded(wide)
            return (x, weight, epsilon) if x.meta["val"].dtype == weight.meta["val"].dtype else None
    return None


def _unrounded(node: fx.Node) -> fx.Node:
    """What a node is in another precision."""
    return node.args[0] if node.target is torch.ops.prims.convert_element_type.default else node


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
        if not _read_once(x, made) or _shape(x)[-1] > MOST_GATED:
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


def _numel(node: fx.Node) -> int:
    return node.meta["val"].numel()


def _shape(node: fx.Node) -> list[int]:
    return list(node.meta["val"].shape)


def count_early(graph: fx.Graph) -> None:
    """One number that is copied back where it came from, as a cache's length, is copied once nothing reads the old one:
    at the end it would stand between this block's last launch and the next block's first."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.copy_.default or node.users:
            continue
        to, source = node.args
        if to.op == "placeholder" and to.meta["val"].numel() == 1 and source.meta["val"].dtype == to.meta["val"].dtype:
            readers = [user for user in to.users if user is not node]
            if all(user in place and not _shares_memory(user) for user in readers):
                max((source, *readers), key=place.__getitem__).append(node)


def _shares_memory(reader: fx.Node) -> bool:
    """Whether what a node gives may be a view of what it reads, so that its readers read that as well."""
    schema = getattr(reader.target, "_schema", None)
    return schema is None or any(one.alias_info is not None for one in schema.returns)


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
