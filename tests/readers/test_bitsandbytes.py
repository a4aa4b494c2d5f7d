"""bitsandbytes' folders: NF4, FP4 and int8, by the published layout and as the package and transformers save them."""

import json

import pytest
import torch

from qbench.format.bitsandbytes import FourBit, Int8
from qbench.quant.codebook import FP4_LEVELS, NF4_LEVELS
from qbench.readers.bitsandbytes import BitsAndBytes
from qbench.readers.reader import ReadError
from qbench.sources.tiny import build
from qbench.testing import FormatConformance
from tests.readers.cases import skeleton, write

LEVELS = {"nf4": torch.tensor(NF4_LEVELS), "fp4": torch.tensor(FP4_LEVELS)}
Q = "model.layers.0.self_attn.q_proj"


def four_bits(weight, kind="nf4", block=64, nested=False):
    """The stored tensors of a weight `[out, in]`, and the numbers they stand for, fp32."""
    flat, levels = weight.float().flatten(), LEVELS[kind]
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(1).clamp_min(1e-6)
    codes = (blocks / absmax[:, None]).flatten()[: flat.numel(), None].sub(levels).abs().argmin(1)
    state = {"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": list(weight.shape)}
    parts, dense = {"weight.absmax": absmax}, absmax
    if nested:
        inner = torch.linspace(-1, 1, 256)
        offset = float(absmax.mean())
        groups = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        most = groups.abs().amax(1)
        found = (groups / most[:, None]).flatten()[: len(absmax), None].sub(inner).abs().argmin(1)
        dense = inner[found] * most.repeat_interleave(256)[: len(absmax)] + torch.tensor(offset)
        parts = {"weight.absmax": found.to(torch.uint8), "weight.nested_absmax": most, "weight.nested_quant_map": inner}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    parts |= {
        "weight": (pairs[:, :1] << 4 | pairs[:, 1:]).to(torch.uint8),
        "weight.quant_map": levels,
        f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    stands_for = levels[codes] * dense.repeat_interleave(block)[: flat.numel()]
    return parts, stands_for.view(weight.shape)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(tmp_path, kind, nested):
    expected = {}

    def pack(module, weight):
        parts, expected[module] = four_bits(weight, kind, 128, nested)  # in_features of 64: a block is two rows
        return parts

    path = write(tmp_path / "q", pack, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    held = BitsAndBytes().open(path, skeleton())
    assert held.made_by == f"bitsandbytes, {kind.upper()}" + (" doubly quantized" if nested else "")
    for module, weight in expected.items():
        read = held.read(f"{module}.weight")
        assert isinstance(read, FourBit)
        assert torch.equal(read.dequantize(), weight), module
        assert torch.equal(read.dequantize(torch.float16), weight.half())


def test_int8(tmp_path):
    expected = {}

    def pack(module, weight):
        absmax = weight.float().abs().amax(1)
        codes = (weight.float() * 127 / absmax[:, None]).round().to(torch.int8)
        expected[module] = codes * absmax[:, None] * 7.874015718698502e-3
        return {"weight": codes, "SCB": absmax, "weight_format": torch.zeros((), dtype=torch.uint8)}

    held = BitsAndBytes().open(write(tmp_path / "q", pack, {"quant_method": "bitsandbytes"}, "moe"), skeleton("moe"))
    assert held.made_by == "bitsandbytes, int8"
    for module, weight in expected.items():
        assert torch.equal(held.read(f"{module}.weight").dequantize(), weight), module


WRONG = {
    "blocksize": (lambda parts, state: state | {"blocksize": 63}, "blocksize=63"),
    "another shape": (lambda parts, state: state | {"shape": [32, 128]}, r"a weight \[32, 128\], not \[64, 64\]"),
    "no object": (lambda parts, state: [1], "no JSON object"),
    "offset": (lambda parts, state: state | {"nested_offset": None}, "nested_offset"),
    "levels": (
        lambda parts, state: parts["weight.quant_map"].mul_(0.5) is None or state,
        "quant_map is not that of nf4",
    ),
    "infinite": (lambda parts, state: parts["weight.nested_absmax"].fill_(torch.inf) is None or state, "not a finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(tmp_path, case):
    edit, said = WRONG[case]

    def pack(module, weight):
        parts, _ = four_bits(weight, nested=True)
        parts = {name: part.clone() for name, part in parts.items()}
        if module == Q:
            key = "weight.quant_state.bitsandbytes__nf4"
            state = edit(parts, json.loads(bytes(parts[key].tolist())))
            parts[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return parts

    held = BitsAndBytes().open(write(tmp_path / "q", pack, {"quant_method": "bitsandbytes"}), skeleton())
    with pytest.raises(ReadError, match=said):
        held.read(f"{Q}.weight")


class TestFourBit(FormatConformance):
    def make(self, generator, shape):
        parts, _ = four_bits(torch.randn(shape, generator=generator), block=32)
        codes = parts["weight"].flatten()
        return FourBit(shape, 32, codes, parts["weight.quant_map"], parts["weight.absmax"], method="nf4")


class TestDoublyQuantized(FormatConformance):
    def make(self, generator, shape):
        parts, _ = four_bits(torch.randn(shape, generator=generator), block=32, nested=True)
        codes, offset = parts["weight"].flatten(), torch.tensor(0.5)
        nested = (256, parts["weight.nested_quant_map"], parts["weight.nested_absmax"], offset)
        return FourBit(shape, 32, codes, parts["weight.quant_map"], parts["weight.absmax"], *nested, method="nf4")


class TestInt8(FormatConformance):
    def make(self, generator, shape):
        codes = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
        return Int8(shape, codes, torch.rand(shape[0], generator=generator), method="int8")


@pytest.mark.oracle
@pytest.mark.parametrize(
    "settings",
    [
        dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
        dict(load_in_8bit=True),
    ],
)
def test_as_transformers_saves_and_the_package_decodes(tmp_path, settings):
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build("dense", 0)[0].half().save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(**settings)
    how = dict(quantization_config=config, dtype=torch.float16, device_map={"": "cpu"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **how)
    model.save_pretrained(tmp_path / "q")
    held = BitsAndBytes().open(tmp_path / "q", skeleton())
    compared = 0
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            expected = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif type(module).__name__ == "Linear8bitLt":
            stored = module.weight
            absmax = stored.SCB if stored.SCB is not None else module.state.SCB
            expected = functional.int8_vectorwise_dequant(stored.data, absmax).half()
        else:
            continue
        assert torch.equal(held.read(f"{name}.weight").dequantize(torch.float16), expected), name
        compared += 1
    assert compared == 14
