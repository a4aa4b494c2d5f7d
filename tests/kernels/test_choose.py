"""Few experts chosen in one launch: what `topk`, softmax and normalization choose, and a graph rewritten to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from qbench.kernels import choose

SIZES = [(1, 128, 8), (3, 160, 6), (2, 8, 3), (1, 60, 4), (2, 33, 1)]


def qwen(x, weight):
    logits = F.linear(x, weight)
    values, index = torch.topk(F.softmax(logits, dtype=torch.float, dim=-1), 8, dim=-1)
    return (values / values.sum(dim=-1, keepdim=True)).to(logits.dtype), index


def deepseek(x, weight):
    scores = F.linear(x.float(), weight.float()).softmax(dim=-1, dtype=torch.float32)
    groups = scores.view(-1, 8, 20).max(dim=-1).values
    chosen = torch.topk(groups, k=3, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(groups).scatter(1, chosen, 1).unsqueeze(-1).expand(-1, 8, 20).reshape(-1, 160)
    values, index = torch.topk(scores.masked_fill(~mask.bool(), 0.0), k=6, dim=-1, sorted=False)
    order = index.argsort(-1)  # they come in any order
    return (values * 16.0).gather(-1, order), index.gather(-1, order)


def after_softmax(x, weight):
    """A choice whose numbers are used elsewhere as well."""
    scores = F.linear(x, weight).float().softmax(-1)
    values, index = scores.topk(4)
    return values / values.sum(-1, keepdim=True), values.sum(), scores, index


def in_parts():
    kept = core_aten_decompositions()
    return {op: kept[op] for op in kept if "softmax" in str(op) or "linear" in str(op)} | {
        torch.ops.aten.linear.default: lambda x, w: torch.ops.aten.mm.default(x, w.permute(1, 0))
    }


@pytest.mark.parametrize(("forward", "experts", "calls"), [(qwen, 128, 1), (deepseek, 160, 2), (after_softmax, 128, 1)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_graph_is_rewritten(generator, forward, experts, calls, tokens):
    x, weight = torch.randn(tokens, 64, generator=generator), torch.randn(experts, 64, generator=generator) / 4
    traced = make_fx(forward, decomposition_table=in_parts(), tracing_mode="fake")(x, weight)
    expected = forward(x, weight)
    choose.rewrite(traced.graph)
    traced.graph.lint()
    traced.recompile()
    names = [str(node.target) for node in traced.graph.nodes]
    assert (names.count("qbench.choose.default"), names.count("aten.topk.default")) == (calls, 0)
    assert names.count("aten.mm.default") == (tokens > 1)
    if forward is qwen:
        assert "aten.amax.default" not in names
        assert names.count("aten.div.Tensor") == 0
    for found, wanted in zip(traced(x, weight), expected, strict=True):
        assert torch.equal(found, wanted) if wanted.dtype == torch.int64 else torch.allclose(found, wanted, rtol=1e-5)


def test_what_is_not_few_stays(generator):
    def forward(x):
        return x.topk(3, dim=0)[0], x.topk(40)[1], x.topk(2, largest=False)[1], x.double().topk(2)[1]

    traced = make_fx(forward, tracing_mode="fake")(torch.randn(5, 64, generator=generator))
    choose.rewrite(traced.graph)
    assert [str(node.target) for node in traced.graph.nodes].count("aten.topk.default") == 4


def test_the_op(generator):
    given = torch.randn(2, 16, generator=generator), 3, True, True, torch.bfloat16
    torch.library.opcheck(choose.choose, given, test_utils=("test_schema", "test_faketensor"))


def check(choice, x, k, softmax, normalize, dtype):
    weights, index = choice(x, k, softmax, normalize, dtype)
    numbers = x.float().softmax(-1) if softmax else x.float()
    values, expected = numbers.topk(k, dim=-1)
    assert torch.equal(index, expected)
    values = values / values.sum(-1, keepdim=True) if normalize else values
    torch.testing.assert_close(weights, values.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert (weights.dtype, index.dtype) == (dtype, torch.int64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "experts", "k"), [*SIZES, (1, 512, 10), (64, 256, 8)])
def test_on_a_gpu(tokens, experts, k, dtype):
    draw = torch.Generator().manual_seed(0)
    many = torch.stack([torch.randperm(experts, generator=draw) for _ in range(tokens)])  # no two are equal
    x = ((many - experts // 2) / 8).to("cuda", dtype)  # in bf16 as well
    for softmax, normalize in ((True, True), (False, False), (True, False)):
        check(torch.ops.qbench.choose, x, k, softmax, normalize, dtype)
