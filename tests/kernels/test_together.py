"""Several weights in one launch give what each gives alone, and a compiled graph is rewritten to that."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qbench.kernels import blocks, ops, together
from qbench.kernels.blocks import Plan, PromptPlan
from qbench.kernels.tiles import to_tiles
from tests.kernels.cases import random_weight, relative_error

ROWS = (72, 24, 40)


def flattened(weights):
    flat = [each.flat() for each in weights]
    return [tensor for tensors, _ in flat for tensor in tensors], [n for _, numbers in flat for n in numbers]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "plan", [Plan(1, 1, 2, 1, 1, 1), pytest.param(Plan(1, 1, 1, 2, 2, 2, True), marks=pytest.mark.slow)]
)
def test_one_launch(emulated, generator, count, plan):
    weights = [random_weight((rows, 300), 4, 64, generator) for rows in ROWS[:count]]
    x = torch.randn(1, 300, generator=generator).bfloat16()
    found = together.launch(x, [to_tiles(weight) for weight in weights], plan)
    assert len(emulated) == 1
    for y, weight in zip(found, weights, strict=True):
        assert relative_error(y, x, weight, None) <= 1e-2


def test_the_op_and_the_pass(generator):
    weights = [to_tiles(random_weight((rows, 130), 4, 64, generator)) for rows in ROWS]
    x = torch.randn(2, 3, 130, generator=generator)
    alone = [ops.linear(x, weight) for weight in weights]
    found = torch.ops.qbench.dual_linears(x, *flattened(weights))
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    torch.library.opcheck(
        together.dual_linears, (x, *flattened(weights)), test_utils=("test_schema", "test_faketensor")
    )

    def forward(x, *data):
        y = x * 2
        first = ops.linear(y, weights[0]).relu()
        others = [ops.linear(y, weight) for weight in weights[1:]]
        return first, *others, ops.linear(x, weights[0], torch.ones(72))

    traced = make_fx(forward, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    expected = forward(x)
    together.merge(traced.graph)
    traced.graph.lint()
    traced.recompile()
    names = [str(node.target) for node in traced.graph.nodes]
    assert names.count("qbench.dual_linears.default") == 1
    assert names.count("qbench.dual_linear.default") == 1  # of another x, and with a bias
    assert all(torch.equal(a, b) for a, b in zip(traced(x), expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [(4096, 1024, 1024), (12288, 12288), (72, 24, 40, 16)])
@pytest.mark.parametrize("tokens", [1, 300])
def test_on_a_gpu(monkeypatch, rows, dtype, tokens):
    if tokens > 1 and torch.cuda.get_device_capability()[0] == 9:
        monkeypatch.setattr(blocks, "prompt_plan", lambda *_: PromptPlan(32, 2, 1, True))
    draw = torch.Generator().manual_seed(0)
    weights = [random_weight((count, 1088), 4, 64, draw) for count in rows]
    on_gpu = [w.with_tensors({name: tensor.cuda() for name, tensor in w.tensors().items()}) for w in weights]
    tiles = [to_tiles(weight) for weight in on_gpu]
    x = torch.randn(1, tokens, 1088, generator=draw).to("cuda", dtype)
    found = torch.ops.qbench.dual_linears(x, *flattened(tiles))
    assert [tuple(y.shape) for y in found] == [(1, tokens, count) for count in rows]
    for y, weight in zip(found, weights, strict=True):
        assert relative_error(y[0].cpu(), x[0].cpu(), weight, None) <= (1e-3 if dtype == torch.float16 else 1e-2)
    again = torch.ops.qbench.dual_linears(x, *flattened(tiles))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
