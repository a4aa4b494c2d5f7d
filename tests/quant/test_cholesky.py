"""Factors of a batch of Hessians, by blocks: those of each alone."""

import pytest
import torch

from qbench.quant import cholesky
from qbench.quant.cholesky import unit_factor, unit_factors
from qbench.testing import correlated_inputs


def hessians(count: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = correlated_inputs(columns, 4 * columns) * (1 + torch.rand(count, 1, columns, generator=generator))
    made = (inputs.mT @ inputs).double()
    return made / made.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]


@pytest.mark.parametrize(("count", "columns"), [(1, 40), (3, 40), (3, 37), (2, 8)])
def test_a_factor_is_the_inverse_of_gptqs_own(count, columns, monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 8)
    monkeypatch.setattr(cholesky, "WIDE", 16)
    given = hessians(count, columns)
    units, damping = unit_factors(given.flip(1, 2), 0.01)
    inverses, _ = unit_factors(given.flip(1, 2), 0.01, inverse=True)
    assert damping == [0.01] * count
    for hessian, unit, inverse in zip(given, units.triu(), inverses, strict=True):
        own, _ = unit_factor(hessian, 0.01)
        torch.testing.assert_close(unit @ own.double(), torch.eye(columns).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(inverse, own.double(), rtol=0, atol=1e-6)


def test_each_matrix_is_damped_until_it_can_be_factored(monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 2)
    sound, negative = torch.eye(4).double(), torch.eye(4).double()
    negative[0, 1] = negative[1, 0] = 1.05
    units, damping = unit_factors(torch.stack([sound, negative.flip(0, 1)]), 0.01)
    assert damping == [0.01, pytest.approx(0.1)]
    expected, _ = unit_factor(negative, 0.1)
    torch.testing.assert_close(units[1].triu() @ expected.double(), sound, rtol=0, atol=1e-6)
    negative[0, 1] = negative[1, 0] = 1e3
    with pytest.raises(ValueError, match="not even damped by 10 of"):
        unit_factors(torch.stack([sound, negative]), 0.01)
