import pytest
import torch

from qbench.format.aux import BLOCK, Aux
from qbench.format.weight import QuantizedWeight
from qbench.layers.linear import QuantLinear


def parts(generator, shape, nbits, group_size, aux_dtype="fp16"):
    *lead, rows, columns = shape
    groups = -(-columns // group_size)
    codes = torch.randint(0, 2**nbits, shape, generator=generator, dtype=torch.uint8)
    scale = Aux.compress(torch.rand(*lead, rows, groups, generator=generator) + 0.01, aux_dtype)
    zeros = torch.randint(0, 2**nbits, (*lead, rows, groups), generator=generator).float()
    t = (torch.rand(*lead, columns, generator=generator) + 0.5).half()
    return codes, scale, Aux.compress(zeros, aux_dtype), t


@pytest.mark.parametrize("aux_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize(("shape", "group_size"), [((5, 576), 128), ((3, 33), 16), ((2, 4, 96), 64), ((4, 8), 8)])
def test_dequantize_is_the_formula(shape, group_size, nbits, aux_dtype, generator):
    codes, scale, zero, t = parts(generator, shape, nbits, group_size, aux_dtype)
    weight = QuantizedWeight.build(codes, scale, nbits=nbits, group_size=group_size, zero=zero, input_scale=t)
    group = torch.arange(shape[-1]) // group_size
    formula = (codes.float() - zero.dense()[..., group]) * scale.dense()[..., group] * t.float().unsqueeze(-2)
    assert torch.equal(weight.dequantize(), formula)
    assert torch.equal(weight.dequantize(torch.bfloat16), formula.bfloat16())


def test_centred_grid_codebook_and_permutation(generator):
    codes, scale, _, t = parts(generator, (6, 40), 4, 16)
    group = torch.arange(40) // 16
    symmetric = QuantizedWeight.build(codes, scale, nbits=4, group_size=16)
    assert torch.equal(symmetric.dequantize(), (codes.float() - 8) * scale.dense()[:, group])
    levels = torch.linspace(-1, 1, 16)
    order = torch.randperm(40, generator=generator)
    looked_up = QuantizedWeight.build(
        codes, scale, nbits=4, group_size=16, codebook=levels, input_scale=t, permutation=order
    )
    expected = torch.empty(6, 40)
    expected[:, order] = levels[codes.long()] * scale.dense()[:, group]
    assert torch.equal(looked_up.dequantize(), expected * t.float())


def test_bytes_are_counted_from_buffers(generator):
    codes, scale, zero, t = parts(generator, (64, 576), 3, 64)
    weight = QuantizedWeight.build(codes, scale, nbits=3, group_size=64, zero=zero, input_scale=t)
    assert weight.nbytes == 64 * 576 * 3 // 8 + 2 * (64 * 9 * 2) + 576 * 2
    assert weight.bits_per_weight == 8 * weight.nbytes / (64 * 576)
    codes, scale, zero, _ = parts(generator, (64, 576), 3, 64, "int8")
    weight = QuantizedWeight.build(codes, scale, nbits=3, group_size=64, zero=zero)
    assert weight.nbytes == 64 * 576 * 3 // 8 + 2 * (64 * 9 + 4 * 64 * 9 // BLOCK)


def test_int8_aux_keeps_integers_exactly_and_reals_closely(generator):
    integers = torch.randint(-100, 150, (7, 31), generator=generator).float()
    assert torch.equal(Aux.compress(integers, "int8").dense(), integers)
    reals = torch.rand(7, 31, generator=generator)
    assert (Aux.compress(reals, "int8").dense() - reals).abs().max() < 1 / 255


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_aux_refuses_what_fp16_cannot_hold(bad):
    with pytest.raises(ValueError, match="finite"):
        Aux.compress(torch.tensor([[1.0, bad]]), "fp16")


def test_misfit_parts_are_refused(generator):
    codes, scale, zero, t = parts(generator, (4, 64), 4, 32)
    with pytest.raises(ValueError, match="zero must have shape"):
        QuantizedWeight.build(codes, scale, nbits=4, group_size=32, zero=Aux(zero.stored[:, :1]))
    with pytest.raises(ValueError, match="input scale must have shape"):
        QuantizedWeight.build(codes, scale, nbits=4, group_size=32, input_scale=t[:-1])


def test_quant_linear_multiplies_with_the_dequantized_weight(generator):
    codes, scale, zero, t = parts(generator, (24, 96), 3, 64)
    weight = QuantizedWeight.build(codes, scale, nbits=3, group_size=64, zero=zero, input_scale=t)
    layer = QuantLinear(weight, torch.randn(24, generator=generator))
    x = torch.randn(2, 5, 96, generator=generator)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight.dequantize(), layer.bias))
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.codes_0.dtype == torch.uint8
    assert layer.scale.dtype == torch.float16
    assert torch.equal(layer.quantized.dequantize(), weight.dequantize())
    assert layer(x.bfloat16()).dtype == torch.bfloat16
