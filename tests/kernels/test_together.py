"""Several weights in one launch give what each gives alone, and a compiled graph is rewritten to that."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qbench.kernels import blocks, grouped, ops, rewrite, together
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


@pytest.mark.parametrize("permuted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_launch_after_a_norm(emulated, generator, permuted):
    weights = [random_weight((rows, 300), 4, 64, generator, permuted=permuted) for rows in ROWS[:2]]
    x, norm = (
        100 * torch.randn(1, 300, generator=generator).bfloat16(),
        torch.randn(300, generator=generator).bfloat16(),
    )
    found = together.launch(x, [to_tiles(weight) for weight in weights], Plan(1, 1, 1, 4, 1, 1), norm, 0.5)
    normed = x.double() / (x.double().square().mean() + 0.5).sqrt() * norm.double()
    for y, weight in zip(found, weights, strict=True):
        assert relative_error(y, normed, weight, None) <= 1e-2


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
    rewrite.merge(traced.graph)
    traced.graph.lint()
    traced.recompile()
    names = [str(node.target) for node in traced.graph.nodes]
    assert names.count("qbench.dual_linears.default") == 1
    assert names.count("qbench.dual_linear.default") == 1  # of another x, and with a bias
    assert all(torch.equal(a, b) for a, b in zip(traced(x), expected, strict=True))


def test_a_norm_rides_in_the_product_that_alone_reads_it(generator):
    tiles = [to_tiles(random_weight((24, 40), 4, 64, generator)) for _ in range(2)]
    x, weight = torch.randn(1, 1, 40, generator=generator), torch.randn(40, generator=generator)

    def normed(x):
        wide = x.to(torch.float32)
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def forward(x):
        kept = normed(x + 1)
        shared = normed(x)
        both = [ops.linear(shared, each) for each in tiles]
        once, twice = normed(x - 1), torch.cat((x, x))
        return *both, ops.linear(once, tiles[0]), kept, ops.linear(kept, tiles[0]), ops.linear(normed(twice), tiles[0])

    traced = make_fx(forward, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    rewrite.merge(traced.graph)
    rewrite.norm(traced.graph)
    traced.graph.lint()
    traced.recompile()
    names = [str(node.target) for node in traced.graph.nodes]
    assert [names.count(f"qbench.{op}.default") for op in ("normed_dual_linears", "dual_linear")] == [2, 2]
    assert all(torch.equal(a, b) for a, b in zip(traced(x), forward(x), strict=True))
    given = x, weight, 1e-6, *([part for each in tiles for part in each.flat()[i]] for i in (0, 1))
    torch.library.opcheck(together.normed_dual_linears, given, test_utils=("test_schema", "test_faketensor"))


def test_a_norm_of_every_head_is_no_norm_of_the_row(generator):
    tiles = to_tiles(random_weight((24, 40), 4, 64, generator))
    x, weight = torch.randn(1, 5, 8, generator=generator), torch.randn(8, generator=generator)

    def forward(x):
        normed = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return ops.linear(normed.reshape(1, 40), tiles)

    traced = make_fx(forward, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    rewrite.norm(traced.graph)
    traced.recompile()
    assert torch.equal(traced(x), forward(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])  # in a launch, and in front of it
@pytest.mark.parametrize("rows", [(4096, 512, 512), (2048,), (24, 40, 72)])
def test_a_norm_on_a_gpu(rows, dtype):
    draw = torch.Generator().manual_seed(0)
    weights = [random_weight((count, 1088), 4, 64, draw) for count in rows]
    tiles = [to_tiles(w.with_tensors({name: tensor.cuda() for name, tensor in w.tensors().items()})) for w in weights]
    x, weight = (torch.randn(size, generator=draw).to("cuda", dtype) for size in ((1, 1, 1088), (1088,)))
    flat = [part for each in tiles for part in each.flat()[0]], [part for each in tiles for part in each.flat()[1]]
    wide = 100 * x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    found = torch.ops.qbench.normed_dual_linears(100 * x, weight, 1e-6, *flat)
    for y, w in zip(found, weights, strict=True):
        expected = normed @ w.dequantize(torch.float64).mT.to("cuda")
        assert (y.double() - expected).norm() <= 1e-2 * expected.norm()
    again = torch.ops.qbench.normed_dual_linears(100 * x, weight, 1e-6, *flat)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_counter_is_copied_before_what_does_not_read_it(generator):
    tiles = to_tiles(random_weight((24, 40), 4, 64, generator))
    x, count = torch.randn(1, 40, generator=generator), torch.tensor([3])

    def forward(x, count):
        scaled, more = x * count, count + 1
        y = ops.linear(scaled, tiles)
        count.copy_(more)
        return y

    traced = make_fx(forward)(x, count.clone())
    rewrite.count_early(traced.graph)
    traced.graph.lint()
    traced.recompile()
    names = [str(node.target) for node in traced.graph.nodes]
    assert (
        names.index("aten.mul.Tensor") < names.index("aten.copy_.default") < names.index("qbench.dual_linear.default")
    )
    assert torch.equal(traced(x, count), forward(x, torch.tensor([3])))
    assert count == 4


def test_a_counter_that_is_read_through_a_view_waits_for_its_readers():
    def forward(x, count):
        seen, more = count.unsqueeze(0), count + 1
        y = x.exp()
        z = y * seen
        count.copy_(more)
        return z

    x = torch.ones(2)
    traced = make_fx(forward)(x, torch.tensor([3]))
    rewrite.count_early(traced.graph)
    traced.graph.lint()
    traced.recompile()
    assert torch.equal(traced(x, torch.tensor([3])), forward(x, torch.tensor([3])))


def test_experts_take_what_gates_them_and_what_adds_them_up(generator):
    tiles = to_tiles(random_weight((3, 24, 40), 4, 64, generator))
    gate, up = (torch.randn(2, 2, 40, generator=generator) for _ in range(2))
    index, scores = torch.tensor([[2, 0], [1, 1]]), torch.rand(2, 2, generator=generator)
    residual = torch.randn(1, 2, 24, generator=generator)

    def experts(x, index):
        return ops.linear_experts(x.flatten(0, 1), index.reshape(-1, 1), tiles).flatten(0, 1)

    def forward(gate, up, index, scores, residual):
        kept = grouped.silu_times(up, gate)
        read_twice = experts(grouped.silu_times(gate, 2 * up), index)
        total = grouped.combine(experts(grouped.silu_times(gate, up), index), index, scores, 3)
        more = residual + grouped.combine(experts(grouped.silu_times(gate, up + 1), index), index, scores, 3).view(
            1, 2, -1
        )
        return total, more, kept, experts(kept, index), read_twice, grouped.combine(read_twice, index, scores, 3)

    traced = make_fx(forward, tracing_mode="fake", _allow_non_fake_inputs=True)(gate, up, index, scores, residual)
    for node in traced.graph.nodes:
        node.meta["eager_input_vals"] = ((), {})
    rewrite.gate(traced.graph)
    new = [node for node in traced.graph.nodes if "_gated_" in str(node.target) or "_summed_" in str(node.target)]
    assert all("eager_input_vals" not in node.meta for node in new)  # inductor fits the inputs to those
    traced.graph.lint()
    traced.recompile()
    names = [str(node.target) for node in traced.graph.nodes]
    kinds = [f"dual_linear_{kind}experts" for kind in ("summed_", "gated_", "")]
    assert [names.count(f"qbench.{op}.default") for op in (*kinds, "silu_times", "combined")] == [2, 1, 1, 1, 1]
    given = gate, up, index, scores, residual
    found, expected = traced(*given), forward(*given)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gated_experts_on_a_gpu(dtype):
    draw = torch.Generator().manual_seed(0)
    weight = random_weight((4, 2048, 768), 4, 64, draw)
    tiles = to_tiles(weight.with_tensors({name: tensor.cuda() for name, tensor in weight.tensors().items()}))
    gate, up = (torch.randn(8, 768, generator=draw).to("cuda", dtype) for _ in range(2))
    index = torch.randint(4, (8, 1), generator=draw).cuda()
    found = torch.ops.qbench.dual_linear_gated_experts(gate, up, index, *tiles.flat())
    expected = ops.linear_experts(grouped.silu_times(gate, up), index, tiles)
    assert (found.double() - expected.double()).norm() <= 1e-2 * expected.double().norm()
    assert torch.equal(found, torch.ops.qbench.dual_linear_gated_experts(gate, up, index, *tiles.flat()))
    for k in (8, 2):
        pairs, scores = index.view(-1, k), torch.rand(8 // k, k, generator=draw).cuda()
        added = torch.ops.qbench.dual_linear_summed_experts(gate, up, pairs, scores, *tiles.flat(), None)
        total = grouped.combine(expected.flatten(0, 1).double(), pairs, scores.double(), 4)
        assert (added.double() - total).norm() <= 1e-2 * total.norm()
        again = torch.ops.qbench.dual_linear_summed_experts(gate, up, pairs, scores, *tiles.flat(), None)
        assert torch.equal(added, again)
        more = torch.randn(8 // k, 2048, generator=draw).to("cuda", dtype)
        with_more = torch.ops.qbench.dual_linear_summed_experts(gate, up, pairs, scores, *tiles.flat(), more)
        assert (with_more.double() - total - more.double()).norm() <= 1e-2 * total.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [(4096, 1024, 1024), (12288, 12288), (72, 24, 40, 16)])
@pytest.mark.parametrize("tokens", [1, 300])
def test_on_a_gpu(monkeypatch, rows, dtype, tokens):
    if tokens > 1 and torch.cuda.get_device_capability()[0] == 9:
        monkeypatch.setattr(blocks, "prompt_plan", lambda *_: PromptPlan(32, 2, 2))
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
