"""On a GPU: kernels that follow each other without a gap, as in a graph, give what they give when each waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qbench.format.rotation import Rotation
from qbench.kernels import blocks, cuda, grouped, ops
from qbench.kernels.blocks import PromptPlan
from qbench.kernels.routes import route
from qbench.kernels.tiles import to_tiles
from qbench.layers.linear import use_kernels
from tests.kernels.cases import different, random_weight, relative_error
from tests.kernels.test_gpu import on_gpu
from tests.kernels.test_gpu_experts import EXPERTS, PER_TOKEN, block, some_index
from tests.kernels.test_together import flattened

pytestmark = pytest.mark.gpu
LAUNCHES = 10  # one behind the other


def drawn(rows: int, columns: int) -> list[Tensor]:
    return [0.1 * torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(LAUNCHES)]


def check(monkeypatch, multiply: Callable[[Tensor], list[Tensor]], xs: list[Tensor]) -> list[list[Tensor]]:
    """What each x gives by itself, once a graph of all of them was seen to give the same in every replay."""
    monkeypatch.setattr(cuda, "EARLY_START", False)
    expected = [multiply(x) for x in xs]
    torch.cuda.synchronize()
    monkeypatch.setattr(cuda, "EARLY_START", True)
    multiply(xs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [multiply(x) for x in xs]
    for _ in range(20):
        for ys in found:
            for y in ys:
                y.fill_(float("nan"))
        graph.replay()
        for place, (ys, right) in enumerate(zip(found, expected, strict=True)):
            for y, other in zip(ys, right, strict=True):
                assert not different(y, other), place
    return expected


@pytest.mark.parametrize("batch", [1, 3, 9, 16, 33, 129])
@pytest.mark.parametrize(("nbits", "group_size"), [(2, 128), (4, 64)])
def test_linears(generator, monkeypatch, nbits, group_size, batch):
    """At 2 bits what is summed takes more memory than the codes that it is made of."""
    weight = on_gpu(random_weight((1000, 4104), nbits, group_size, generator))
    tiles, xs = to_tiles(weight), drawn(batch, 4104)
    made = check(monkeypatch, lambda x: [ops.linear(x, tiles)], xs)
    assert all(relative_error(y, x, weight) <= 1e-2 for x, [y] in zip(xs, made, strict=True))


@pytest.mark.parametrize("batch", [1, 9, 70, 600])
def test_rotated(generator, monkeypatch, batch):
    weight = random_weight((520, 4096), 2, 128, generator)
    weight = on_gpu(replace(weight, rotation=Rotation.seeded(4096, 1024, 0)))
    tiles, xs = to_tiles(weight), drawn(batch, 4096)
    made = check(monkeypatch, lambda x: [ops.linear(x, tiles)], xs)
    assert all(relative_error(y, x, weight) <= 2e-2 for x, [y] in zip(xs, made, strict=True))


@pytest.mark.parametrize("plan", [PromptPlan(32, 2, 1), PromptPlan(32, 2, 2), PromptPlan(24, 2, 2)])
def test_prompts(generator, monkeypatch, plan):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("prompt_linear.cu needs Hopper")
    tiles = to_tiles(on_gpu(random_weight((1000, 4104), 4, 64, generator)))
    check(monkeypatch, lambda x: [cuda.linear(x, tiles, None, plan)], drawn(600, 4104))


@pytest.mark.parametrize("tokens", [1, 300])
def test_weights_of_one_launch(generator, monkeypatch, tokens):
    if tokens > 1 and torch.cuda.get_device_capability()[0] == 9:
        monkeypatch.setattr(blocks, "prompt_plan", lambda *_: PromptPlan(32, 2, 2))
    tiles = [to_tiles(on_gpu(random_weight((rows, 1088), 4, 64, generator))) for rows in (1024, 264, 40)]
    check(monkeypatch, lambda x: torch.ops.qbench.dual_linears(x, *flattened(tiles)), drawn(tokens, 1088))


@pytest.mark.parametrize("rows", [16, 128, 192])
@pytest.mark.parametrize("nbits", [2, 4])
def test_sorted_experts(generator, monkeypatch, nbits, rows):
    tiles = to_tiles(on_gpu(random_weight((EXPERTS, 264, 1040), nbits, 64, generator)))
    index, scores = some_index(300), torch.rand(300, PER_TOKEN, device="cuda")
    held = route(index, EXPERTS, rows)

    def multiply(x):
        return [grouped.combine(grouped.dual_linear(x, tiles, held, True), index, scores, EXPERTS, held)]

    check(monkeypatch, multiply, drawn(300, 1040))


@pytest.mark.parametrize("tokens", [1, 5, 40, 600])
def test_a_mixtures_block(generator, monkeypatch, tokens):
    experts, _ = block(generator)
    use_kernels(experts)
    index, scores = some_index(tokens), torch.rand(tokens, PER_TOKEN, device="cuda").bfloat16()
    with torch.no_grad():
        check(monkeypatch, lambda x: [experts(x, index, scores)], drawn(tokens, 256))


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("nbits", [2, 4])
def test_a_token_of_a_mixture(generator, monkeypatch, nbits, summed):
    """The choice, gate and up, and the product with down, which reads what was chosen before gate and up have ended."""
    gate, up = (to_tiles(on_gpu(random_weight((EXPERTS, 264, 1040), nbits, 64, generator))) for _ in range(2))
    down = to_tiles(on_gpu(random_weight((EXPERTS, 1040, 264), nbits, 64, generator)))
    router = torch.randn(EXPERTS, 1040, device="cuda", dtype=torch.bfloat16)
    op = torch.ops.qbench

    def multiply(x):
        scores, index = op.choose(x @ router.T, PER_TOKEN, True, True, torch.bfloat16)
        gates, ups = (y.flatten(0, 1) for y in op.dual_linear_both_experts(x, index, *gate.flat(), *up.flat()))
        if summed:
            return [op.dual_linear_summed_experts(gates, ups, index, scores, *down.flat(), x)]
        return [op.dual_linear_gated_experts(gates, ups, index.reshape(-1, 1), *down.flat())]

    check(monkeypatch, multiply, drawn(1, 1040))
