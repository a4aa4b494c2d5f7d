"""The rotation against the matrix that it stands for, and a rotated weight against the same weight in its own basis."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scipy.linalg
import torch

from qbench.format.rotation import Rotation, hadamard, largest_block
from qbench.format.weight import QuantizedWeight
from qbench.kernels import ops
from qbench.kernels.tiles import to_tiles
from tests.kernels.cases import random_weight


def matrix(rotation, columns):
    """R `[in, in]` in fp64, from its definition."""
    minus = [int(rotation.signs[i // 8]) >> (i % 8) & 1 for i in range(columns)]
    block = torch.tensor(scipy.linalg.hadamard(rotation.block)).double() / rotation.block**0.5
    blocks = torch.block_diag(*[block] * (columns // rotation.block))
    return torch.diag(1 - 2 * torch.tensor(minus).double()) @ blocks


@pytest.mark.parametrize(("columns", "block"), [(8, 8), (96, 32), (40, 2), (33, 1)])
def test_it_is_the_matrix_of_its_definition(columns, block, generator):
    rotation, rows = Rotation.seeded(columns, block, 3), torch.randn(2, 5, columns, generator=generator).double()
    r = matrix(rotation, columns)
    torch.testing.assert_close(r @ r.T, torch.eye(columns).double())
    torch.testing.assert_close(rotation(rows), rows @ r)
    torch.testing.assert_close(rotation.undo(rows), rows @ r.T)
    assert rotation(rows.half()).dtype == torch.float32
    torch.testing.assert_close(hadamard(rows, block), Rotation(block)(rows))


def test_a_row_does_not_depend_on_its_neighbours(generator):
    rotation, rows = Rotation.seeded(96, 32, 0), torch.randn(7, 96, generator=generator)
    assert torch.equal(rotation(rows)[3:4], rotation(rows[3:4]))
    assert torch.equal(rotation(rows.T.contiguous().T), rotation(rows))


def test_signs_are_a_bit_a_channel_and_drawn_by_the_seed():
    first, again, other = (Rotation.seeded(576, 64, seed) for seed in (0, 0, 1))
    assert first.signs.nbytes == 72
    assert torch.equal(first.signs, again.signs)
    assert not torch.equal(first.signs, other.signs)


@pytest.mark.parametrize(("columns", "limit", "block"), [(576, 1024, 64), (1536, 1024, 512), (4096, 1024, 1024)])
def test_the_largest_block(columns, limit, block):
    assert largest_block(columns, limit) == block
    assert largest_block(columns, block // 2) == block // 2
    assert largest_block(columns + 1, limit) == 1


def test_a_rotated_weight_is_given_in_its_own_basis(generator):
    plain = random_weight((12, 64), 4, 16, generator)
    rotated = replace(plain, rotation=Rotation.seeded(64, 32, 0))
    r = matrix(rotated.rotation, 64)
    torch.testing.assert_close(rotated.dequantize().double(), plain.dequantize().double() @ r.T, rtol=1e-5, atol=1e-5)
    assert rotated.nbytes == plain.nbytes + 8
    assert rotated.stored_bytes()["signs"] == 8
    assert "rotation_block" not in plain.describe()
    with pytest.raises(ValueError, match="no rotation in blocks of 48 fits 64 channels"):
        QuantizedWeight.rebuild(rotated.describe() | {"rotation_block": 48}, rotated.tensors())
    with pytest.raises(ValueError, match="rotation_block"):
        QuantizedWeight.stack([rotated, replace(rotated, rotation=replace(rotated.rotation, block=16))])
    with pytest.raises(ValueError, match="share their signs"):
        QuantizedWeight.stack([rotated, replace(rotated, rotation=Rotation.seeded(64, 32, 1))])


def test_a_stack_shares_its_signs(generator):
    rotation = Rotation.seeded(48, 16, 0)
    ones = [replace(random_weight((6, 48), 3, 32, generator), rotation=rotation) for _ in range(3)]
    whole = QuantizedWeight.stack(ones)
    assert whole.stored_bytes()["signs"] == 6
    assert all(torch.equal(whole.select(i).dequantize(), one.dequantize()) for i, one in enumerate(ones))
    x, index = torch.randn(4, 48, generator=generator), torch.tensor([[0, 2], [1, 0], [2, 2], [1, 2]])
    y = ops.linear_experts(x, index, to_tiles(whole))
    for token, experts in enumerate(index.tolist()):
        for slot, expert in enumerate(experts):
            expected = ones[expert].dequantize() @ x[token]
            torch.testing.assert_close(y[token, slot], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("permuted", [False, True])
def test_the_input_is_rotated_before_it_meets_the_layout(permuted, generator):
    weight = replace(random_weight((20, 64), 4, 32, generator, permuted=permuted), rotation=Rotation.seeded(64, 64, 0))
    x = torch.randn(5, 64, generator=generator)
    torch.testing.assert_close(ops.linear(x, to_tiles(weight)), x @ weight.dequantize().T, rtol=1e-4, atol=1e-3)


def test_no_rows_stay_no_rows():
    assert Rotation.seeded(64, 32, 0)(torch.zeros(0, 64)).shape == (0, 64)
