"""The fused Sinkhorn rounds reach the same column factors as plain torch."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.interpreted import kernels  # noqa: F401  first: it sets Triton up

from qbench.kernels import sinkhorn  # isort: skip
from qbench.plugins.sinq import SINQ
from qbench.quant.sinkhorn import LOG_RANGE, column_factors

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about lanes that are masked


def uneven(generator, rows: int, columns: int):
    """Rows and columns of very different size: the search takes many rounds and has no ties."""
    sizes = [(0.7 * torch.randn(n, generator=generator)).exp() for n in (rows, columns)]
    return torch.randn(rows, columns, generator=generator) * 0.05 * sizes[0][:, None] * sizes[1]


@pytest.mark.parametrize(
    ("shapes", "width", "iterations"),
    [([(96, 128), (65, 128)], 64, 16), ([(200, 100)], 48, 16), ([(200, 100)], 48, 1), ([(64, 40)], 32, 2)],
)
def test_factors(kernels, generator, shapes, width, iterations):  # noqa: F811
    weights = [uneven(generator, *shape) for shape in shapes]
    plain, fast = kernels(lambda: column_factors(weights, width, iterations, 0.7, 2.0))
    for (expected, left), (t, reached) in zip(plain, fast, strict=True):
        torch.testing.assert_close(t, expected, rtol=1e-5, atol=0)
        assert float(reached) == pytest.approx(float(left), rel=1e-5)


def test_no_factor_depends_on_the_other_weights_of_the_group(generator):
    weights = [uneven(generator, rows, 64).bfloat16() for rows in (48, 33)]
    settings = (64, 16, 0.7, 2.0, LOG_RANGE)
    together = sinkhorn.column_factors(weights, *settings)
    for weight, (t, left) in zip(weights, together, strict=True):
        [(alone, alone_left)] = sinkhorn.column_factors([weight], *settings)
        assert torch.equal(t, alone)
        assert left == alone_left


@pytest.mark.slow
def test_no_factor_depends_on_the_other_matrices_of_a_stack(generator):
    stacks = [torch.stack([uneven(generator, rows, 96).bfloat16() for _ in range(3)]) for rows in (600, 64)]
    settings = (64, 16, 0.7, 2.0, LOG_RANGE)
    for stack, (t, left) in zip(stacks, sinkhorn.column_factors(stacks, *settings), strict=True):
        for matrix, of_one, left_of_one in zip(stack, t, left, strict=True):
            [(alone, alone_left)] = sinkhorn.column_factors([matrix], *settings)
            assert torch.equal(of_one, alone)
            assert left_of_one == alone_left


def test_strided_weights(generator):
    weight = uneven(generator, 32, 32)
    settings = (16, 3, 0.7, 2.0, LOG_RANGE)
    [(expected, _)], [(t, _)] = (sinkhorn.column_factors([w], *settings) for w in (weight.T.contiguous(), weight.T))
    assert torch.equal(t, expected)


@pytest.mark.parametrize("spoil", ["row", "column"])
def test_what_lies_far_from_zero_is_left_to_the_reference(kernels, generator, spoil):  # noqa: F811
    weight = uneven(generator, 64, 64)
    weight[(5, ...) if spoil == "row" else (..., 5)] = 0.7
    assert math.isnan(sinkhorn.column_factors([weight], 64, 16, 0.7, 2.0, LOG_RANGE)[0][1])
    plain, fast = kernels(lambda: column_factors([weight], 64, 16, 0.7, 2.0))
    assert torch.equal(plain[0][0], fast[0][0])
    assert plain[0][1] == fast[0][1]


def test_zeros(kernels, generator):  # noqa: F811
    rows = uneven(generator, 64, 64)
    rows[:8] = 0
    for weight in (rows, torch.zeros(64, 64)):
        plain, fast = kernels(lambda w=weight: SINQ().quantize_one(w))
        assert torch.equal(plain.codes(), fast.codes())
        assert torch.equal(plain.input_scale, fast.input_scale)


def test_shares_of_a_tile_cover_its_rows_once(monkeypatch):
    monkeypatch.setattr(sinkhorn, "_parts_per_program", lambda heights, tiles, device: 2)
    sinkhorn._plan.cache_clear()
    plan = sinkhorn._plan(((2, 1600), (1, 64)), 128, 64, torch.device("cpu"))
    sinkhorn._plan.cache_clear()
    assert (plan.splits, plan.parts, plan.slots) == (2, 4, 2 * (4 + 4 + 1))
    rows, slots = {}, set()
    for matrix, tile, group, height, share, first, last, slot, parts, splits, before in plan.entries.tolist():
        assert before == (3200 * matrix + height * group)
        assert share % 64 == 0
        assert (parts, splits) == (-(-height // share), -(-parts // 2))
        taken = range(first * share, min(last * share, height))
        rows.setdefault(tile, []).extend(taken)
        assert not slots & set(range(slot + first, slot + last))
        slots.update(range(slot + first, slot + last))
    assert slots == set(range(plan.slots))
    assert [sorted(taken) == list(range(len(taken))) for taken in rows.values()] == [True] * 6
    assert [len(taken) for taken in rows.values()] == [1600, 1600, 1600, 1600, 64, 64]
