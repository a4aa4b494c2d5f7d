"""SINQ against a reference written as the paper states it: one tile, plain loops, fp64."""

import pytest
import torch

from qbench.plugins.rtn import RTN
from qbench.plugins.sinq import SINQ, sinkhorn
from qbench.quant.diagnostics import imbalance, kurtosis, mean_imbalance
from qbench.quant.rounding import round_to_nearest


def reference_sinkhorn(tile, rounds=16):
    """(t, r, I) of one `[rows, columns]` tile in fp64."""
    w = tile.double()

    def clipped(values):
        return values.clamp(1e-3, 1e3)

    tau = min(clipped(w.std(1)).min(), clipped(w.std(0)).min()) + 1e-6
    u, v = torch.zeros(w.shape[0]).double(), torch.zeros(w.shape[1]).double()
    best, kept, stopped = imbalance(w), (v, u), False
    for _ in range(rounds):
        c = w / v.exp() / u.exp()[:, None]
        score = imbalance(c)
        if score <= best:
            best, kept = score, (v, u)
        if score > best:
            stopped = True
        if not stopped:
            v = (v + (clipped(c.std(0)) / tau).clamp(0.7, 2.0).log()).clamp(-0.3, 10)
            u = (u + (clipped(c.std(1)) / tau).clamp(0.7, 2.0).log()).clamp(-0.3, 10)
    return kept[0].exp(), kept[1].exp(), best


def uneven(generator, rows=96, columns=64):
    columns_factor = torch.exp(0.7 * torch.randn(columns, generator=generator))
    rows_factor = torch.exp(0.4 * torch.randn(rows, 1, generator=generator))
    return 0.02 * torch.randn(rows, columns, generator=generator) * columns_factor * rows_factor


def test_sinkhorn_equals_the_reference(generator):
    tiles = torch.stack([uneven(generator) for _ in range(5)])
    t, reached = sinkhorn(tiles, 16, 0.7, 2.0)
    for i, tile in enumerate(tiles):
        expected, _, best = reference_sinkhorn(tile)
        torch.testing.assert_close(t[i].double(), expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(reached[i].double(), best, rtol=1e-4, atol=0)


def test_imbalance_falls_and_never_rises(generator):
    tiles = torch.stack([uneven(generator) for _ in range(4)] + [torch.randn(96, 64, generator=generator)])
    _, reached = sinkhorn(tiles, 16, 0.7, 2.0)
    assert (reached <= imbalance(tiles)).all()
    assert (reached[:4] < 0.4 * imbalance(tiles[:4])).all()


@pytest.mark.parametrize("nbits", [2, 3, 4])
def test_the_row_factor_is_redundant(nbits, generator):
    """RTN(W / t / r) * r * t = RTN(W / t) * t: what lets the format store t alone."""
    tile = uneven(generator)
    t, r, _ = (x.float() for x in reference_sinkhorn(tile))
    rows_too = round_to_nearest(tile / r[:, None], nbits=nbits, group_size=64, input_scale=t)
    t_only = round_to_nearest(tile, nbits=nbits, group_size=64, input_scale=t)
    same = (rows_too.codes() == t_only.codes()).float().mean()
    assert same > 0.999  # what is left are rounding ties
    torch.testing.assert_close(rows_too.dequantize() * r[:, None], t_only.dequantize(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("nbits", [2, 3, 4])
def test_beats_rtn_on_uneven_columns(nbits, generator):
    weight = torch.cat([uneven(generator) for _ in range(4)], 1)
    error = [(q.quantize_one(weight).dequantize() - weight).norm() for q in (SINQ(nbits=nbits), RTN(nbits=nbits))]
    assert error[0] < 0.9 * error[1]


def test_ragged_last_group_is_a_tile_of_its_own(generator):
    weight = torch.cat([uneven(generator), uneven(generator, columns=24)], 1)
    t, _ = SINQ().input_scale(weight, 64)
    assert torch.equal(t[:64], SINQ().input_scale(weight[:, :64], 64)[0])
    assert torch.equal(t[64:], SINQ().input_scale(weight[:, 64:], 24)[0])


def test_statistics_are_fp32_whatever_the_dtype(generator):
    weight = uneven(generator).bfloat16()
    assert torch.equal(SINQ().input_scale(weight, 64)[0], SINQ().input_scale(weight.float(), 64)[0])


def test_chunking_on_a_cpu_changes_nothing(generator, monkeypatch):
    weight = torch.cat([uneven(generator) for _ in range(6)], 1)
    whole = SINQ().input_scale(weight, 64)[0]
    monkeypatch.setattr("qbench.quant.sinkhorn.CHUNK_BYTES", 1)
    torch.testing.assert_close(SINQ().input_scale(weight, 64)[0], whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("degenerate", ["zero row", "constant row", "zero column", "all zero", "one row", "one column"])
def test_degenerate_weights(degenerate, generator):
    weight = uneven(generator)
    if degenerate == "zero row":
        weight[3] = 0
    elif degenerate == "constant row":
        weight[3] = 0.7
    elif degenerate == "zero column":
        weight[:, 5] = 0
    elif degenerate == "all zero":
        weight.zero_()
    elif degenerate == "one row":
        weight = weight[:1]
    else:
        weight = weight[:, :1]
    restored = SINQ().quantize_one(weight).dequantize()
    assert torch.isfinite(restored).all()
    assert (restored - weight).norm() <= 0.25 * weight.norm() + 1e-6


def test_constants_are_configurable_and_checked(generator):
    weight = uneven(generator)
    assert not torch.equal(SINQ(iterations=2).input_scale(weight, 64)[0], SINQ().input_scale(weight, 64)[0])
    assert torch.equal(SINQ(iterations=1).input_scale(weight, 64)[0], torch.ones(64))  # the start is scored first
    with pytest.raises(ValueError, match="iterations"):
        SINQ(iterations=0)
    with pytest.raises(ValueError, match="step_min"):
        SINQ(step_min=1.5)


def test_diagnostics(generator):
    weight = uneven(generator)
    quantized = SINQ().quantize_one(weight)
    assert 1 <= quantized.diagnostics["imbalance_after"] < mean_imbalance(weight, 64)
    assert abs(kurtosis(torch.randn(400, 400, generator=generator)) - 3) < 0.1
    assert kurtosis(torch.ones(4, 4)) == 0
