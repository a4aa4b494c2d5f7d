"""The Triton kernels of a mixture's layer in the interpreter: routes, dense stacks, sums, dequantization."""

from __future__ import annotations

import pytest
import torch

import tests.kernels.interpreted  # noqa: F401  (skips where there is a GPU or no Triton)
from qbench.kernels import grouped, together, triton_experts, triton_linear
from qbench.kernels import routes as routing
from qbench.kernels.routes import route
from qbench.kernels.tiles import to_tiles
from tests.kernels.cases import random_weight
from tests.kernels.test_choose import check
from tests.kernels.test_grouped import CASES, EXPERTS, some_index


@pytest.mark.parametrize(("tokens", "per_token", "rows"), CASES[1:])
def test_routes_by_triton(generator, tokens, per_token, rows):
    index = some_index(generator, tokens, per_token)
    made = routing._empty(index, EXPERTS, rows)
    triton_experts.route(index, EXPERTS, rows, made)
    expected = routing._sorted(index, EXPERTS, rows)
    for slots in (made[-1], expected[-1]):
        slots[slots[:, 2] == 0] = 0  # where an empty one begins is nobody's business
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, expected, strict=True))


@pytest.mark.parametrize(("first", "rows"), [(0, 16), (2, 16), (0, 192)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dense_stacks_by_triton(generator, first, rows, dtype):
    made = route(some_index(generator, 20, 2), EXPERTS, rows)
    stack = torch.randn(EXPERTS - first, 24, 72, generator=generator).to(dtype)
    x = torch.randn(40, 72, generator=generator).to(dtype)
    y = torch.full((40, 24), 7.0, dtype=dtype)
    triton_experts.multiply(x, stack, made, y, first)
    start = int(made.starts[first])
    assert (y[:start] == 7).all()
    assert (y[made.starts[-1] :] == 7).all()
    here = slice(start, int(made.starts[-1]))
    expected = torch.einsum("poi,pi->po", stack[made.expert[here].long() - first].double(), x[here].double())
    torch.testing.assert_close(y[here].double(), expected, rtol=2e-3, atol=2e-2 if dtype == torch.float16 else 1e-4)


def test_combine_by_triton(generator):
    index = some_index(generator, 8, 3)
    made, scores = route(index, EXPERTS, 16), torch.rand(8, 3, generator=generator)
    y, out = torch.randn(24, 40, generator=generator), torch.empty(8, 40)
    y[made.starts[-1] :] = float("nan")  # what nobody wrote
    triton_experts.combine(y, index, scores, EXPERTS, made.place, out)
    torch.testing.assert_close(out, grouped.combine(y, index, scores, EXPERTS, made))
    assert torch.isfinite(out).all()
    in_order = torch.randn(24, 40, generator=generator)
    triton_experts.combine(in_order, index, scores, EXPERTS, None, out)
    torch.testing.assert_close(out, grouped.combine(in_order, index, scores, EXPERTS))


def test_gates_by_triton(generator):
    gate, up = (4 * torch.randn(3, 700, generator=generator).half() for _ in range(2))
    torch.testing.assert_close(triton_experts.silu_times(gate, up), grouped.silu_times(gate, up), rtol=2e-3, atol=1e-6)


def test_stacks_are_dequantized_as_their_matrices_by_triton(generator):
    weight = random_weight((3, 24, 130), 4, 64, generator)
    assert torch.equal(triton_linear.dequantize(to_tiles(weight), torch.float32), weight.dequantize())
    part = to_tiles(weight).span(1, 3)
    assert torch.equal(triton_linear.dequantize(part, torch.float32), weight.dequantize()[1:])


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 128, 8), (3, 160, 6), (2, 8, 3)])
def test_choices_by_triton(generator, tokens, experts, k):
    x = 3 * torch.randn(tokens, experts, generator=generator)
    for softmax, normalize, dtype in ((True, True, torch.float16), (False, False, torch.float32)):
        check(triton_experts.choose, x, k, softmax, normalize, dtype)
    x = torch.tensor([[-1.0, 2.0, 2.0, -3.0, 0.0, 2.0]])
    weights, index = triton_experts.choose(x, 5, False, False, torch.float32)
    assert (weights.tolist(), index.tolist()) == ([[2, 2, 2, 0, -1]], [[1, 2, 5, 4, 0]])  # of equal ones the first


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_norm_by_triton(generator, dtype):
    x, weight = torch.randn(2, 1, 41, generator=generator).to(dtype), torch.randn(41, generator=generator).to(dtype)
    found = triton_experts.rms_norm(x.transpose(0, 1)[..., :40], weight[:40], 0.5)
    expected = together._normed(x.transpose(0, 1)[..., :40], weight[:40], 0.5)
    assert found.dtype == dtype
    assert torch.allclose(found, expected, rtol=2e-3 if dtype == torch.float16 else 1e-5)
