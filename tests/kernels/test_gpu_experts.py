"""A mixture's experts on a GPU: every format against fp64, in every way; graphs, compilation, and nothing read back."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qbench.format.rotation import Rotation
from qbench.kernels import grouped, ops
from qbench.kernels import routes as routing
from qbench.kernels.routes import route
from qbench.kernels.tiles import to_tiles
from qbench.layers.experts import QuantExperts
from qbench.layers.linear import use_kernels
from tests.kernels.cases import FORMATS, different, random_weight
from tests.kernels.test_gpu import LIMITS, on_gpu

pytestmark = pytest.mark.gpu
EXPERTS, PER_TOKEN = 8, 3
WAYS = {"fused": 2**30, "written": 0}  # pairs an expert up to which the fused kernel serves


def some_index(tokens, experts=EXPERTS):
    """`[tokens, PER_TOKEN]`: expert 1 gets none, some live elsewhere, and expert 0 gets most."""
    drawn = torch.rand(tokens, experts + 1, device="cuda")
    drawn[:, 1] = 2
    drawn[::2, 0] = -1
    return drawn.argsort(-1)[:, :PER_TOKEN]


def relative(y, x, dense, index, scores):
    """||y - reference|| / ||reference||, with the reference expert by expert in fp64."""
    expected = torch.zeros(len(x), dense.shape[1], device="cuda", dtype=torch.float64)
    for expert, matrix in enumerate(dense):
        token, slot = torch.where(index == expert)
        expected.index_add_(0, token, x[token].double() @ matrix.double().T * scores[token, slot, None].double())
    error = float((y.double() - expected).norm() / expected.norm())
    return error if error == error else float("inf")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("nbits", "codebook"), FORMATS)
def test_every_format(generator, monkeypatch, nbits, codebook, group_size, way):
    monkeypatch.setattr(grouped, "FUSED_PAIRS", WAYS[way])
    for shape, permuted in (((EXPERTS, 256, 1024), False), ((EXPERTS, 40, 577), True)):
        weight = on_gpu(random_weight(shape, nbits, group_size, generator, codebook=codebook, permuted=permuted))
        tiles, dense = to_tiles(weight), weight.dequantize()
        torch.cuda.synchronize()
        for tokens in (1, 30, 700):
            index, scores = some_index(tokens), torch.rand(tokens, PER_TOKEN, device="cuda")
            for dtype, limit in LIMITS.items():
                x = 0.1 * torch.randn(tokens, shape[2], device="cuda", dtype=dtype)
                for rows in routing.SLOT_ROWS:
                    poison = torch.full((2**22,), float("nan"), device="cuda")
                    del poison
                    held = route(index, EXPERTS, rows)
                    y = grouped.combine(grouped.dual_linear(x, tiles, held, True), index, scores, EXPERTS, held)
                    assert relative(y, x, dense, index, scores) <= limit, (shape, tokens, dtype, rows)
                    again = grouped.combine(grouped.dual_linear(x, tiles, held, True), index, scores, EXPERTS, held)
                    assert not different(y, again), (shape, tokens, dtype, rows)


def test_routes():
    """One launch, and the sort that serves many pairs."""
    for tokens in (1, 100, 5000):
        index = some_index(tokens)
        for rows in (16, 128):
            made = route(index, EXPERTS, rows)
            expected = routing._sorted(index, EXPERTS, rows)
            for slots in (made.slots, expected[-1]):
                slots[slots[:, 2] == 0] = 0
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(made.flat(), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dense_stacks(generator, monkeypatch, dtype):
    """torch's grouped product, Triton's, and in parts."""
    limit = LIMITS.get(dtype, 1e-5)
    for shape in ((EXPERTS, 256, 512), (EXPERTS, 40, 100)):
        weight = on_gpu(random_weight(shape, 4, 64, generator))
        index, x = some_index(200), torch.randn(200, shape[2], device="cuda", dtype=dtype)
        scores, held = torch.rand(200, PER_TOKEN, device="cuda"), route(index, EXPERTS)
        for largest in (2**32, 3 * shape[1] * shape[2] * x.element_size()):
            monkeypatch.setattr(grouped, "DENSE_BYTES", largest)
            y = grouped.combine(grouped.multiply(x, weight, held, True), index, scores, EXPERTS, held)
            assert relative(y, x, weight.dequantize(), index, scores) <= limit


class Original(nn.Module):
    """Experts as transformers flags them, of random weights."""

    def __init__(self, hidden, inner):
        super().__init__()
        self.num_experts, self.act_fn = EXPERTS, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, hidden, inner))
        self.is_transposed, self.has_gate, self.is_concatenated, self.has_bias = False, True, True, False


def block(generator, group_size=64, rotated=False):
    """Quantized experts and what they hold, `[experts, out, in]` in fp32."""
    stacks = []
    for rows, columns in ((128, 256), (128, 256), (256, 128)):
        weight = random_weight((EXPERTS, rows, columns), 4, group_size, generator)
        weight = replace(weight, rotation=Rotation.seeded(columns, 64, 0) if rotated else None)
        weight.scale.stored.mul_(0.02)
        stacks.append(on_gpu(weight))
    made = QuantExperts(stacks, Original(256, 128)).cuda().requires_grad_(False)
    return made, SimpleNamespace(gate=stacks[0], up=stacks[1], down=stacks[2])


def expected_block(held, x, index, scores):
    gate, up, down = (stack.dequantize().double() for stack in (held.gate, held.up, held.down))
    total = torch.zeros(len(x), 256, device="cuda", dtype=torch.float64)
    for expert in range(EXPERTS):
        token, slot = torch.where(index == expert)
        rows = x[token].double()
        inner = nn.functional.silu(rows @ gate[expert].T) * (rows @ up[expert].T)
        total.index_add_(0, token, inner @ down[expert].T * scores[token, slot, None].double())
    return total


@pytest.mark.parametrize("kind", ["kernels", "rotated", "no kernel for groups of 48", "packed"])
@pytest.mark.parametrize("tokens", [5, 40, 600])
def test_a_block_reads_nothing_back(generator, kind, tokens):
    """Eagerly with every wait an error, in a CUDA graph that is replayed for another routing, and compiled."""
    experts, held = block(generator, 48 if "48" in kind else 64, kind == "rotated")
    if kind != "packed":
        use_kernels(experts)
        assert (experts.gate_proj.kernel is None) == ("48" in kind)
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    index, scores = some_index(tokens), torch.rand(tokens, PER_TOKEN, device="cuda").bfloat16()
    with torch.no_grad():
        experts(x, index, scores)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = experts(x, index, scores)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = experts(x, index, scores)
        expected = expected_block(held, x, index, scores)
        assert (y.double() - expected).norm() < 2e-2 * expected.norm()
        x.normal_()
        index.copy_(some_index(tokens))
        graph.replay()
        expected = expected_block(held, x, index, scores)
        assert (captured.double() - expected).norm() < 2e-2 * expected.norm()
        assert torch.equal(captured, experts(x, index, scores))
        if tokens == 40:
            compiled = torch.compile(experts, fullgraph=True)(x, index, scores)
            assert (compiled.double() - expected).norm() < 2e-2 * expected.norm()


def test_pairs_and_slots_agree(generator, monkeypatch):
    """The kernel of few pairs and that of many, on the same pairs."""
    experts, held = block(generator)
    use_kernels(experts)
    x, index = torch.randn(9, 256, device="cuda", dtype=torch.bfloat16), some_index(9)
    scores = torch.rand(9, PER_TOKEN, device="cuda").bfloat16()
    expected = expected_block(held, x, index, scores)
    for pairs in (0, 64):
        monkeypatch.setattr(ops, "EXPERT_PAIRS", pairs)
        assert (experts(x, index, scores).double() - expected).norm() < 2e-2 * expected.norm()
