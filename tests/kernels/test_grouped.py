"""The pairs of a mixture sorted and multiplied with whole stacks: the ops on a CPU."""

from __future__ import annotations

import pytest
import torch

from qbench.kernels import grouped
from qbench.kernels import routes as routing
from qbench.kernels.routes import Routes, route
from qbench.kernels.tiles import to_tiles
from tests.kernels.cases import FORMATS, random_weight

EXPERTS = 6
CASES = [(1, 1, 16), (7, 3, 16), (40, 2, 16), (40, 2, 32)]  # tokens, experts a token, rows of a slot


def some_index(generator, tokens, per_token, elsewhere=True):
    """`[tokens, per_token]`; expert 1 gets none, and where asked for some live elsewhere."""
    drawn = torch.rand(tokens, EXPERTS + 1, generator=generator).argsort(-1)[:, :per_token]
    drawn[drawn == 1] = 2
    return drawn if elsewhere else drawn.clamp_max(EXPERTS - 1)


@pytest.mark.parametrize(("tokens", "per_token", "rows"), CASES)
def test_routes(generator, tokens, per_token, rows):
    index = some_index(generator, tokens, per_token)
    made, flat = route(index, EXPERTS, rows), index.flatten()
    here = int((flat < EXPERTS).sum())
    assert made.starts.tolist() == [int((flat < e).sum()) for e in range(EXPERTS + 1)]
    order = torch.argsort(flat, stable=True)
    assert torch.equal(made.place[order].long(), torch.arange(len(flat)))
    assert torch.equal(made.token.long(), order // per_token)
    assert torch.equal(made.expert.long(), flat[order].clamp_max(EXPERTS - 1))
    covered = []
    for slot, (expert, first, held) in enumerate(made.slots.tolist()):
        assert 0 <= held <= rows
        assert (made.expert[first : first + held] == expert).all()
        assert made.row[first : first + held].tolist() == list(range(slot * rows, slot * rows + held))
        covered += range(first, first + held)
    assert sorted(covered) == list(range(here))
    assert (made.row[here:] == -1).all()


def test_slots_hold_what_most_experts_are_sent():
    assert [routing.slot_rows(8 * tokens, 128) for tokens in (16, 128, 512, 2048, 8192)] == [16, 16, 64, 192, 192]


def expected_sum(dense, x, index, scores):
    """In fp64; experts that live elsewhere add nothing."""
    here = index < EXPERTS
    each = torch.einsum("tkoi,ti->tko", dense.double()[index.clamp_max(EXPERTS - 1)], x.double())
    return (each * (scores * here).double().unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("nbits", "codebook"), FORMATS)
def test_stacks_on_the_cpu(generator, nbits, codebook, permuted):
    weight = random_weight((EXPERTS, 24, 200), nbits, 64, generator, codebook=codebook, permuted=permuted)
    x, index = torch.randn(9, 200, generator=generator), some_index(generator, 9, 3)
    scores, made = torch.rand(9, 3, generator=generator), route(index, EXPERTS)
    expected = expected_sum(weight.dequantize(), x, index, scores)
    for y in (grouped.dual_linear(x, to_tiles(weight), made, True), grouped.multiply(x, weight, made, True)):
        assert (grouped.combine(y, index, scores, EXPERTS, made).double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("limits", [(2**20, 2**8), (1, 2**30)], ids=["dequantized in parts", "multiplied in parts"])
def test_stacks_that_do_not_fit(generator, monkeypatch, limits):
    weight = random_weight((EXPERTS, 24, 64), 4, 64, generator)
    x, made = torch.randn(9, 64, generator=generator), route(some_index(generator, 9, 3), EXPERTS)
    whole = grouped.multiply(x, weight, made, True)
    monkeypatch.setattr(grouped, "DENSE_BYTES", limits[0])
    monkeypatch.setattr(grouped, "TRANSIENT_NUMBERS", limits[1])
    assert torch.equal(grouped.multiply(x, weight, made, True), whole)
    assert torch.equal(grouped.multiply(x[made.token.long()], weight, made, False), whole)


def test_few_pairs_dequantize_their_own_matrices(generator, monkeypatch):
    weight = random_weight((EXPERTS, 24, 64), 4, 64, generator)
    index, x = torch.tensor([[5, 2, 6]]), torch.randn(1, 64, generator=generator)
    made, dense, shapes = route(index, EXPERTS), weight.dequantize(), []
    before = type(weight).dequantize
    monkeypatch.setattr(type(weight), "dequantize", lambda self, *a: shapes.append(self.shape) or before(self, *a))
    for largest in (2**27, 1):
        monkeypatch.setattr(grouped, "TRANSIENT_NUMBERS", largest)
        y = grouped.multiply(x, weight, made, True)
        torch.testing.assert_close(y[:2], torch.stack([dense[2] @ x[0], dense[5] @ x[0]]))
    assert shapes == [(3, 24, 64), *[(1, 24, 64)] * 3]


def test_opcheck(generator):
    tiles = to_tiles(random_weight((EXPERTS, 24, 200), 3, 64, generator, permuted=True))
    index, x = some_index(generator, 5, 2), torch.randn(5, 200, generator=generator)
    made, tests = route(index, EXPERTS), ("test_schema", "test_faketensor")
    torch.library.opcheck(routing.routes, (index, EXPERTS, 16), test_utils=tests)
    torch.library.opcheck(grouped.dual_linear_grouped, (x, True, made.flat(), 16, *tiles.flat()), test_utils=tests)
    stack, sorted_x = torch.randn(EXPERTS, 24, 200, generator=generator), x[made.token.long()]
    torch.library.opcheck(grouped.grouped_mm, (sorted_x, stack, made.flat(), 16), test_utils=tests)
    y = torch.zeros(10, 24)
    torch.library.opcheck(grouped.grouped_mm_part, (y, sorted_x, stack[2:], 2, made.flat(), 16), test_utils=tests)
    torch.library.opcheck(grouped.combined, (y, index, torch.rand(5, 2), EXPERTS, made.place), test_utils=tests)


def test_routes_pass_through_the_ops():
    made = route(torch.tensor([[0, 1]]), 2)
    again = Routes.over(made.flat(), made.rows)
    assert all(torch.equal(a, b) for a, b in zip(made.flat(), again.flat(), strict=True))
    assert again.experts == 2
