"""Standard deviations are those of torch.std, to the bit, whatever the shape, the offset and the scale."""

import pytest
import torch

from qbench.quant.diagnostics import CHUNK_BYTES, chunks, column_tiles, imbalance, mean_imbalance, std


@pytest.mark.parametrize("offset", [0.0, 0.01, 30.0])
@pytest.mark.parametrize("shape", [(1, 576, 64), (2, 33, 7), (3, 2, 1), (1, 1, 1), (48, 100)])
def test_the_numbers_are_those_of_torch(shape, offset, generator):
    values = torch.randn(shape, generator=generator) * torch.logspace(-6, 3, shape[-1]) + offset
    for dim in (-1, -2):
        expected = values.std(dim, correction=1 if values.shape[dim] > 1 else 0)
        assert torch.equal(std(values, dim), expected)
        assert std(values.double(), dim).dtype == torch.float64


def test_what_is_no_number_stays_none():
    values = torch.ones(4, 3)
    values[1, 2] = torch.inf
    assert std(values, -1).isnan().tolist() == [False, True, False, False]


def test_tiles_are_worked_on_in_parts_and_give_the_same(generator):
    weight = torch.randn(1024, 640, generator=generator)
    (tiles,) = column_tiles(weight, 64)
    parts = chunks(tiles)
    assert 1 < len(parts) < len(tiles)
    assert all(part.nbytes <= CHUNK_BYTES for part in parts)
    assert torch.equal(mean_imbalance(weight, 64), imbalance(tiles).log().mean().exp())
