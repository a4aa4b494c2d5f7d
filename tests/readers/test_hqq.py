"""HQQ's and SINQ's folders: every tensor as the packages decode it, rounding after every step as they do."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qbench.format.hqq import IN_WORDS, PER_WORD, HQQWeight, pack_rows
from qbench.quant.codebook import NF4_LEVELS
from qbench.readers.file import File
from qbench.readers.hqq import HQQ
from qbench.readers.reader import ReadError
from qbench.readers.sinq import SINQ
from qbench.sources.tiny import build
from qbench.testing import FormatConformance
from tests.readers.cases import skeleton, write

Q = "model.layers.0.self_attn.q_proj"
GROUP = 32


def table(weight, nbits, axis, generator):
    """Codes of a table in its own shape, and random zero points and scales for its rows or columns."""
    count = weight.numel() // GROUP
    shape = (count, GROUP) if axis == 1 else (GROUP, count)
    one = (count, 1) if axis == 1 else (1, count)
    codes = torch.randint(0, 2**nbits, shape, generator=generator)
    zero = torch.rand(one, generator=generator) * 2**nbits
    return codes, zero, torch.rand(one, generator=generator) / 10 + 0.01


def packed(codes, nbits):
    """As published: the first rows in the high bits, equal parts of the rows after each other."""
    count = PER_WORD[nbits]
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % count))
    parts = codes.reshape(count, -1, codes.shape[1])
    words = sum(part << (nbits * (count - 1 - i)) for i, part in enumerate(parts))
    return words.to(torch.int32 if nbits in IN_WORDS else torch.uint8)


def spelled(text):
    return torch.tensor([ord(letter) for letter in text], dtype=torch.uint8)


def hqq_parts(weight, nbits, axis, dtype, seed, as_float=False):
    codes, zero, scale = table(weight, nbits, axis, torch.Generator().manual_seed(seed))
    zero, scale = zero.to(dtype), scale.to(dtype)
    stands_for = ((codes.to(dtype) - zero) * scale).reshape(weight.shape)
    words = packed(codes, nbits)
    return stands_for, {
        "W_q": words.view(dtype) if as_float else words,
        "scale": scale,
        "zero": zero,
        "nbits": torch.tensor(nbits, dtype=torch.int32),
        "group_size": torch.tensor(GROUP, dtype=torch.int32),
        "shape": torch.tensor(weight.shape),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "view_as_float": torch.tensor(int(as_float), dtype=torch.uint8),
        "compute_dtype": spelled(str(dtype)),
        "packing": spelled("4bit_u8"),
        "round_zero": torch.tensor(1, dtype=torch.uint8),
    }


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq(tmp_path, nbits, axis):
    expected, dtype = {}, torch.bfloat16 if nbits == 8 else torch.float16

    def pack(module, weight):
        expected[module], parts = hqq_parts(weight, nbits, axis, dtype, len(module), as_float=nbits == 4)
        return parts

    path = write(tmp_path / "q", pack, {"quant_method": "hqq"})
    held = HQQ().open(path, skeleton())
    assert held.made_by == f"HQQ, int{nbits} g{GROUP}"
    assert not held.ignored
    for module, weight in expected.items():
        assert torch.equal(held.read(f"{module}.weight").dequantize(dtype), weight), module


def test_hqq_is_recognized_by_its_tensors(tmp_path):
    """Its package writes no quantization_config."""
    path = write(tmp_path / "q", lambda _, weight: hqq_parts(weight, 4, 1, torch.float16, 0)[1], {})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    assert HQQ().recognizes(path)
    assert not SINQ().recognizes(path)
    (path / "model.safetensors").rename(path / "qmodel.pt")
    assert HQQ().recognizes(path)
    with pytest.raises(ReadError, match="never opened"):
        HQQ().open(path, skeleton())


def sinq(folder, method="sinq_quantAux", dtype=torch.bfloat16, architecture="dense", **about):
    """A folder as SINQ's package writes it, and what its weights stand for."""
    expected, beside = {}, {}

    def pack(module, weight):
        if ".experts." in module:
            return {}
        generator = torch.Generator().manual_seed(len(module))
        codes, zero, scale = table(weight, 4, 1, generator)
        t = (torch.rand(1, weight.shape[1], generator=generator) + 0.5).half()
        parts = {"W_q": packed(codes, 4), "meta.scale2": t}
        dense = {}
        for name, values, tile in (("scale", scale, 32), ("zero", zero, len(zero))):
            if "quantAux" not in method:
                dense[name] = parts[f"meta.{name}"] = values.half()
                continue
            values = values.view(tile, -1)
            low, step = values.amin(0, True), (values.amax(0, True) - values.amin(0, True)) / 255
            x, low, step = ((values - low) / step).round().to(torch.uint8), low.half(), step.half()
            parts |= {f"meta.{name}.x": x, f"meta.{name}.s": step, f"meta.{name}.m": low}
            dense[name] = (x * step + low).view(-1, 1)
        values = torch.tensor(NF4_LEVELS).half()[codes] if "nf4" in method else codes.to(dtype)
        values = ((values - dense["zero"]) * dense["scale"]).reshape(weight.shape) * t
        expected[module] = values if "nf4" in method else values.to(dtype)
        told = {"nbits": 4, "group_size": GROUP, "shape": list(weight.shape), "axis": 1, "method": method}
        beside[module] = {"meta": told | {"compute_dtype": str(dtype)} | about}
        return parts

    path = write(folder, pack, {"quant_method": "sinq"}, architecture)
    (path / "model.safetensors.index.json.meta.json").write_text(json.dumps(beside))
    return path, expected


@pytest.mark.parametrize("method", ["sinq_quantAux", "sinq_nogemlite", "sinq_nf4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sinq(tmp_path, method, dtype):
    path, expected = sinq(tmp_path / "q", method, dtype)
    assert SINQ().recognizes(path)
    assert not HQQ().recognizes(path)
    held = SINQ().open(path, skeleton())
    assert held.made_by == f"SINQ, {method.lower()} 4 bits g{GROUP}" or held.made_by.startswith("SINQ, sinq_quantAux")
    for module, weight in expected.items():
        read = held.read(f"{module}.weight").dequantize(weight.dtype)
        assert torch.equal(read, weight), module


def test_sinq_keeps_experts_as_they_were(tmp_path):
    path, expected = sinq(tmp_path / "q", architecture="moe")
    held = SINQ().open(path, skeleton("moe"))
    assert sum(entry.quantized for entry in held.entries.values()) == len(expected) == 8
    fused = build("moe", 0)[0].half().model.layers[1].mlp.experts.gate_up_proj[3]
    assert torch.equal(held.read("model.layers.1.mlp.experts.3.up_proj.weight"), fused.chunk(2)[1])


def test_experts_that_are_stored_fused(tmp_path):
    """SINQ's package saves the experts as transformers holds them."""
    path, _ = sinq(tmp_path / "q", architecture="moe")
    tensors, fused = load_file(path / "model.safetensors"), build("moe", 0)[0].half().state_dict()
    tensors = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
    save_file(tensors | {k: v for k, v in fused.items() if ".experts." in k}, path / "model.safetensors")
    held = SINQ().open(path, skeleton("moe"))
    whole = fused["model.layers.1.mlp.experts.gate_up_proj"][3]
    assert torch.equal(held.read("model.layers.1.mlp.experts.3.up_proj.weight"), whole.chunk(2)[1])
    down = "model.layers.1.mlp.experts.2.down_proj.weight"
    assert torch.equal(held.read(down), fused["model.layers.1.mlp.experts.down_proj"][2])
    assert held.entries[down].nbytes == 2 * held.read(down).numel()


def test_the_settings_beside_are_part_of_the_identity(tmp_path):
    path, _ = sinq(tmp_path / "q")
    assert path / "model.safetensors.index.json.meta.json" in File(path=str(path)).files()


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"nbits": 7}, "7 bits"),
        ({"axis": 2}, "axis 2"),
        ({"group_size": 0}, "groups of 0"),
        ({"group_size": 48}, "48"),
        ({"group_size": 64}, "numbers for"),
        ({"compute_dtype": "torch.int8"}, "int8"),
        ({"nbits": 2}, "not 4096 codes of 2 bits"),
        ({"shape": [1, 2]}, r"its shape is \[1, 2\], not"),
        ({"method": "sinq_nf3"}, "sinq_nf3"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, about, said):
    path, _ = sinq(tmp_path / "q", **about)
    with pytest.raises(ReadError, match=said):
        SINQ().open(path, skeleton()).read(f"{Q}.weight")


def test_without_the_settings_beside(tmp_path):
    path, _ = sinq(tmp_path / "q")
    (path / "model.safetensors.index.json.meta.json").unlink()
    with pytest.raises(ReadError, match=r"lacks model\.safetensors\.index\.json\.meta"):
        SINQ().open(path, skeleton())


class TestTable(FormatConformance):
    axis, nbits = 1, 4

    def make(self, generator, shape):
        group = shape[1] if self.axis == 1 else shape[0]
        count = shape[0] * shape[1] // group
        size = (count, group) if self.axis == 1 else (group, count)
        codes = pack_rows(torch.randint(0, 2**self.nbits, size, generator=generator), self.nbits)
        scale, zero = (torch.rand(count, generator=generator).half() for _ in range(2))
        return HQQWeight(shape, self.nbits, self.axis, group, "float16", codes, scale, zero, method="hqq")


class TestColumns(TestTable):
    axis, nbits = 0, 3


class TestNested(FormatConformance):
    def make(self, generator, shape):
        weight = TestTable().make(generator, shape)
        x = torch.randint(0, 256, (1, shape[0]), generator=generator, dtype=torch.uint8)
        step = torch.rand(1, shape[0], generator=generator).half() / 256
        more = {
            "scale_step": step,
            "scale_offset": step * 2,
            "input_scale": torch.rand(shape[1], generator=generator).half(),
        }
        return HQQWeight(shape, 4, 1, shape[1], "bfloat16", weight.codes, x, weight.zero, method="sinq", **more)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("nbits", "axis", "group"), [(4, 1, 64), (3, 1, 64), (2, 1, 16), (8, 1, None), (1, 1, 32), (4, 0, 64)]
)
def test_as_hqq_saves_and_decodes(tmp_path, nbits, axis, group):
    base = pytest.importorskip("hqq.models.hf.base")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = build("dense", 0)[0].half()
    config = BaseQuantizeConfig(nbits=nbits, group_size=group, axis=axis)
    base.AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float16, device="cpu")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    base.AutoHQQHFModel.save_to_safetensors(model, str(tmp_path / "q"))
    assert HQQ().recognizes(tmp_path / "q")
    held = HQQ().open(tmp_path / "q", skeleton())
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HQQLinear)}
    assert len(layers) == 14
    for name, module in layers.items():
        assert torch.equal(held.read(f"{name}.weight").dequantize(torch.float16), module.dequantize()), name


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", ["dense", "moe"])
@pytest.mark.parametrize("settings", [{"method": "sinq"}, {"method": "sinq", "nbits": 3, "group_size": 32}])
def test_as_transformers_saves_with_sinq_and_the_package_decodes(tmp_path, monkeypatch, architecture, settings):
    monkeypatch.setenv("SINQ_AUTO_PATCH", "0")
    package = pytest.importorskip("sinq.patch_model")
    from transformers import AutoModelForCausalLM, PreTrainedModel
    from transformers.utils.quantization_config import SinqConfig

    for name in ("save_pretrained", "from_pretrained", "push_to_hub"):  # the package replaces them while it loads
        monkeypatch.setattr(PreTrainedModel, name, PreTrainedModel.__dict__.get(name, getattr(PreTrainedModel, name)))
    build(architecture, 0)[0].save_pretrained(tmp_path / "plain")
    config = SinqConfig(**{"nbits": 4, "group_size": 64} | settings)
    how = dict(dtype=torch.bfloat16, device_map="cpu", quantization_config=config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **how)
    package.AutoSINQHFModel.save_quantized_safetensors(model, None, str(tmp_path / "q"), write_tokenizer=False)
    held = SINQ().open(tmp_path / "q", skeleton(architecture))
    loaded = package.AutoSINQHFModel.from_quantized_safetensors(str(tmp_path / "q"), torch.bfloat16, device="cpu")
    layers = {name: module for name, module in loaded.named_modules() if type(module).__name__ == "SINQLinear"}
    assert len(layers) == sum(entry.quantized for entry in held.entries.values()) > 7
    for name, module in layers.items():
        expected = module.dequantize()
        assert torch.equal(held.read(f"{name}.weight").dequantize(expected.dtype), expected), name
