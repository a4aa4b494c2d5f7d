"""Attention of one token over a cache, in two launches: what torch's own gives for the same mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qbench.kernels import attend

SIZES = [(1, 8, 2, 24, 24, 50), (2, 4, 4, 24, 16, 150), (1, 36, 36, 40, 16, 130)]


def check(one, batch, heads, shared, width, value_width, length, device="cpu", dtype=torch.float16, limit=2e-3):
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(batch, 1, heads, width, generator=draw).transpose(1, 2).to(device, dtype)
    key, value = (torch.randn(batch, shared, length, w, generator=draw).to(device, dtype) for w in (width, value_width))
    looks = (torch.arange(length) < length - torch.arange(batch)[:, None] * 45 - 3)[:, None, None].to(device)
    found = one(query, key, value, looks, 0.3)
    wide = [tensor.double().repeat_interleave(heads // shared, 1) for tensor in (key, value)]
    expected = F.scaled_dot_product_attention(query.double(), *wide, attn_mask=looks, scale=0.3).transpose(1, 2)
    assert (found.shape, found.dtype) == ((batch, 1, heads, value_width), dtype)
    assert (found.double() - expected).norm() <= limit * expected.norm()
    assert torch.equal(found, one(query, key, value, looks, 0.3))


@pytest.mark.parametrize("sizes", SIZES)
def test_the_op(sizes):
    check(attend.attend_one, *sizes, dtype=torch.float32, limit=1e-5)
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8)
    given = query, key, key, torch.ones(1, 1, 1, 5, dtype=torch.bool), 0.5
    torch.library.opcheck(attend.attend_one, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    "sizes", [*SIZES, (1, 32, 4, 128, 128, 576), (1, 128, 128, 192, 128, 576), (3, 32, 8, 128, 128, 900)]
)
def test_on_a_gpu(sizes, dtype, limit):
    check(torch.ops.qbench.attend_one, *sizes, "cuda", dtype, limit)
