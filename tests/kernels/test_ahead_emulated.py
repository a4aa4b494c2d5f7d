"""ahead_linear.cu and its launch code against fp64, on the CPU: several tiles a block, clusters, tails, every width."""

from __future__ import annotations

import pytest
import torch

from qbench.kernels import cuda, cuda_prompt, nvrtc
from qbench.kernels.blocks import LARGEST_SHARED, AheadPlan
from qbench.kernels.tiles import to_tiles
from tests.kernels.cases import random_weight, relative_error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "rows", "plan", "at_work", "nbits", "dtype", "options"),
    [
        ((200, 331), 150, AheadPlan(16, 1, 1), 3, 4, torch.bfloat16, {"bias": True}),
        ((200, 330), 150, AheadPlan(16, 1, 2), 2, 4, torch.float16, {"permuted": True}),
        ((72, 330), 20, AheadPlan(16, 2, 1), 5, 3, torch.bfloat16, {"zero": False}),
        ((72, 200), 20, AheadPlan(16, 1, 1), 1, 8, torch.float16, {"t": False}),
        ((72, 200), 20, AheadPlan(16, 1, 1), 1, 2, torch.bfloat16, {"group_size": 32}),
        ((72, 200), 20, AheadPlan(16, 1, 1), 1, 4, torch.bfloat16, {"codebook": True, "zero": False}),
    ],
)
def test_as_in_fp64(emulated, generator, monkeypatch, shape, rows, plan, at_work, nbits, dtype, options):
    monkeypatch.setattr(nvrtc, "clusters_at_work", lambda *_: at_work)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if options.pop("bias", False) else None
    weight = random_weight(shape, nbits, options.pop("group_size", 64), generator, **options)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    y = cuda.linear(x, to_tiles(weight), bias, plan)
    assert relative_error(y, x, weight, bias) <= (1e-3 if dtype == torch.float16 else 1e-2)
    assert [launched[1] for launched in emulated] == [256, plan.threads]


@pytest.mark.slow
def test_weights_together(emulated, generator, monkeypatch):
    """q, k and v, each with its own t and a last tile that is not full."""
    monkeypatch.setattr(nvrtc, "clusters_at_work", lambda *_: 2)
    weights = [random_weight((rows, 330), 4, 64, generator) for rows in (200, 40, 72)]
    x = torch.randn(20, 330, generator=generator).bfloat16()
    ys = cuda_prompt.linears(x, [to_tiles(weight) for weight in weights], AheadPlan(16, 1, 1))
    for weight, y in zip(weights, ys, strict=True):
        assert relative_error(y, x, weight, None) <= 1e-2


@pytest.mark.parametrize("blocks_of_x", [16, 24, 32])
def test_what_fits(blocks_of_x):
    plan = AheadPlan(blocks_of_x, 2, 2)
    assert plan.stages >= 4
    assert plan.shared_bytes(2048, 32, 4, 64, True) <= LARGEST_SHARED
