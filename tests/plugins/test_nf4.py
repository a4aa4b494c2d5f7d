"""NF4 and FP4: levels, rounding, degenerate groups, and the codes of bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from qbench.plugins.nf4 import FP4, NF4
from qbench.quant.codebook import FP4_LEVELS, NF4_LEVELS, nearest

MODELS = Path(__file__).parents[2] / "outputs" / "models"
BOTH = pytest.mark.parametrize("quantizer", [NF4, FP4])


def test_levels_are_the_quantiles_of_the_paper():
    end = 0.9677083  # mean of 1 - 1/32 and 1 - 1/30: the outermost of 16 and of 15 equal slices
    positive = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64))
    negative = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64))[:-1]
    expected = torch.cat([negative, positive.flip(0)]) / positive[0]
    torch.testing.assert_close(torch.tensor(NF4_LEVELS, dtype=torch.float64), expected, rtol=0, atol=2e-7)


def test_fp4_is_a_float_with_two_exponent_bits():
    # 0, one tiny value, then (1 or 1.5) * 2**e for three exponents; the largest is 1
    values = sorted({abs(level) for level in FP4_LEVELS})
    torch.testing.assert_close(torch.tensor(values) * 12, torch.tensor([0, 0.0625, 2, 3, 4, 6, 8, 12]))
    assert FP4_LEVELS[8:] == tuple(-level for level in FP4_LEVELS[:8])


@BOTH
def test_exact_levels_round_trip(quantizer):
    levels = torch.tensor(quantizer.levels).repeat(4)
    weight = 2.0 ** torch.arange(-6, 2)[:, None] * levels  # [8, 64], each row holds every level
    made = quantizer().quantize_one(weight)
    assert torch.equal(made.dequantize(), weight)
    if quantizer is NF4:  # +0 and -0 are one value in FP4
        assert torch.equal(made.codes(), torch.arange(16, dtype=torch.uint8).repeat(8, 4))


@BOTH
def test_every_code_is_the_nearest_level(quantizer):
    codebook = torch.tensor(quantizer.levels)
    ratios = torch.linspace(-1, 1, 10001)
    chosen = (ratios - codebook[nearest(ratios, codebook).int()]).abs()
    torch.testing.assert_close(chosen, (ratios[:, None] - codebook).abs().amin(1))


@BOTH
@pytest.mark.parametrize("aux_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("columns", [128, 100, 24])
def test_degenerate_groups(quantizer, aux_dtype: str, columns: int):
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1], weight[2] = 0, 0.75, -1e-6
    restored = quantizer(aux_dtype=aux_dtype).quantize_one(weight).dequantize()
    assert torch.isfinite(restored).all()
    assert torch.equal(restored[0], weight[0])
    if aux_dtype == "fp16":
        torch.testing.assert_close(restored[1:3], weight[1:3], rtol=1e-3, atol=3e-8)


def test_ragged_group_has_its_own_scale():
    weight = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))
    weight[:, 64:] *= 0.01
    made = NF4().quantize_one(weight)
    torch.testing.assert_close(made.scale.dense()[:, 1], weight[:, 64:].abs().amax(1), rtol=1e-3, atol=0)


def test_relative_error_on_a_gaussian():
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    squared = {q: float((weight - q().quantize_one(weight).dequantize()).square().mean()) for q in (NF4, FP4)}
    assert squared[NF4] == pytest.approx(0.00847, rel=0.01)  # what bitsandbytes reaches
    assert squared[NF4] < squared[FP4]


@BOTH
@pytest.mark.parametrize(("aux_dtype", "bits"), [("fp16", 4 + 16 / 64), ("int8", 4 + 8.5 / 64)])
def test_bits_per_weight_counts_the_codebook(quantizer, aux_dtype: str, bits: float):
    made = quantizer(aux_dtype=aux_dtype).quantize_one(torch.ones(64, 256))
    assert made.bits_per_weight == pytest.approx(bits + 16 * 32 / made.numel)
    assert made.method == quantizer.__name__.lower()


def gaussians() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [s * torch.randn(512, 1024, generator=generator) for s in (0.02, 1.0)]


def smollm2() -> list[Tensor]:
    files = sorted(MODELS.glob("smollm2-*/model.safetensors"))
    if not files:
        pytest.skip("no outputs/models/smollm2-*: run `python -m qbench` once")
    with safe_open(files[0], "pt") as file:
        names = sorted(name for name in file.keys() if "_proj" in name)[::20]  # noqa: SIM118
        return [file.get_tensor(name).float() for name in names]


@pytest.mark.oracle
@BOTH
@pytest.mark.parametrize("weights", [gaussians, smollm2])
def test_bitsandbytes(quantizer, weights):
    official = pytest.importorskip("bitsandbytes.functional")
    for weight in weights():
        packed, state = official.quantize_4bit(weight, blocksize=64, quant_type=quantizer.method)
        packed = packed.flatten()
        codes = torch.stack([packed >> 4, packed & 15], 1).view(weight.shape)  # the first in the high bits
        made = quantizer().quantize_one(weight)
        assert torch.equal(made.codebook, state.code)
        assert torch.equal(made.codes(), codes)
        absmax = weight.abs().unflatten(1, (-1, 64)).amax(2)
        torch.testing.assert_close(absmax.flatten(), state.absmax, rtol=1e-7, atol=0)
        assert torch.equal(made.scale.stored, state.absmax.half().view(made.scale.stored.shape))
