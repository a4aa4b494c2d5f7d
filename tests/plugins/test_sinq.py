"""SINQ against a reference written as the paper states it: one tile, plain loops, fp64."""

import pytest
import torch

from qbench.errors import RequestError
from qbench.layers.linear import relative_error
from qbench.plugins.hqq import HQQ
from qbench.plugins.nf4 import NF4
from qbench.plugins.rtn import RTN
from qbench.plugins.sinq import SINQ, sinkhorn
from qbench.quant.codebook import NF4_LEVELS
from qbench.quant.diagnostics import imbalance, kurtosis, mean_imbalance
from qbench.quant.rounding import round_to_nearest
from qbench.registry import make_quantizer


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
    monkeypatch.setattr("qbench.quant.diagnostics.CHUNK_BYTES", 1)
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


def test_nf4_equals_a_search_over_the_levels(generator):
    weight = torch.cat([uneven(generator) for _ in range(3)] + [uneven(generator, columns=24)], 1)
    made = SINQ(codebook="nf4").quantize_one(weight)
    t, after = SINQ().input_scale(weight, 64)
    for group, columns in enumerate(torch.arange(weight.shape[1]).split(64)):
        balanced = (weight[:, columns] / t[columns]).double()
        absmax = balanced.abs().amax(1, keepdim=True)
        expected = (balanced[:, :, None] / absmax[:, :, None] - torch.tensor(NF4_LEVELS)).abs().argmin(2)
        assert torch.equal(made.codes()[:, columns].long(), expected)
        assert torch.equal(made.scale.stored[:, group], absmax[:, 0].float().half())
        restored = torch.tensor(NF4_LEVELS)[expected] * absmax.half().float() * t[columns].half().float()
        torch.testing.assert_close(made.dequantize()[:, columns], restored.float(), rtol=1e-6, atol=0)
    assert (made.method, made.zero) == ("sinq-nf4", None)
    assert made.diagnostics["imbalance_after"] == after


@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize("aux_dtype", ["fp16", "int8"])
def test_hqq_inside_is_hqq_on_the_balanced_weight(nbits, aux_dtype, generator):
    weight = torch.cat([uneven(generator) for _ in range(3)] + [uneven(generator, columns=24)], 1)
    made = SINQ(inner="hqq", nbits=nbits, aux_dtype=aux_dtype).quantize_one(weight)
    t, after = SINQ().input_scale(weight, 64)
    alone = HQQ(nbits=nbits, aux_dtype=aux_dtype).quantize_one(weight / t)
    assert made.tensors().keys() == alone.tensors().keys() | {"input_scale"}
    assert all(torch.equal(made.tensors()[name], tensor) for name, tensor in alone.tensors().items())
    assert torch.equal(made.input_scale, t.half())
    assert made.method == "sinq-hqq"
    assert made.diagnostics == {"imbalance_after": after, **alone.diagnostics}


def test_balancing_helps_nf4_and_hqq_where_columns_stick_out(generator):
    weight = 0.02 * torch.randn(128, 512, generator=generator)
    weight[:, ::37] *= 8
    balanced, alone = SINQ(codebook="nf4").quantize_one(weight), NF4().quantize_one(weight)
    assert relative_error(weight, balanced) < relative_error(weight, alone)
    usual = torch.arange(512) % 37 != 0  # an outlier column stretched the grid of the others

    def error(quantized):
        return float((quantized.dequantize() - weight)[:, usual].norm() / weight[:, usual].norm())

    assert error(balanced) < 0.6 * error(alone)
    for nbits in (3, 4):
        made = SINQ(inner="hqq", nbits=nbits).quantize_one(weight)
        assert error(made) < 0.6 * error(HQQ(nbits=nbits).quantize_one(weight))


def test_nf4_stores_no_zero_points(generator):
    weight = uneven(generator, 256, 1024)
    made, uniform = (SINQ(codebook=codebook).quantize_one(weight) for codebook in ("nf4", None))
    assert 8 * (uniform.nbytes - made.nbytes) == 16 * weight.numel() / 64 - 16 * 32  # what the levels take back


REFUSED = [
    ({"codebook": "nf4", "nbits": 3}, "codebook=nf4 has 16 levels and needs nbits=4, got nbits=3"),
    ({"codebook": "nf4", "inner": "hqq"}, "codebook=nf4 has no zero point for inner=hqq to search"),
    ({"codebook": "nf4", "symmetric": True}, "symmetric=true is a uniform grid without zero points"),
    ({"inner": "hqq", "symmetric": True}, "it cannot be had with inner=hqq"),
    ({"codebook": "nf3"}, "codebook must be null or nf4, got 'nf3'"),
    ({"inner": "gptq"}, "inner must be one of rtn, hqq, got 'gptq'"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_combinations_that_mean_nothing_are_refused(settings, sentence):
    with pytest.raises(RequestError, match=sentence) as refusal:
        make_quantizer({"name": "sinq", **settings})
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_rows_name_the_variant(qbench):
    from qbench.record.store import Store

    for arguments, method in ((["quantizer.codebook=nf4"], "sinq-nf4"), (["quantizer.inner=hqq"], "sinq-hqq")):
        outcome = qbench("model=tiny-dense", "task.max_windows=1", *arguments)
        assert outcome.status == 0, outcome.stderr
        result = Store("outputs").load(outcome.summary["run_id"])
        assert {row.method for row in result.quantization.layers} == {method}
    outcome = qbench("model=tiny-dense", "quantizer.codebook=nf4", "quantizer.nbits=3")
    assert outcome.status == 2
    assert outcome.stderr.startswith("qbench: quantizer=sinq: codebook=nf4 has 16 levels")
