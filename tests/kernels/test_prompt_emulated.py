"""prompt_linear.cu and its launch code against fp64, on the CPU: tiles whole and parted, clusters, tails."""

from __future__ import annotations

import pytest
import torch

from qbench.kernels import blocks, cuda, cuda_prompt, nvrtc
from qbench.kernels.blocks import PromptPlan
from qbench.kernels.tiles import to_tiles
from tests.kernels.cases import random_weight, relative_error


def check(generator, shape, rows, plan, dtype=torch.bfloat16, bias=False, **options):
    weight = random_weight(shape, options.pop("nbits", 4), options.pop("group_size", 64), generator, **options)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if bias else None
    y = cuda.linear(x, to_tiles(weight), bias, plan)
    assert relative_error(y, x, weight, bias) <= (1e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "rows", "plan", "at_work", "clusters"),
    [
        ((200, 330), 150, PromptPlan(16, 1, 2), 3, 3),  # of 4 tiles of two blocks the last is parted
        ((200, 130), 20, PromptPlan(16, 1, 2), 7, 4),  # both tiles are
        ((300, 450), 20, PromptPlan(24, 2, 2), 5, 4),
        ((200, 330), 20, PromptPlan(16, 1, 2), 3, 2),  # none is: each has a cluster
        ((200, 100), 20, PromptPlan(16, 1, 2), 7, 2),  # columns of one chunk
        ((200, 330), 20, PromptPlan(16, 1, 4), 1, 1),
        ((200, 330), 20, PromptPlan(16, 3, 1), 3, 2),
    ],
)
def test_tiles_of_the_last_wave(emulated, generator, monkeypatch, shape, rows, plan, at_work, clusters):
    monkeypatch.setattr(nvrtc, "clusters_at_work", lambda *_: at_work)
    check(generator, shape, rows, plan, bias=True)
    ((grid, threads, _, cluster),) = emulated
    assert (grid, threads, cluster) == ((clusters * plan.share, 1, 1), plan.threads, plan.share)


@pytest.mark.slow
def test_weights_together(emulated, generator):
    """q, k and v, each with its own t and a last tile that is not full."""
    weights = [random_weight((rows, 330), 4, 64, generator) for rows in (200, 40, 72)]
    x = torch.randn(20, 330, generator=generator).bfloat16()
    ys = cuda_prompt.linears(x, [to_tiles(weight) for weight in weights], PromptPlan(16, 1, 2))
    assert len(emulated) == 1
    for weight, y in zip(weights, ys, strict=True):
        assert relative_error(y, x, weight, None) <= 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "group_size", "options"),
    [
        (torch.bfloat16, 64, {"nbits": 2}),
        (torch.float16, 32, {"nbits": 2, "zero": False}),
        (torch.bfloat16, 64, {"nbits": 3, "bias": True}),
        (torch.float16, 128, {"nbits": 3, "t": False}),
        (torch.bfloat16, 128, {"nbits": 8}),
        (torch.float16, 64, {"nbits": 8, "zero": False}),
        (torch.float16, 32, {}),
        (torch.bfloat16, 128, {"zero": False, "bias": True}),
        (torch.float16, 64, {"permuted": True, "bias": True}),
        (torch.bfloat16, 64, {"codebook": True, "zero": False}),
        (torch.float16, 64, {"codebook": True, "zero": False, "t": False}),
    ],
)
def test_every_kind(emulated, generator, dtype, group_size, options):
    check(generator, (43, 331), 37, PromptPlan(16, 1, 1), dtype, group_size=group_size, **options)


@pytest.mark.slow
def test_a_product_with_t_beyond_fp16(emulated, generator):
    """t goes into the weight, and not into x, whose products with t fp16 cannot hold."""
    weight = random_weight((16, 130), 4, 64, generator)
    weight.input_scale.mul_(8)
    weight.scale.stored.mul_(1e-4)
    x = torch.randn(3, 130, generator=generator).clamp(-3, 3).half() * 2e4
    y = cuda.linear(x, to_tiles(weight), None, PromptPlan(16, 1, 1))
    assert relative_error(y, x, weight, None) <= 1e-3


TUNED = {
    "prompt 4 bit 12288x4096 batch 512": [32, 2, 1],
    "prompt 4 bit 12288x4096 batch 1024": [],
    "4 bit 12288x4096 batch 512": [16, 3, 1, 1, 4],
    "4 bit 12288x4096 batch 1024": [],
}


def test_plans(monkeypatch):
    """A tuned entry decides, else a rule; a tile that would be half empty is not computed whole."""
    monkeypatch.setattr(blocks, "_table", lambda gpu: TUNED)
    blocks._plan.cache_clear()

    def plan(M, nbits=4, N=12288):
        return blocks._plan(M, N, 4096, (nbits, 64, True), "a GPU", blocks.LARGEST_SHARED)

    assert plan(512) == plan(512, nbits=3) == PromptPlan(32, 2, 1)
    assert plan(300) == blocks.WidePlan(16, 3, 1, 1, 4)
    assert plan(1024) is None
    assert plan(512, N=4096) == plan(4096) == plan(2048, nbits=8) == PromptPlan(32, 2, 2)
    assert isinstance(plan(256, N=4096), blocks.WidePlan)
    assert isinstance(plan(512, N=2048), blocks.WidePlan)  # a quarter of the tiles that would fill the GPU
    assert plan(1024, N=1024) is None
    assert plan(8192) is plan(540, N=4096) is None
    for blocks_of_x in (16, 24, 32):
        for group_size in (32, 64, 128):
            found = PromptPlan(blocks_of_x, 2, 1)
            for nbits in (2, 3, 4, 8):
                assert found.stages(nbits, group_size, True)[0] >= 4
                assert found.shared_bytes(512, 32, nbits, group_size, True) <= blocks.LARGEST_SHARED
    blocks._plan.cache_clear()
