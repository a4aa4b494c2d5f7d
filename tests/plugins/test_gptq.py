"""GPTQ against the textbook loop in fp64, RTN where both must agree, and the error it minimizes."""

from __future__ import annotations

from dataclasses import asdict
from importlib.resources import files

import pytest
import torch
import yaml
from torch import Tensor

from qbench.format.weight import QuantizedWeight
from qbench.plugins.gptq import GPTQ, blocks, unit_factor
from qbench.plugins.rtn import RTN
from qbench.quant.quantizer import InputStatistics, Statistic

PLAIN = {"act_order": False, "static_groups": False}  # as first published; the defaults differ


def correlated(columns: int, tokens: int = 1024, spread: float = 1.0, seed: int = 0) -> Tensor:
    """Inputs `[tokens, columns]` with correlated channels whose energies are log-normal of width `spread`."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=generator)
    inputs = torch.randn(tokens, columns // 4, generator=generator) @ mixing / (columns // 4) ** 0.5
    inputs += 0.3 * torch.randn(tokens, columns, generator=generator)
    return inputs * (spread * torch.randn(columns, generator=generator)).exp()


def gaussian(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def statistics(inputs: Tensor) -> InputStatistics:
    return InputStatistics(len(inputs), hessian=inputs.T @ inputs)


def output_error(inputs: Tensor, weight: Tensor, quantized: QuantizedWeight | Tensor) -> float:
    dense = quantized if isinstance(quantized, Tensor) else quantized.dequantize()
    return float(torch.linalg.vector_norm(inputs.double() @ (weight.double() - dense.double()).T))


def textbook(weight: Tensor, hessian: Tensor, nbits: int, width: int, damping: float) -> tuple[Tensor, Tensor]:
    """OBQ in the order 0 .. in-1, fp64: after each column, H^-1 loses it by one step of Gaussian elimination.

    Returns codes and values `[out, in]`.
    """
    weight, hessian = weight.double().clone(), hessian.double()
    columns = weight.shape[1]
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(columns).double())
    codes, values = torch.empty_like(weight), torch.empty_like(weight)
    for j in range(columns):
        if j % width == 0:
            group = weight[:, j : j + width]
            scale = (group.amax(1) - group.amin(1)) / (2**nbits - 1)
            zero = -(group.amin(1) / scale).round()
        codes[:, j] = (weight[:, j] / scale + zero).round().clamp(0, 2**nbits - 1)
        values[:, j] = (codes[:, j] - zero) * scale.half().double()
        error = (weight[:, j] - values[:, j]) / inverse[j, j]
        weight[:, j:] -= torch.outer(error, inverse[j, j:])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes, values


def assert_same(ours: QuantizedWeight, other: QuantizedWeight) -> None:
    assert ours.tensors().keys() == other.tensors().keys()
    for name, tensor in ours.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


def test_yaml_holds_the_defaults():
    settings = yaml.safe_load((files("qbench.conf") / "quantizer" / "gptq.yaml").read_text())
    assert settings == {"name": "gptq", **asdict(GPTQ())}
    assert GPTQ.needs == {Statistic.HESSIAN}


@pytest.mark.parametrize("nbits", [3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("aux_dtype", ["fp16", "int8"])
def test_lowers_the_output_error_of_rtn(nbits, symmetric, aux_dtype):
    inputs, weight = correlated(256), gaussian(96, 256)
    terms = {"nbits": nbits, "symmetric": symmetric, "aux_dtype": aux_dtype}
    [ours] = GPTQ(**terms, **PLAIN).quantize([weight], statistics(inputs))
    [rtn] = RTN(**terms).quantize([weight], None)
    assert output_error(inputs, weight, ours) < 0.8 * output_error(inputs, weight, rtn)
    assert ours.nbytes == rtn.nbytes


@pytest.mark.parametrize(("nbits", "columns", "width"), [(3, 256, 64), (4, 256, 64), (4, 200, 48), (4, 192, -1)])
def test_equals_the_textbook_loop(nbits, columns, width):
    inputs, weight = correlated(columns), gaussian(64, columns)
    stats = statistics(inputs)
    [ours] = GPTQ(nbits=nbits, group_size=width, block_size=64, **PLAIN).quantize([weight], stats)
    codes, values = textbook(weight, stats.hessian, nbits, columns if width == -1 else width, 0.01)
    assert (ours.codes() == codes).double().mean() > 0.995  # fp32 tips a code at a tie, and then its successors
    reference = output_error(inputs, weight, values)
    assert output_error(inputs, weight, ours) == pytest.approx(reference, rel=2e-3)


@pytest.mark.parametrize("width", [24, 64, 128, -1])
@pytest.mark.parametrize("size", [1, 16, 100, 1000])
def test_block_size_does_not_change_the_result(width, size):
    inputs, weight = correlated(200), gaussian(32, 200)
    [whole] = GPTQ(group_size=width, block_size=64, **PLAIN).quantize([weight], statistics(inputs))
    [cut] = GPTQ(group_size=width, block_size=size, **PLAIN).quantize([weight], statistics(inputs))
    assert (whole.codes() == cut.codes()).double().mean() > 0.995
    assert torch.isclose(whole.scale.dense(), cut.scale.dense(), rtol=1e-3).double().mean() > 0.98
    expected = output_error(inputs, weight, whole)
    assert output_error(inputs, weight, cut) == pytest.approx(expected, rel=5e-3)


def test_blocks_hold_whole_groups_or_lie_within_one():
    assert list(blocks(200, 48, 100)) == [(0, 96), (96, 192), (192, 200)]
    assert list(blocks(200, 96, 64)) == [(0, 64), (64, 96), (96, 160), (160, 192), (192, 200)]


@pytest.mark.parametrize("aux_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "width"), [(256, 64), (576, 128), (192, -1), (48, 64)])
@pytest.mark.parametrize("static_groups", [False, True])
def test_identity_hessian_is_rtn(columns, width, symmetric, aux_dtype, static_groups):
    weight = gaussian(48, columns).bfloat16()
    weight[3, :64] = 0.25  # a constant group
    terms = {"group_size": width, "symmetric": symmetric, "aux_dtype": aux_dtype}
    stats = InputStatistics(1, hessian=7.0 * torch.eye(columns))
    [ours] = GPTQ(static_groups=static_groups, act_order=False, **terms).quantize([weight], stats)
    [rtn] = RTN(**terms).quantize([weight], None)
    assert_same(ours, rtn)


@pytest.mark.parametrize("aux_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
def test_one_factor_for_a_group_equals_separate_calls(act_order, static_groups, aux_dtype):
    stats = statistics(correlated(160))
    weights = [gaussian(40, 160), gaussian(8, 160, seed=2), gaussian(24, 160, seed=3)]
    method = GPTQ(act_order=act_order, static_groups=static_groups, aux_dtype=aux_dtype)
    originals = [weight.clone() for weight in weights]
    together = method.quantize(weights, stats)
    for weight, original, ours in zip(weights, originals, together, strict=True):
        assert torch.equal(weight, original)
        [alone] = method.quantize([weight], stats)
        assert (ours.codes() == alone.codes()).double().mean() > 0.995
        torch.testing.assert_close(ours.dequantize(), alone.dequantize(), rtol=0, atol=0.02)


def test_a_dead_channel_costs_nothing():
    inputs, weight = correlated(128), gaussian(32, 128)
    inputs[:, [5, 70]] = 0
    weight[:, 5] = 100.0  # would stretch every grid of its group
    for act_order in (False, True):
        for static_groups in (False, True):
            method = GPTQ(act_order=act_order, static_groups=static_groups)
            [ours] = method.quantize([weight], statistics(inputs))
            assert (ours.dequantize()[:, [5, 70]] == 0).all()
            weight_without = weight.clone()
            weight_without[:, 5] = 0
            [rtn] = RTN().quantize([weight_without], None)
            assert output_error(inputs, weight, ours) < output_error(inputs, weight, rtn)


@pytest.mark.parametrize("static_groups", [False, True])
def test_act_order_restores_the_columns_and_helps_uneven_channels(static_groups):
    plain, ordered = 0.0, 0.0
    for seed in range(3):
        inputs, weight = correlated(256, spread=1.5, seed=seed), gaussian(64, 256, seed=seed + 10)
        stats = statistics(inputs)
        [before] = GPTQ(nbits=3, static_groups=static_groups, act_order=False).quantize([weight], stats)
        [ours] = GPTQ(nbits=3, static_groups=static_groups, act_order=True).quantize([weight], stats)
        plain += output_error(inputs, weight, before)
        ordered += output_error(inputs, weight, ours)
        assert (ours.permutation is None) == static_groups
        precise = GPTQ(nbits=8, static_groups=static_groups, act_order=True)
        [close] = precise.quantize([weight], stats)
        torch.testing.assert_close(close.dequantize(), weight, rtol=0, atol=0.02)
    assert ordered < 0.9 * plain


def test_static_groups_keep_the_grid_of_the_original_weights():
    weight, stats = gaussian(32, 192), statistics(correlated(192, spread=1.0))
    [rtn] = RTN().quantize([weight], None)
    for act_order in (False, True):
        [ours] = GPTQ(static_groups=True, act_order=act_order).quantize([weight], stats)
        assert torch.equal(ours.scale.stored, rtn.scale.stored)
        assert torch.equal(ours.zero.stored, rtn.zero.stored)


def test_a_singular_hessian_is_damped_until_it_can_be_factored():
    inputs, weight = correlated(128, tokens=8), gaussian(32, 128)
    for damping in (0.01, 0.0):
        [ours] = GPTQ(damping=damping).quantize([weight], statistics(inputs))
        [rtn] = RTN().quantize([weight], None)
        assert output_error(inputs, weight, ours) < output_error(inputs, weight, rtn)
    negative = torch.eye(4).double()
    negative[0, 1] = negative[1, 0] = 1.05
    _, used = unit_factor(negative, 0.01)
    assert used == pytest.approx(0.1)


def test_refuses_what_it_cannot_use():
    weight = gaussian(8, 64)
    hessian = torch.eye(64)
    for stats in (None, InputStatistics(10)):
        with pytest.raises(ValueError, match="needs the Hessian"):
            GPTQ().quantize([weight], stats)
    with pytest.raises(ValueError, match="input channels"):
        GPTQ().quantize([weight], InputStatistics(1, hessian=torch.eye(32)))
    with pytest.raises(ValueError, match="no calibration token"):
        GPTQ().quantize([weight], InputStatistics(0, hessian=0 * hessian))
    with pytest.raises(ValueError, match="NaN or Inf"):
        GPTQ().quantize([weight], InputStatistics(1, hessian=hessian / 0))
    indefinite = hessian.clone()
    indefinite[0, 1] = indefinite[1, 0] = 1e3
    with pytest.raises(ValueError, match="not positive definite"):
        GPTQ().quantize([weight], InputStatistics(1, hessian=indefinite))
    with pytest.raises(ValueError, match="damping"):
        GPTQ(damping=-1.0)
    with pytest.raises(ValueError, match="block_size"):
        GPTQ(block_size=0)
