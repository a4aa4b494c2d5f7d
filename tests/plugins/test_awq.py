"""AWQ against a search written out with X W^T, and the clip against loops over every (row, group)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qbench.format.weight import QuantizedWeight
from qbench.plugins.awq import AWQ, relative_magnitude
from qbench.plugins.rtn import RTN
from qbench.quant.channel_scale import OutputError, channel_scale
from qbench.quant.quantizer import InputStatistics
from qbench.quant.rounding import round_to_nearest
from qbench.testing import same, statistics_of

ROWS = (96, 32, 48)


def uneven_inputs(columns: int, tokens: int, seed: int = 0) -> Tensor:
    """Inputs `[tokens, columns]` whose channels differ in size by factors of tens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (1.2 * torch.randn(columns, generator=generator)).exp()
    return torch.randn(tokens, columns, generator=generator) * sizes


def linear_group(columns: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.05 * torch.randn(rows, columns, generator=generator) for rows in ROWS]


def statistics(inputs: Tensor) -> InputStatistics:
    return statistics_of(inputs, AWQ.needs)


def squared_error(inputs: Tensor, weights: list[Tensor], results: list[QuantizedWeight]) -> float:
    pairs = zip(weights, results, strict=True)
    return float(sum((inputs @ (q.dequantize() - w).T).double().square().sum() for w, q in pairs))


def brute_force(weights: list[Tensor], inputs: Tensor, width: int, nbits: int, ratios: int) -> tuple[float, Tensor]:
    """The best ratio and its t `[in]` as AutoAWQ states them, for widths that divide the channels."""
    absmean = inputs.abs().mean(0)
    joined = torch.cat(weights)
    groups = joined.reshape(-1, width).abs()
    magnitude = (groups / (groups.amax(1, keepdim=True) + 1e-6)).view(joined.shape).mean(0)
    errors, scales = [], []
    for i in range(ratios):
        ratio = i / ratios
        s = (absmean.pow(ratio) / (magnitude.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        results = [
            round_to_nearest(weight * s, nbits=nbits, group_size=width).dequantize() / s - weight for weight in weights
        ]
        errors.append(sum(float((inputs @ error.T).square().sum()) for error in results))
        scales.append(1 / s)
    best = min(range(ratios), key=errors.__getitem__)
    return best / ratios, scales[best]


@pytest.mark.parametrize("nbits", [3, 4])
@pytest.mark.parametrize("tokens", [80, 600])  # fewer and more than channels: both ways to the loss
@pytest.mark.parametrize("seed", [0, 1])
def test_ratio_equals_a_brute_force_search(nbits, tokens, seed):
    weights, inputs = linear_group(192, seed), uneven_inputs(192, tokens, seed)
    results = AWQ(nbits=nbits).quantize(weights, statistics(inputs))
    ratio, t = brute_force(weights, inputs, 64, nbits, 20)
    for result in results:
        assert result.diagnostics["ratio"] == ratio
        torch.testing.assert_close(result.input_scale.float(), t, rtol=1e-3, atol=0)
    loss = squared_error(inputs, weights, results) / (tokens * sum(ROWS))
    assert results[0].diagnostics["loss"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("nbits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("aux_dtype", ["fp16", "int8"])
def test_lowers_the_output_error_of_rtn(nbits, symmetric, aux_dtype):
    weights, inputs = linear_group(256), uneven_inputs(256, 512)
    terms = {"nbits": nbits, "symmetric": symmetric, "aux_dtype": aux_dtype}
    ours = AWQ(**terms).quantize(weights, statistics(inputs))
    rtn = RTN(**terms).quantize(weights, None)
    assert squared_error(inputs, weights, ours) < 0.6 * squared_error(inputs, weights, rtn)


def test_one_scale_for_the_whole_group():
    weights, inputs = linear_group(160), uneven_inputs(160, 400)
    results = AWQ().quantize(weights, statistics(inputs))
    assert all(torch.equal(result.input_scale, results[0].input_scale) for result in results)
    assert len({tuple(result.diagnostics.items()) for result in results}) == 1
    assert [list(result.shape) for result in results] == [list(weight.shape) for weight in weights]


def test_gram_matrix_and_outputs_give_the_same_error():
    inputs, error = uneven_inputs(64, 200), linear_group(64)[0]
    direct = (inputs @ error.T).square().mean()
    summed = OutputError(inputs)
    assert summed.gram is not None
    assert summed(error) == pytest.approx(float(direct), rel=1e-5)
    assert OutputError(inputs[:50]).gram is None
    assert OutputError(inputs, "l1")(error) == pytest.approx(float((inputs @ error.T).abs().mean()), rel=1e-6)


def test_dead_channels_and_extreme_sizes_stay_within_fp16():
    inputs = uneven_inputs(128, 300)
    inputs[:, [3, 70]] = 0
    inputs[:, 9] *= 1e4
    inputs[:, 10] *= 1e-9
    weights = linear_group(128)
    weights[0][:, 20] = weights[1][:, 20] = weights[2][:, 20] = 0
    results = AWQ().quantize(weights, statistics(inputs))
    for result in results:
        assert torch.isfinite(result.dequantize()).all()
        assert result.input_scale.min() >= 2**-14
    assert squared_error(inputs, weights, results) < squared_error(inputs, weights, RTN().quantize(weights, None))
    s = channel_scale(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.5, 0.5, 0.0]), 0.5)
    assert torch.isfinite(s).all()
    assert float(s.max() * s.min()) == pytest.approx(1)


def test_ragged_groups_count_by_their_own_largest():
    weight = linear_group(100)[0]
    expected = torch.cat([relative_magnitude(part, part.shape[1]) for part in weight.split(64, 1)])
    torch.testing.assert_close(relative_magnitude(weight, 64), expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [128, 100])
def test_clip_equals_loops(columns, symmetric):
    method = AWQ(nbits=3, symmetric=symmetric, clip=True)
    weight, inputs = linear_group(columns)[1], uneven_inputs(columns, 200)
    t = torch.rand(columns, generator=torch.Generator().manual_seed(3)) + 0.5
    ours = method._clipped(weight, 64, t, inputs) / t
    for row, values in enumerate(weight / t):
        for start in range(0, columns, 64):
            part, x = values[start : start + 64], (inputs * t)[:, start : start + 64]
            tried = []
            for i in range(10):
                bound = float(part.abs().max()) * (1 - i / 20)
                cut = part.clamp(-bound, bound)[None]
                rounded = round_to_nearest(cut, nbits=3, group_size=64, symmetric=symmetric).dequantize()[0]
                tried.append((float((x @ (rounded - part)).square().sum()), cut[0]))
            torch.testing.assert_close(ours[row, start : start + 64], min(tried, key=lambda pair: pair[0])[1])


def test_clip_lowers_the_error_at_few_bits():
    weights, inputs = linear_group(256), uneven_inputs(256, 512)
    plain, clipped = (AWQ(nbits=2, clip=clip).quantize(weights, statistics(inputs)) for clip in (False, True))
    assert squared_error(inputs, weights, clipped) < 0.9 * squared_error(inputs, weights, plain)


def test_is_deterministic():
    weights, inputs = linear_group(128), uneven_inputs(128, 200)
    for method in (AWQ(), AWQ(clip=True)):
        first, second = (method.quantize(weights, statistics(inputs)) for _ in range(2))
        assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_what_cannot_work_is_refused_with_a_sentence():
    weights, stats = linear_group(64), statistics(uneven_inputs(64, 100))
    for lacking in (None, replace(stats, absmean=None), replace(stats, inputs=None)):
        with pytest.raises(ValueError, match="awq needs mean"):
            AWQ().quantize(weights, lacking)
    with pytest.raises(ValueError, match="zero throughout"):
        AWQ().quantize(weights, statistics(torch.zeros(5, 64)))
    with pytest.raises(ValueError, match="NaN or Inf"):
        AWQ().quantize(weights, replace(stats, inputs=stats.inputs * torch.inf))
    with pytest.raises(ValueError, match=r"\[64\] input channels"):
        AWQ().quantize(weights, statistics(uneven_inputs(32, 100)))
    with pytest.raises(ValueError, match="ratios"):
        AWQ(ratios=0)
