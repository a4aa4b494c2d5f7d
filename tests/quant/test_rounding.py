import pytest
import torch

from qbench.quant.rounding import round_to_nearest


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
def test_every_code_is_used_and_errors_stay_within_half_a_step(nbits, symmetric, generator):
    weight = torch.randn(64, 512, generator=generator)
    quantized = round_to_nearest(weight, nbits=nbits, group_size=64, symmetric=symmetric)
    assert quantized.codes().unique().numel() == 2**nbits
    step = quantized.scale.dense().repeat_interleave(64, 1)
    limit = 1.0 if symmetric else 0.5  # the one value at +max|w| clips to the last code; an integer zero shifts ends
    inside = (quantized.dequantize() - weight).abs() <= step * limit * 1.01 + 1e-6
    assert inside.float().mean() > (0.97 if not symmetric else 0.999)
    assert (quantized.dequantize() - weight).abs().max() <= 1.02 * step.max()


@pytest.mark.parametrize("aux_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("constant", [0.0, 1e-6, 0.5, -3.0, 1000.0])
def test_constant_rows_survive(constant, symmetric, aux_dtype, generator):
    weight = torch.randn(8, 128, generator=generator) * 0.02
    weight[3] = constant
    quantized = round_to_nearest(weight, nbits=4, group_size=64, symmetric=symmetric, aux_dtype=aux_dtype)
    restored = quantized.dequantize()
    assert torch.isfinite(restored).all()
    if aux_dtype == "fp16":
        assert (restored[3] - constant).abs().max() <= abs(constant) * (0.08 if symmetric else 0.001) + 1e-6


def test_tiny_weights_are_not_lost(generator):
    weight = torch.randn(16, 128, generator=generator) * 1e-5
    error = (round_to_nearest(weight, nbits=4, group_size=64).dequantize() - weight).norm() / weight.norm()
    assert error < 0.15


def test_bf16_and_non_contiguous_weights(generator):
    weight = torch.randn(96, 33, generator=generator).bfloat16()
    a = round_to_nearest(weight.T, nbits=3, group_size=16).dequantize()
    b = round_to_nearest(weight.T.float().contiguous(), nbits=3, group_size=16).dequantize()
    assert torch.equal(a, b)


def test_int8_aux_costs_little(generator):
    weight = torch.randn(64, 512, generator=generator)
    fp16 = round_to_nearest(weight, nbits=4, group_size=64)
    int8 = round_to_nearest(weight, nbits=4, group_size=64, aux_dtype="int8")
    assert int8.bits_per_weight < fp16.bits_per_weight - 0.2
    errors = [(q.dequantize() - weight).norm() / weight.norm() for q in (fp16, int8)]
    assert errors[1] < 1.02 * errors[0]


def test_one_constant_group_does_not_spoil_its_int8_neighbours(generator):
    weight = torch.randn(64, 512, generator=generator)
    before = round_to_nearest(weight, nbits=4, group_size=64, aux_dtype="int8").dequantize()
    weight[20, :64] = 3.0
    weight[40, :64] = 1e-3
    after = round_to_nearest(weight, nbits=4, group_size=64, aux_dtype="int8").dequantize()
    rest = torch.ones(64, dtype=torch.bool)
    rest[[20, 40]] = False
    errors = [(restored[rest] - weight[rest]).norm() / weight[rest].norm() for restored in (before, after)]
    assert errors[1] < 1.03 * errors[0]
    assert (after[20, :64] - 3).abs().max() < 0.03
    assert (after[40, :64] - 1e-3).abs().max() < 2e-3


@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_near_constant_groups_beside_large_ones_in_int8(nbits, generator):
    weight = torch.randn(8, 256, generator=generator) * 50
    weight[3] = 0.5 + 1e-4 * torch.randn(256, generator=generator)
    assert torch.isfinite(round_to_nearest(weight, nbits=nbits, group_size=64, aux_dtype="int8").dequantize()).all()
