"""HIGGS against transformers' own code on its own grids, and the grids against what they are said to minimize."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch

from qbench.layers.linear import relative_error
from qbench.plugins.higgs import HIGGS, nearest_point, published_grid
from qbench.testing import gaussian


@pytest.fixture
def official(monkeypatch):
    """(weight, bits, p, size) -> codes, scales, grid of transformers' quantize_with_higgs.

    Its two packages for GPUs are replaced: the transform by the matrix of its definition, the last step, which
    interleaves the codes for a kernel, by one that hands them out.
    """
    higgs = pytest.importorskip("transformers.integrations.higgs")

    def transform(x, scale):
        return (x.double() @ torch.tensor(scipy.linalg.hadamard(x.shape[-1])).double() * scale).float()

    def hand_out(codes, scales, grid, **kwargs):
        return codes, scales, grid, grid, kwargs["vector_size"]

    monkeypatch.setattr(higgs, "hadamard_transform", transform, raising=False)
    monkeypatch.setattr(higgs, "prepare_data_transposed", hand_out, raising=False)

    def run(weight, bits, p, size):
        made = higgs.quantize_with_higgs(weight, bits, p, group_size=size, hadamard_size=size)
        return made["weight"], made["scales"], made["tables"]

    return run


@pytest.mark.parametrize("nbits", [2, 3, 4])
@pytest.mark.parametrize(("grid_dim", "group_size", "columns"), [(1, 256, 512), (2, 256, 512), (2, 1024, 2048)])
def test_codes_are_those_of_transformers(nbits, grid_dim, group_size, columns, official):
    weight = gaussian(24, columns) * torch.linspace(0.1, 3, columns)
    made = HIGGS(nbits=nbits, grid_dim=grid_dim, group_size=group_size).quantize_one(weight)
    codes, scales, grid = official(weight, nbits, grid_dim, group_size)
    differ = made.codes() != codes
    assert differ.float().mean() < 1e-3  # ties: their transform adds in another order
    torch.testing.assert_close(made.scale.dense(), scales, rtol=2**-10, atol=0)
    torch.testing.assert_close(made.codebook.float(), grid.squeeze(-1), rtol=2**-10, atol=1e-6)
    h = torch.block_diag(*[torch.tensor(scipy.linalg.hadamard(group_size))] * (columns // group_size)).float()
    restored = grid[codes.long()].reshape(24, columns) * scales.repeat_interleave(group_size, 1) @ h / group_size**0.5
    known = ~differ.any(1)
    assert known.sum() > 20
    torch.testing.assert_close(made.dequantize()[known], restored[known], rtol=0, atol=2e-3 * float(weight.abs().max()))


# Lloyd's optimum for one number, of 2**nbits levels, is in every textbook; a pair of numbers can be had for less.
LLOYD_MAX = {2: 0.1175, 3: 0.03454, 4: 0.009497}


@pytest.mark.parametrize("nbits", [2, 3, 4])
def test_the_grids_are_best_for_a_gaussian(nbits, generator):
    sample = torch.randn(200_000, 2, generator=generator)
    lost = {}
    for p in (1, 2):
        points, vectors = published_grid(p, nbits), sample.reshape(-1, p)
        codes = nearest_point(vectors, points).long()
        lost[p] = float((points[codes] - vectors).square().mean())
        # a step of Lloyd's algorithm, each point to the mean of what is nearest to it, gains next to nothing
        count = torch.bincount(codes, minlength=len(points)).clamp_min(1).unsqueeze(1)
        moved = torch.zeros_like(points).index_add_(0, codes, vectors) / count
        gained = lost[p] - float((moved[codes] - vectors).square().mean())
        assert gained < 0.01 * lost[p]
    assert lost[1] == pytest.approx(LLOYD_MAX[nbits], rel=0.02)
    assert lost[2] < 0.97 * lost[1]


def test_nearest_point_is_the_nearest(generator):
    vectors, points = torch.randn(3, 50, 2, generator=generator), torch.randn(64, 2, generator=generator)
    expected = torch.cdist(vectors.double(), points.double()).argmin(-1)
    assert torch.equal(nearest_point(vectors, points).long(), expected)


@pytest.mark.parametrize("grid_dim", [1, 2])
def test_the_error_on_gaussian_weights_is_that_of_the_grid(grid_dim):
    weight = gaussian(64, 1024)
    error = relative_error(weight, HIGGS(nbits=3, grid_dim=grid_dim).quantize_one(weight))
    points, vectors = published_grid(grid_dim, 3), gaussian(100_000, 2, 5).reshape(-1, grid_dim) / 0.05
    expected = math.sqrt((points[nearest_point(vectors, points).long()] - vectors).square().mean())
    assert float(error) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("nbits", "bits_of_codes"), [(2, 4), (3, 6), (4, 8)])
def test_bytes_of_pairs(nbits, bits_of_codes):
    made = HIGGS(nbits=nbits).quantize_one(gaussian(64, 512))
    parts = made.stored_bytes()
    assert parts == {"codes": 64 * 256 * bits_of_codes // 8, "scale": 2 * 64 * 2, "codebook": 2 * 2 * 2**bits_of_codes}
    assert made.rotation.block == 256


def test_a_row_that_no_block_divides():
    made = HIGGS().quantize_one(gaussian(16, 576))
    assert made.rotation.block == 64
    assert made.scale.stored.shape == (16, 3)  # of 256, 256 and 64 channels
    odd = HIGGS().quantize_one(gaussian(16, 33))
    assert odd.rotation is None
    assert odd.codes().shape == (16, 17)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"nbits": 8}, "nbits must be one of 2, 3, 4, got 8"),
        ({"grid_dim": 3}, "grid_dim must be one of 1, 2, got 3"),
    ],
)
def test_what_has_no_grid_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        HIGGS(**settings)
