"""On a GPU: every bit-width, group, batch and tail against fp64; graphs; compilation; whole layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qbench.format.rotation import Rotation
from qbench.kernels import blocks, cuda, ops
from qbench.kernels.blocks import PromptPlan
from qbench.kernels.tiles import to_tiles
from qbench.layers.linear import QuantLinear, use_kernels
from tests.kernels.cases import FORMATS, different, random_weight, relative_error

pytestmark = pytest.mark.gpu
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 1e-2}


def on_gpu(weight):
    return weight.with_tensors({name: tensor.cuda() for name, tensor in weight.tensors().items()})


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("nbits", "codebook"), FORMATS)
def test_every_batch(generator, nbits, codebook, group_size):
    for shape in ((256, 1024), (40, 577), (1000, 4104)):
        weight = on_gpu(random_weight(shape, nbits, group_size, generator, codebook=codebook))
        tiles, bias = to_tiles(weight), torch.randn(shape[0], device="cuda")
        torch.cuda.synchronize()
        batches = range(1, 130) if shape == (40, 577) else (1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 64, 65, 129, 300, 513)
        for dtype, limit in LIMITS.items():
            for batch in batches:
                x = 0.1 * torch.randn(batch, shape[1], device="cuda", dtype=dtype)  # no sum leaves fp16's range
                poison = torch.full((2**20,), float("nan"), device="cuda")
                del poison
                y = ops.linear(x, tiles, bias.to(dtype))
                assert relative_error(y, x, weight, bias.to(dtype)) <= limit, (shape, batch, dtype)
                again = ops.linear(x, tiles, bias.to(dtype))
                assert not different(y, again), (shape, batch, dtype)


@pytest.mark.parametrize("plan", [PromptPlan(32, 2, 1), PromptPlan(32, 2, 2), PromptPlan(24, 2, 2)])
@pytest.mark.parametrize(
    ("nbits", "group_size", "codebook"),
    [(4, 32, False), (4, 64, False), (4, 64, True), (4, 128, False), (2, 64, False), (3, 64, False), (8, 64, False)],
)
def test_prompts(generator, plan, nbits, group_size, codebook):
    """Whole tiles and parted ones, of few rows of x and many; a weight smaller than a tile."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("prompt_linear.cu needs Hopper")
    for shape, batches in (((1000, 4104), (130, 513, 1100)), ((40, 577), (1, 300)), ((6144, 1024), (512,))):
        weight = on_gpu(random_weight(shape, nbits, group_size, generator, codebook=codebook, permuted=shape[0] == 40))
        tiles, bias = to_tiles(weight), torch.randn(shape[0], device="cuda")
        for dtype, limit in LIMITS.items():
            for batch in batches:
                x = 0.1 * torch.randn(batch, shape[1], device="cuda", dtype=dtype)
                y = cuda.linear(x, tiles, bias.to(dtype), plan)
                assert relative_error(y, x, weight, bias.to(dtype)) <= limit, (shape, batch, dtype)
                again = cuda.linear(x, tiles, bias.to(dtype), plan)
                assert not different(y, again), (shape, batch, dtype)


def test_prompts_in_a_graph(generator):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("prompt_linear.cu needs Hopper")
    plan = PromptPlan(32, 2, 2)
    weight = on_gpu(random_weight((1024, 1024), 4, 64, generator))
    tiles, x = to_tiles(weight), torch.randn(600, 1024, device="cuda").bfloat16()
    expected = cuda.linear(x, tiles, None, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [cuda.linear(x, tiles, None, plan) for _ in range(3)]
    for _ in range(3):
        for y in found:
            y.zero_()
        graph.replay()
        assert torch.equal(cuda.linear(x, tiles, None, plan), expected)
        assert all(torch.equal(y, expected) for y in found)


def test_dequantize_is_the_formats_own(generator):
    for nbits, codebook in FORMATS:
        weight = on_gpu(random_weight((256, 1000), nbits, 64, generator, codebook=codebook))
        tiles = to_tiles(weight)
        torch.cuda.synchronize()
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert torch.equal(cuda.dequantize(tiles, dtype), weight.dequantize(dtype))
    stack = on_gpu(random_weight((5, 40, 577), 4, 64, generator))
    tiles = to_tiles(stack)
    torch.cuda.synchronize()
    assert torch.equal(cuda.dequantize(tiles, torch.bfloat16), stack.dequantize(torch.bfloat16))


def test_what_runs_before_hopper(generator, monkeypatch):
    """The same code without what came with compute capability 9.0."""
    monkeypatch.setattr(cuda, "_plain", lambda device: True)
    weight = on_gpu(random_weight((1000, 1000), 3, 64, generator))
    tiles = to_tiles(weight)
    torch.cuda.synchronize()
    for batch in (1, 7, 16):
        (plan, *_) = blocks._by_rule(batch, 1000, 1000, plain=True)
        x = torch.randn(batch, 1000, device="cuda", dtype=torch.bfloat16)
        assert relative_error(cuda.linear(x, tiles, None, plan), x, weight) <= 1e-2


def test_experts(generator):
    weight = on_gpu(random_weight((8, 256, 512), 4, 64, generator))
    tiles = to_tiles(weight)
    torch.cuda.synchronize()
    for tokens in (1, 5, 40):  # 40 x 2 pairs go expert by expert
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        index = torch.randint(0, 8, (tokens, 2), device="cuda")
        expected = torch.einsum("tkoi,ti->tko", weight.dequantize()[index], x.float())
        y = ops.linear_experts(x, index, tiles).float()
        assert (y - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("block", [64, 1024, 4096, 8192])
def test_rotated_weights(generator, block):
    """Blocks up to the kernel's largest, and one that is left to the reference."""
    from qbench.kernels import hadamard

    plain, rotation = random_weight((256, 8192), 4, 64, generator), Rotation.seeded(8192, block, 0)
    weight = on_gpu(replace(plain, rotation=rotation))
    x = torch.randn(3, 8192, device="cuda")
    if block <= hadamard.LARGEST_BLOCK:
        assert torch.equal(hadamard.rotate(x, weight.rotation), weight.rotation(x))
    torch.testing.assert_close(weight.rotation(x).cpu(), rotation(x.cpu()), rtol=1e-6, atol=1e-6)
    tiles = to_tiles(weight)
    torch.cuda.synchronize()
    for dtype, limit in LIMITS.items():
        for batch in (0, 1, 16, 300, 600):
            x = 0.1 * torch.randn(batch, 8192, device="cuda", dtype=dtype)
            y = ops.linear(x, tiles)
            assert y.shape == (batch, 256)
            assert batch == 0 or relative_error(y, x, weight) <= 2 * limit, (batch, dtype)  # x is rounded once more


@pytest.mark.parametrize("batch", [1, 300])
@pytest.mark.parametrize("rotated", [False, True])
def test_graph_and_compilation(generator, rotated, batch):
    weight = random_weight((1024, 2048), 4, 64, generator)
    layer = QuantLinear(on_gpu(replace(weight, rotation=Rotation.seeded(2048, 1024, 0) if rotated else None)))
    use_kernels(layer)
    x = torch.randn(batch, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.normal_()
        graph.replay()
        assert torch.equal(y, layer(x))
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_a_layer_agrees_with_the_packed_format(generator):
    for permuted in (False, True):
        weight = random_weight((512, 1000), 4, 64, generator, permuted=permuted)
        layer = QuantLinear(weight, torch.randn(512, generator=generator)).cuda()
        x = torch.randn(300, 1000, device="cuda", dtype=torch.float32)
        before = layer(x)
        use_kernels(layer)
        assert (layer(x) - before).norm() < 1e-5 * before.norm()  # fp32, but for the order of the sums
        layer.restore()
        assert torch.equal(layer(x), before)
