"""The block-float formats pass the conformance suite in each form; their numbers are those of the standard."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qbench.format.blockfloat import FP8Weight, MXFP4Weight, NVFP4Weight, e2m1_values, e4m3_values, power_of_two
from qbench.format.packing import pack
from qbench.quant.blockfloat import round_to_fp8, round_to_mxfp4, round_to_mxfp8, round_to_nvfp4
from qbench.testing import FormatConformance


def weight(generator, shape):
    return torch.randn(shape, generator=generator)


class TestFP8PerTensor(FormatConformance):
    def make(self, generator, shape):
        return round_to_fp8(weight(generator, shape), shape)


class TestFP8PerChannel(FormatConformance):
    def make(self, generator, shape):
        return round_to_fp8(weight(generator, shape), (1, shape[1]))


class TestFP8PerBlock(FormatConformance):
    def make(self, generator, shape):
        made = round_to_fp8(weight(generator, shape), (32, 64))
        return replace(made, scale=made.scale.bfloat16())


class TestMXFP8(FormatConformance):
    def make(self, generator, shape):
        return round_to_mxfp8(weight(generator, shape), "floor")


class TestMXFP4(FormatConformance):
    def make(self, generator, shape):
        return round_to_mxfp4(weight(generator, shape), "floor")


class TestNVFP4(FormatConformance):
    def make(self, generator, shape):
        values = weight(generator, shape)
        return round_to_nvfp4(values, float(values.abs().max()))


class TestNVFP4WithAGlobalScaleThatMultiplies(TestNVFP4):
    def make(self, generator, shape):
        made = super().make(generator, shape)
        return replace(made, global_scale=made.global_scale.reciprocal(), global_divides=False)


def read_e4m3(byte):
    """One e4m3 number by the words of the standard: bias 7, subnormal without exponent, no infinity."""
    sign, exponent, mantissa = -1 if byte & 128 else 1, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7))


def read_e2m1(code):
    """One e2m1 number: bias 1, subnormal without exponent."""
    sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1))


def test_every_byte_is_the_number_of_the_standard():
    every = torch.arange(256).to(torch.uint8)
    expected = torch.tensor([read_e4m3(byte) for byte in range(256)])
    assert torch.equal(e4m3_values(every).nan_to_num(999.0), expected.nan_to_num(999.0))
    powers = power_of_two(every).double()
    assert torch.equal(powers[:255], torch.tensor([2.0 ** (byte - 127) for byte in range(255)], dtype=torch.float64))
    assert powers[255].isnan()
    codes = torch.arange(16)
    assert e2m1_values(*pack(codes, 4), 16).tolist() == [read_e2m1(code) for code in range(16)]


def test_a_ragged_weight_by_hand():
    """Every weight of `[5, 45]`, blocks that end early both ways, computed one number at a time."""
    values = weight(torch.Generator().manual_seed(1), (5, 45))
    block, mx = round_to_fp8(values, (2, 32)), round_to_mxfp4(values, "floor")
    nv = round_to_nvfp4(values, float(values.abs().max()))
    assert [list(one.scale.shape) for one in (block, mx, nv)] == [[3, 2], [5, 2], [5, 3]]
    assert list(mx.codes.shape) == [5, 23]
    overall = float(nv.global_scale)
    for one, read in (
        (block, lambda o, i: read_e4m3(int(block.codes[o, i])) * float(block.scale[o // 2, i // 32])),
        (mx, lambda o, i: nibble(mx, o, i) * 2.0 ** (int(mx.scale[o, i // 32]) - 127)),
        (nv, lambda o, i: nibble(nv, o, i) * read_e4m3(int(nv.scale[o, i // 16])) / overall),
    ):
        expected = torch.tensor([[read(o, i) for i in range(45)] for o in range(5)])
        torch.testing.assert_close(one.dequantize(), expected, rtol=2e-7, atol=0)


def nibble(one, o, i):
    return read_e2m1(int(one.codes[o, i // 2]) >> 4 * (i % 2) & 15)


@pytest.mark.parametrize(
    ("cls", "tensors", "extra", "named"),
    [
        (FP8Weight, {"codes": (4, 8), "scale": (4, 2)}, {"block": [1, 8]}, r"scale must be .* \[4, 1\]"),
        (MXFP4Weight, {"codes": (4, 8), "scale": (4, 1)}, {}, r"codes must be uint8 \[4, 4\]"),
        (NVFP4Weight, {"codes": (4, 4), "scale": (4, 1), "global_scale": (1, 1)}, {"global_divides": True}, "float32"),
        (MXFP4Weight, {"codes": (4, 4)}, {}, "scale"),
        (MXFP4Weight, {"codes": (4, 4), "scale": (4, 1)}, {"surprise": 1}, "surprise"),
    ],
)
def test_what_does_not_fit_its_shape_is_named(cls, tensors, extra, named):
    described = {"shape": [4, 8], "method": "", "diagnostics": {}} | extra
    with pytest.raises((ValueError, KeyError), match=named):
        cls.rebuild(described, {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in tensors.items()})
