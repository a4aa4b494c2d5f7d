"""fp8, mxfp4, mxfp8 and nvfp4 against the libraries that serve them: the same bytes, and the same numbers from them."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from qbench.plugins.fp8 import FP8
from qbench.plugins.mxfp4 import MXFP4, MXFP8
from qbench.plugins.nvfp4 import NVFP4
from qbench.quant.blockfloat import e2m1, shared_exponent
from qbench.testing import gaussian

SPREADS = (1e-6, 0.05, 3e4)


@pytest.fixture
def library():
    """compressed-tensors' quantization and its compressors."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors import compressors, quantization

    return SimpleNamespace(**(vars(compressors) | vars(quantization)))


def weights(rows=64, columns=256):
    """Weights of several sizes, with zeros, a block of zeros, and values that lie on midpoints of e2m1."""
    for seed, spread in enumerate(SPREADS):
        weight = gaussian(rows, columns, seed) * (spread / 0.05)
        weight[3] = 0
        weight[5, :64] = 0
        weight[7, 1::7] = 0
        weight[9] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(columns // 8)
        yield weight


def theirs(library, weight, scheme, low, high):
    """What compressed-tensors stores for a weight whose blocks span `low .. high`."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    [args] = [scheme.weights]
    state = {"weight": weight}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    scale, _ = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    compressor = library.BaseCompressor.get_value_from_registry(
        {4: "nvfp4-pack-quantized", 8: "naive-quantized"}[args.num_bits]
        if args.scale_dtype != torch.uint8
        else "mxfp4-pack-quantized"
    )
    stored = compressor.compress(state | {"weight_scale": scale}, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


def scheme_of(library, name):
    return library.preset_name_to_scheme(name, ["Linear"])


@pytest.mark.parametrize("scale", ["tensor", "channel", "block"])
def test_fp8_stores_what_compressed_tensors_does(library, scale):
    name, block = {"tensor": ("FP8", (64, 256)), "channel": ("FP8_DYNAMIC", (1, 256)), "block": ("FP8_BLOCK", None)}[
        scale
    ]
    for weight in weights():
        ours = FP8(scale=scale).quantize_one(weight)
        rows, columns = block or (64, 128)
        blocks = weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        if scale == "tensor":
            low, high = low.view(1), high.view(1)
        stored, dense = theirs(library, weight, scheme_of(library, name), low, high)
        assert torch.equal(stored["weight_scale"].view(ours.scale.shape), ours.scale)
        assert torch.equal(stored["weight"].view(torch.uint8), ours.codes)
        assert torch.equal(dense, ours.dequantize())


def test_nvfp4_stores_what_compressed_tensors_does(library):
    for weight in weights():
        [ours] = NVFP4().quantize([weight], None)
        low, high = (reduce(weight.unflatten(1, (-1, 16)), 2) for reduce in (torch.amin, torch.amax))
        stored, dense = theirs(library, weight, scheme_of(library, "NVFP4A16"), low, high)
        assert torch.equal(stored["weight_global_scale"], ours.global_scale.flatten())
        assert torch.equal(stored["weight_scale"].view(torch.uint8), ours.scale)
        assert torch.equal(stored["weight_packed"], ours.codes)
        assert dense.dtype == torch.bfloat16
        assert torch.equal(dense, ours.dequantize(torch.bfloat16))


def test_mxfp4_stores_what_compressed_tensors_does(library):
    for weight in weights():
        ours = MXFP4(exponent="even").quantize_one(weight)
        low, high = (reduce(weight.unflatten(1, (-1, 32)), 2) for reduce in (torch.amin, torch.amax))
        stored, dense = theirs(library, weight, scheme_of(library, "MXFP4A16"), low, high)
        something = (low != 0) | (high != 0)
        assert torch.equal(stored["weight_scale"][something], ours.scale[something])
        assert torch.equal(stored["weight_packed"], ours.codes)
        assert torch.equal(dense, ours.dequantize(torch.bfloat16))


@pytest.mark.parametrize("rule", ["floor", "even", "ceil"])
@pytest.mark.oracle
def test_mx_stores_what_torchao_does(oracle_package, rule):
    oracle_package("torchao")
    mx = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    mode = {"floor": "floor", "even": "even", "ceil": "rceil"}[rule]
    for weight in weights():
        alive = weight.abs().amax(1) > 0
        for ours, kind in (
            (MXFP4(exponent=rule).quantize_one(weight), torch.float4_e2m1fn_x2),
            (MXFP8(exponent=rule).quantize_one(weight), torch.float8_e4m3fn),
        ):
            scale, codes = mx.to_mx(weight, kind, 32, mx.ScaleCalculationMode(mode))
            blocks = weight.unflatten(1, (-1, 32)).abs().amax(2) > 0  # theirs gives zeros whatever scale comes out
            assert torch.equal(scale.view(torch.uint8).view(ours.scale.shape)[blocks], ours.scale[blocks])
            assert torch.equal(codes.view(torch.uint8).view(ours.codes.shape)[alive], ours.codes[alive])


def test_transformers_reads_the_same_numbers():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    reader = Fp8Dequantize(None)
    for weight in weights(256, 256):
        for ours in (
            *(FP8(scale=scale).quantize_one(weight) for scale in ("channel", "block")),
            MXFP8().quantize_one(weight),
        ):
            read = reader._dequantize_one(ours.codes.view(torch.float8_e4m3fn), ours.scale, torch.float32)
            assert torch.equal(read, ours.dequantize())
        ours = MXFP4().quantize_one(weight)
        blocks = ours.codes.view(1, 256, 8, 16)
        read = convert_moe_packed_tensors(blocks, ours.scale[None], dtype=torch.bfloat16)
        assert torch.equal(read[0].T, ours.dequantize(torch.bfloat16))


def test_ties_go_to_the_even_code():
    values = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0])
    assert e2m1(values).tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 7]
    assert e2m1(-values).tolist() == [0, 8, 10, 10, 12, 12, 14, 14, 15]
    beside = torch.nextafter(values[1:-1], torch.tensor(10.0)), torch.nextafter(values[1:-1], torch.tensor(0.0))
    assert [e2m1(one).tolist() for one in beside] == [[1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6]]


def test_the_shared_exponent_of_the_standard():
    """For e2m1: 6 is the largest number, and 2**(exponent + 2) the power of two at or below the block's largest."""
    absmax = torch.tensor([4.0, 6.0, 6.5, 7.0, 7.99, 8.0, 2.0**-130])
    rules = {rule: shared_exponent(absmax, rule, 6.0, 1).tolist() for rule in ("floor", "even", "ceil")}
    assert rules["floor"] == [0, 0, 0, 0, 0, 1, -132]
    assert rules["even"] == [0, 0, 0, 1, 1, 1, -132]
    assert rules["ceil"] == [0, 0, 1, 1, 1, 1, -132]


def test_a_linear_group_shares_the_global_scale():
    group = [gaussian(32, 64), gaussian(16, 64, 1) * 5]
    ours = NVFP4().quantize(group, None)
    assert torch.equal(ours[0].global_scale, ours[1].global_scale)
    assert torch.equal(ours[0].global_scale.view(()), 448.0 * 6.0 / group[1].abs().max())


@pytest.mark.parametrize(
    ("quantizer", "rows", "bits"),
    [
        (FP8(scale="tensor"), 512, 8 + 32 / (512 * 1024)),
        (FP8(scale="channel"), 512, 8 + 32 / 1024),
        (FP8(scale="block"), 512, 8 + 32 / 128**2),
        (MXFP8(), 512, 8.25),
        (MXFP4(), 512, 4.25),
        (NVFP4(), 512, 4.5 + 32 / (512 * 1024)),
    ],
)
def test_bits_per_weight(quantizer, rows, bits):
    [made] = quantizer.quantize([gaussian(rows, 1024)], None)
    assert made.bits_per_weight == bits


@pytest.mark.parametrize("quantizer", [FP8(), FP8(scale="block"), MXFP4(), MXFP8(), NVFP4()])
def test_what_is_not_finite_is_refused(quantizer):
    for bad in (float("nan"), float("inf")):
        weight = gaussian(32, 64)
        weight[3, 5] = bad
        with pytest.raises(ValueError, match="NaN or Inf"):
            quantizer.quantize([weight], None)


@pytest.mark.parametrize(("cls", "setting"), [(FP8, "scale"), (MXFP4, "exponent"), (MXFP8, "exponent")])
def test_an_unknown_setting_is_named(cls, setting):
    with pytest.raises(ValueError, match=f"{setting} must be one of .*, got 'row'"):
        cls(**{setting: "row"})
