"""The rotation's kernel in Triton's interpreter against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreted import kernels  # noqa: F401  first: it sets Triton up

from qbench.format.rotation import Rotation  # isort: skip
from qbench.kernels import hadamard
from qbench.quant.rotating import rotated
from qbench.testing import gaussian


@pytest.mark.parametrize(("columns", "block"), [(64, 64), (48, 16), (6, 2), (5, 1)])
@pytest.mark.parametrize("signed", [True, False])
def test_the_same_sums_in_the_same_order(columns, block, signed, generator):
    rotation = Rotation.seeded(columns, block, 0) if signed else Rotation(block)
    x = torch.randn(2, 3, columns, generator=generator)
    assert torch.equal(hadamard.rotate(x, rotation), rotation(x))
    strided = torch.randn(columns, 4, generator=generator).T
    assert torch.equal(hadamard.rotate(strided, rotation), rotation(strided))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_rotated_to_the_same_bits(kernels, dtype):  # noqa: F811
    weight = gaussian(6, 48).to(dtype)
    plain, fast = kernels(lambda: rotated(weight, Rotation.seeded(48, 16, 0)))
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype, generator):
    rotation, x = Rotation.seeded(96, 32, 0), torch.randn(3, 96, generator=generator).to(dtype)
    y = hadamard.rotate(x, rotation)
    assert y.dtype == dtype
    # the interpreter cuts bf16 off where a GPU rounds it
    torch.testing.assert_close(y.float(), rotation(x), rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=0)
