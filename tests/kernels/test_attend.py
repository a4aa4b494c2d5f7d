"""Attention of one token over a cache, in two launches: what torch's own gives for the same mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from qbench.format.rotation import Rotation
from qbench.kernels import attend, cuda, ops
from qbench.kernels import tiles as layout
from qbench.kernels.tiles import to_tiles
from tests.kernels.cases import random_weight

SIZES = [(1, 8, 2, 24, 24, 50), (2, 4, 4, 24, 16, 150), (1, 20, 1, 40, 16, 70)]


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


# batch, heads, own and turned columns of a query, width of a latent, of a value, length
LATENTS = [(1, 20, 24, 8, 40, 16, 50), (2, 4, 16, 16, 16, 24, 100)]


def check_latent(
    one, batch, heads, own, turned, width, value_width, length, device="cpu", dtype=torch.float16, limit=2e-3
):
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(batch, 1, heads, own + turned, generator=draw).transpose(1, 2).to(device, dtype)
    latent, rotary = (torch.randn(batch, 1, length, w, generator=draw).to(device, dtype) for w in (width, turned))
    weight = (torch.randn(heads * (own + value_width), width, generator=draw) / width**0.5).to(device, dtype)
    looks = (torch.arange(length) < length - torch.arange(batch)[:, None] * 45 - 3)[:, None, None].to(device)
    found = one(query, latent, rotary, weight, looks, 0.3)
    made = F.linear(latent.double(), weight.double()).view(batch, length, heads, -1).transpose(1, 2)
    key = torch.cat((made[..., :own], rotary.double().expand(-1, heads, -1, -1)), -1)
    expected = F.scaled_dot_product_attention(query.double(), key, made[..., own:], attn_mask=looks, scale=0.3)
    assert (found.shape, found.dtype) == ((batch, 1, heads, value_width), dtype)
    assert (found.double() - expected.transpose(1, 2)).norm() <= limit * expected.norm()
    assert torch.equal(found, one(query, latent, rotary, weight, looks, 0.3))


@pytest.mark.parametrize("sizes", LATENTS)
def test_the_op_over_latents(sizes):
    check_latent(attend.attend_latent, *sizes, dtype=torch.float32, limit=1e-5)
    query, latent, rotary, weight = (torch.randn(size) for size in ((1, 4, 1, 8), (1, 1, 5, 6), (1, 1, 5, 3), (32, 6)))
    given = query, latent, rotary, weight, torch.ones(1, 1, 1, 5, dtype=torch.bool), 0.5
    torch.library.opcheck(attend.attend_latent, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("sizes", SIZES)
def test_the_op(sizes):
    check(attend.attend_one, *sizes, dtype=torch.float32, limit=1e-5)
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8)
    given = query, key, key, torch.ones(1, 1, 1, 5, dtype=torch.bool), 0.5
    torch.library.opcheck(attend.attend_one, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    "sizes",
    [
        *SIZES,
        (1, 32, 4, 128, 128, 576),
        (1, 128, 128, 192, 128, 576),
        (3, 32, 8, 128, 128, 900),
        (1, 8, 2, 64, 64, 5000),
    ],
)
def test_on_a_gpu(sizes, dtype, limit):
    check(torch.ops.qbench.attend_one, *sizes, "cuda", dtype, limit)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 4e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize("sizes", [*LATENTS, (1, 128, 128, 64, 512, 128, 576), (2, 16, 128, 64, 512, 128, 2500)])
def test_latents_on_a_gpu(sizes, dtype, limit):
    check_latent(torch.ops.qbench.attend_latent, *sizes, "cuda", dtype, limit)


@pytest.mark.parametrize(
    ("device", "dtype", "limit"),
    [("cpu", torch.float32, 1e-5), pytest.param("cuda", torch.bfloat16, 2e-2, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize(("heads", "own", "value"), [(4, 16, 32), (3, 20, 12)])
def test_latents_of_a_packed_weight(heads, own, value, device, dtype, limit):
    """In rows of whole strips, and not so."""
    draw = torch.Generator().manual_seed(0)
    weight = random_weight((heads * (own + value), 130), 4, 64, draw)
    tiles = to_tiles(weight.with_tensors({name: tensor.to(device) for name, tensor in weight.tensors().items()}))
    query, latent, rotary = (
        torch.randn(size, generator=draw).to(device, dtype)
        for size in ((1, heads, 1, own + 8), (1, 1, 70, 130), (1, 1, 70, 8))
    )
    looks = (torch.arange(70) < 60)[None, None, None].to(device)
    given = query, latent, rotary, *tiles.flat(), looks, 0.3
    found = torch.ops.qbench.dual_attend_latent(*given)
    exact = [one.double().cpu() for one in (query, latent, rotary, weight.dequantize(torch.float64))]
    expected = attend.attend_latent_plainly(*exact, looks.cpu(), 0.3)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    assert (found.double().cpu() - expected).norm() <= limit * expected.norm()
    torch.library.opcheck(attend.dual_attend_latent, given, test_utils=("test_schema", "test_faketensor"))


def test_a_rotated_weight_in_its_own_basis_where_no_kernel_undoes_it(monkeypatch, generator):
    """What Triton writes is in the rotated basis."""
    weight = replace(random_weight((32, 128), 4, 64, generator), rotation=Rotation.seeded(128, 64, 0))
    in_rotated_basis = lambda tiles, dtype: layout.dequantize(replace(tiles, rotation=None), dtype)  # noqa: E731
    monkeypatch.setattr(cuda, "refusal", lambda *_: "it does not compile")
    monkeypatch.setattr(ops, "_dequantize_on_gpu", in_rotated_basis)
    found = attend._natural(to_tiles(weight), torch.bfloat16)
    assert (found.double() - weight.dequantize().double()).norm() <= 1e-2 * found.double().norm()
