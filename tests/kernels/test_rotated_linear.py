"""x rotated on its way into the CUDA kernels, on the CPU, against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qbench.format.rotation import Rotation
from qbench.kernels import cuda, cuda_rotate, ops, together
from qbench.kernels.blocks import Plan, WidePlan
from qbench.kernels.tiles import to_tiles
from tests.kernels.cases import random_weight, relative_error

LIMITS = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
ROW, WIDE = Plan(1, 1, 1, 2, 1, 1), WidePlan(2, 1, 1, 1, 2)
BATCH = Plan(1, 1, 1, 1, 2, 2, True)


def rotated_weight(generator, columns, block, signed=True, **others):
    rotation = Rotation.seeded(columns, block, 3) if signed else Rotation(block)
    return replace(random_weight((24, columns), 4, 64, generator, **others), rotation=rotation)


def check(generator, weight, batch, dtype, plan):
    tiles = to_tiles(weight)
    assert cuda_rotate.takes(tiles, plan, batch)
    x = torch.randn(batch, weight.shape[1], generator=generator).to(dtype)
    assert relative_error(cuda.linear(x, tiles, None, plan), x, weight) <= LIMITS[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("block", [8, 32, 64, 512, 1024])
def test_every_block(emulated, generator, block):
    weight = rotated_weight(generator, {8: 328, 64: 576}.get(block, max(block, 384)), block)
    check(generator, weight, 1, torch.bfloat16, ROW)
    check(generator, weight, 3, torch.bfloat16, BATCH)
    check(generator, weight, 3, torch.bfloat16, WIDE)
    assert len(emulated) == 5  # nothing but x * t goes first


@pytest.mark.slow
def test_fp16_without_t_and_signs(emulated, generator):
    weight = rotated_weight(generator, 512, 128, signed=False, t=False)
    for batch, plan in ((1, ROW), (3, BATCH), (11, WIDE)):
        check(generator, weight, batch, torch.float16, plan)


@pytest.mark.slow
def test_a_row_whose_splits_are_whole_blocks(emulated, generator):
    weight = rotated_weight(generator, 1024, 256)
    check(generator, weight, 1, torch.bfloat16, Plan(1, 1, 1, 1, 2, 2, True))


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "block", "dtype"), [(576, 64, torch.float16), (2048, 1024, torch.bfloat16)])
def test_by_itself(emulated, generator, columns, block, dtype):
    rotation = Rotation.seeded(columns, block, 1)
    x = torch.randn(3, 2 * columns, generator=generator).to(dtype)[:, :columns]
    y, expected = cuda_rotate.rotate(x, rotation), rotation(x)
    assert y.dtype == dtype
    assert float((y - expected).norm() / expected.norm()) <= LIMITS[dtype] / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "block", "others"),
    [
        (328, 8, {}),
        (352, 32, {"t": False}),
        (576, 64, {"codebook": True}),
        (384, 128, {}),
        (1536, 512, {}),
        (2048, 1024, {}),
    ],
)
def test_undone_in_the_weight(emulated, generator, columns, block, others):
    weight = rotated_weight(generator, columns, block, **others)
    expected = weight.dequantize()
    w = cuda.dequantize(to_tiles(weight), torch.bfloat16).float()
    assert float((w - expected).norm() / expected.norm()) <= 3e-3


@pytest.mark.slow
def test_one_launch_for_weights_with_signs_of_their_own(emulated, generator):
    weights = [rotated_weight(generator, 512, 64), rotated_weight(generator, 512, 64, signed=False)]
    x = torch.randn(1, 512, generator=generator).bfloat16()
    found = together.launch(x, [to_tiles(weight) for weight in weights], ROW)
    assert len(emulated) == 1
    assert all(relative_error(y, x, weight) <= 1e-2 for y, weight in zip(found, weights, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("columns", "block"), [(576, 64), (4096, 1024), (3072, 512), (4096, 2048), (68, 4)])
def test_on_a_gpu(columns, block, dtype):
    weight = rotated_weight(torch.Generator().manual_seed(0), columns, block)
    on_gpu = weight.with_tensors({name: tensor.cuda() for name, tensor in weight.tensors().items()})
    for batch in (1, 3, 16, 70, 1100):
        x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).to("cuda", dtype)
        assert relative_error(ops.linear(x, to_tiles(on_gpu)), x, on_gpu) <= LIMITS[dtype]


def test_what_is_rotated_by_itself(generator):
    tiles = to_tiles(rotated_weight(generator, 1024, 1024))
    assert not cuda_rotate.takes(tiles, Plan(1, 1, 1, 1, 2, 2), 1)  # half a block each
    assert cuda_rotate.takes(tiles, Plan(1, 1, 1, 1, 2, 2), 2)
    permuted = to_tiles(rotated_weight(generator, 1024, 64, permuted=True))
    assert not cuda_rotate.takes(permuted, ROW, 1)
    assert not cuda_rotate.takes(to_tiles(rotated_weight(generator, 2048, 2048)), WIDE, 20)
    assert not cuda_rotate.takes(to_tiles(rotated_weight(generator, 68, 4)), WIDE, 20)
