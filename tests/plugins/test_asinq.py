"""A-SINQ against a search written out with X W^T, and against the SINQ it corrects."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qbench.format.weight import QuantizedWeight
from qbench.plugins.asinq import ASINQ
from qbench.plugins.sinq import SINQ, sinkhorn
from qbench.quant.rounding import round_to_nearest
from qbench.testing import gaussian, same, statistics_of


def uneven_inputs(columns: int, tokens: int, seed: int = 0) -> Tensor:
    """Inputs `[tokens, columns]` whose channels differ in size by factors of tens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (1.2 * torch.randn(columns, generator=generator)).exp()
    return torch.randn(tokens, columns, generator=generator) * sizes


def uneven_weight(rows: int, columns: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(rows, columns, generator=generator) * torch.rand(columns, generator=generator).add(0.3)


def statistics(inputs: Tensor):
    return statistics_of(inputs, ASINQ.needs)


def output_error(inputs: Tensor, weight: Tensor, result: QuantizedWeight, loss: str) -> float:
    output = inputs @ (result.dequantize() - weight).T
    return float(output.abs().mean() if loss == "l1" else output.square().mean())


def brute_force(weight: Tensor, inputs: Tensor, nbits: int, loss: str) -> tuple[float, Tensor, float]:
    """The best ratio, its t `[in]` and its error, in the order of the authors' code: W / mu * s, then mu / s."""
    mu = torch.cat([sinkhorn(tile[None], 16, 0.7, 2.0)[0][0] for tile in weight.split(64, 1)])
    absmean, magnitude = inputs.abs().mean(0), weight.abs().mean(0)
    tried = []
    for i in range(20):
        s = absmean.pow(i / 20).clamp(min=1e-4)
        s = (s / (magnitude.pow(1 - i / 20) + 1e-4)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        rounded = round_to_nearest(weight / mu * s, nbits=nbits, group_size=64).dequantize() * mu / s
        output = inputs @ rounded.T - inputs @ weight.T
        tried.append((float(output.abs().mean() if loss == "l1" else output.square().mean()), i / 20, mu / s))
    error, ratio, t = min(tried, key=lambda row: row[0])
    return ratio, t, error


@torch.no_grad()
def test_without_the_weights_part_the_first_candidate_is_sinq():
    weight, inputs = uneven_weight(96, 192), uneven_inputs(192, 256)
    [plain] = SINQ().quantize([weight], None)
    [first] = ASINQ(weight_part=False, ratios=1).quantize([weight], statistics(inputs))
    [best] = ASINQ(weight_part=False).quantize([weight], statistics(inputs))
    torch.testing.assert_close(first.input_scale, plain.input_scale, rtol=1e-3, atol=0)
    assert output_error(inputs, weight, best, "l1") <= output_error(inputs, weight, first, "l1")
    [with_part] = ASINQ(ratios=1).quantize([weight], statistics(inputs))
    assert not torch.allclose(with_part.input_scale, plain.input_scale, rtol=1e-2)


@pytest.mark.parametrize("nbits", [3, 4])
@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("tokens", [80, 600])  # fewer and more than channels: both ways to the square
def test_ratio_equals_a_brute_force_search(nbits, loss, tokens):
    weight, inputs = uneven_weight(96, 192), uneven_inputs(192, tokens)
    [result] = ASINQ(nbits=nbits, loss=loss).quantize([weight], statistics(inputs))
    ratio, t, error = brute_force(weight, inputs, nbits, loss)
    assert result.method == "asinq"
    assert result.diagnostics["ratio"] == ratio
    assert result.diagnostics["loss"] == pytest.approx(error, rel=2e-3)
    torch.testing.assert_close(result.input_scale.float(), t, rtol=1e-3, atol=0)


@pytest.mark.parametrize("nbits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("aux_dtype", ["fp16", "int8"])
def test_lowers_the_output_error_of_sinq(nbits, symmetric, aux_dtype):
    weight, inputs = gaussian(128, 256), uneven_inputs(256, 512)
    terms = {"nbits": nbits, "symmetric": symmetric, "aux_dtype": aux_dtype}
    [sinq] = SINQ(**terms).quantize([weight], None)
    for loss in ("l1", "l2"):
        [ours] = ASINQ(loss=loss, **terms).quantize([weight], statistics(inputs))
        assert output_error(inputs, weight, ours, loss) < 0.8 * output_error(inputs, weight, sinq, loss)
        assert ours.nbytes == sinq.nbytes


def test_every_linear_of_a_group_has_its_own_ratio_and_scale():
    weights = [uneven_weight(rows, 128, rows) for rows in (96, 32, 32)]
    stats = statistics(uneven_inputs(128, 300))
    together = ASINQ().quantize(weights, stats)
    for weight, result in zip(weights, together, strict=True):
        assert same(result, ASINQ().quantize([weight], stats)[0])
    assert not torch.equal(together[0].input_scale, together[1].input_scale)


def test_imbalance_is_that_of_sinq():
    weight = uneven_weight(96, 160)
    [ours] = ASINQ().quantize([weight], statistics(uneven_inputs(160, 300)))
    assert ours.diagnostics["imbalance_after"] == SINQ().quantize_one(weight).diagnostics["imbalance_after"]


def test_dead_channels_and_extreme_sizes_stay_within_fp16():
    inputs, weight = uneven_inputs(128, 300), uneven_weight(64, 128)
    inputs[:, [3, 70]] = 0
    inputs[:, 9] *= 1e4
    inputs[:, 10] *= 1e-9
    weight[:, 20] = 0
    weight[:, 30] *= 1e4
    [result] = ASINQ().quantize([weight], statistics(inputs))
    assert torch.isfinite(result.dequantize()).all()
    assert torch.isfinite(result.input_scale).all()
    assert result.input_scale.min() >= 2**-14
    assert output_error(inputs, weight, result, "l1") < float((inputs @ weight.T).abs().mean())


def test_is_deterministic():
    weight, inputs = uneven_weight(96, 128), uneven_inputs(128, 200)
    first, second = (ASINQ().quantize([weight], statistics(inputs))[0] for _ in range(2))
    assert same(first, second)


def test_what_cannot_work_is_refused_with_a_sentence():
    weight, stats = uneven_weight(32, 64), statistics(uneven_inputs(64, 100))
    for lacking in (None, replace(stats, absmean=None), replace(stats, inputs=None)):
        with pytest.raises(ValueError, match="asinq needs mean"):
            ASINQ().quantize([weight], lacking)
    with pytest.raises(ValueError, match="zero throughout"):
        ASINQ().quantize([weight], statistics(torch.zeros(5, 64)))
    for wrong, message in (({"loss": "l3"}, "l1, l2"), ({"ratios": 0}, "ratios"), ({"step_min": 1.5}, "step_min")):
        with pytest.raises(ValueError, match=message):
            ASINQ(**wrong)
