"""Folders of block floats: what transformers and compressed-tensors decode, and what is refused in one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qbench.format.blockfloat import FP8Weight, MXFP4Weight, NVFP4Weight
from qbench.quant.blockfloat import round_to_fp8, round_to_mxfp4, round_to_mxfp8, round_to_nvfp4
from qbench.readers.blockfloat import FP8
from qbench.readers.compressed import CompressedTensors
from qbench.readers.file import reader_of
from qbench.readers.mxfp4 import MXFP4
from qbench.readers.reader import ReadError
from tests.model.test_layouts import gpt_oss
from tests.readers.cases import skeleton, write

Q = "model.layers.0.self_attn.q_proj"
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def loaded(path):
    """The folder as transformers loads it on a CPU: dequantized."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def check(held, model, count, skip=()):
    """Every weight of the open folder is what transformers has made of it."""
    quantized = [name for name, entry in held.entries.items() if entry.quantized]
    assert len(quantized) == count
    for name in quantized:
        weight = held.read(name)
        assert held.entries[name].shape == weight.shape
        assert held.entries[name].nbytes == weight.nbytes
        assert torch.equal(weight.dequantize(), model.get_parameter(name)), name


def deepseek(module, weight, block=(32, 32), dtype=torch.float32):
    made = round_to_fp8(weight.float(), block)
    return {"weight": made.codes.view(E4M3), "weight_scale_inv": made.scale.to(dtype)}


@pytest.mark.parametrize("architecture", ["dense", "moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, E8M0])
def test_block_fp8_as_transformers_loads_it(tmp_path, architecture, dtype):
    said = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    path = write(tmp_path / "q", lambda m, w: deepseek(m, w, dtype=dtype), said, architecture)
    assert reader_of(path)[0] == "fp8"
    held = FP8().open(path, skeleton(architecture))
    assert held.made_by == "FP8, fp8 32x32"
    assert not held.ignored
    if architecture == "dense":
        return check(held, loaded(path), 14)
    stored, quantized = load_file(path / "model.safetensors"), [n for n, e in held.entries.items() if e.quantized]
    assert len(quantized) > 14
    for name in quantized:
        made = held.read(name)
        assert torch.equal(made.codes.view(E4M3).float(), stored[name].float()), name


def test_blocks_that_end_early(tmp_path):
    said = {"quant_method": "fp8", "weight_block_size": [128, 48]}
    held = FP8().open(write(tmp_path / "q", lambda m, w: deepseek(m, w, (128, 48)), said), skeleton())
    stored = load_file(tmp_path / "q" / "model.safetensors")
    made = held.read(f"{Q}.weight")
    expected = stored[f"{Q}.weight"].float() * stored[f"{Q}.weight_scale_inv"].repeat_interleave(48, 1)[:, :64]
    assert made.block == (128, 48)
    assert torch.equal(made.dequantize(), expected)


def test_other_scales_of_fp8(tmp_path):
    """One number a tensor (ModelOpt), one a row (FBGEMM), and MXFP8."""

    def a_tensor(module, weight):
        made = round_to_fp8(weight.float(), tuple(weight.shape))
        return {"weight": made.codes.view(E4M3), "weight_scale": made.scale.view(()), "input_scale": torch.ones(())}

    def a_row(module, weight):
        made = round_to_fp8(weight.float(), (1, weight.shape[1]))
        return {"weight": made.codes.view(E4M3), "weight_scale": made.scale, "input_scale_ub": torch.ones(1)}

    def mx(module, weight):
        made = round_to_mxfp8(weight.float(), "floor")
        return {"weight": made.codes.view(E4M3), "weight_scale_inv": made.scale}

    for number, (pack, said, made_by) in enumerate(
        (
            (a_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}, "ModelOpt, fp8 a scale a tensor"),
            (a_row, {"quant_method": "fbgemm_fp8"}, "FBGEMM FP8, fp8 a scale a row"),
            (mx, {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, "FP8, mxfp8 g32"),
        )
    ):
        path = write(tmp_path / f"q{number}", pack, said)
        held, stored = FP8().open(path, skeleton()), load_file(path / "model.safetensors")
        assert held.made_by == made_by
        assert set(held.ignored) == {name for name in stored if "input_scale" in name}
        weight = held.read(f"{Q}.weight")
        assert isinstance(weight, FP8Weight)
        [scale] = [stored[name] for name in stored if name.startswith(f"{Q}.weight_scale")]
        scale = torch.exp2(scale.float() - 127).repeat_interleave(32, 1) if scale.dtype == torch.uint8 else scale
        assert torch.equal(weight.dequantize(), stored[f"{Q}.weight"].float() * scale)


def modelopts_nvfp4(folder):
    """A folder as ModelOpt's older ones are: how it is quantized is said in a file of its own."""

    def pack(module, weight):
        made = round_to_nvfp4(weight.float(), float(weight.abs().max()))
        return {
            "weight": made.codes,
            "weight_scale": made.scale.view(E4M3),
            "weight_scale_2": made.global_scale.reciprocal().view(()),
            "input_scale": torch.ones(()),
        }

    path = write(folder, pack, {})
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    told = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (path / "hf_quant_config.json").write_text(json.dumps(told))
    return path


def test_modelopts_nvfp4(tmp_path):
    path = modelopts_nvfp4(tmp_path / "q")
    assert reader_of(path)[0] == "fp8"
    held, stored = FP8().open(path, skeleton()), load_file(path / "model.safetensors")
    assert held.made_by == "ModelOpt, nvfp4"
    weight = held.read(f"{Q}.weight")
    assert isinstance(weight, NVFP4Weight)
    scale = stored[f"{Q}.weight_scale"].float() * stored[f"{Q}.weight_scale_2"]
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = stored[f"{Q}.weight"]
    values = torch.stack([levels[(codes & 15).long()], levels[(codes >> 4).long()]], -1).flatten(1)
    assert torch.equal(weight.dequantize(), values * scale.repeat_interleave(16, 1))


def mxfp4_stacks(folder):
    """A tiny gpt-oss as it is published: its experts in MXFP4, upright."""
    torch.manual_seed(0)
    gpt_oss().bfloat16().save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            made = [round_to_mxfp4(expert.T.contiguous(), "floor") for expert in tensor]
            tensors[f"{name}_blocks"] = torch.stack([one.codes.unflatten(1, (-1, 16)) for one in made])
            tensors[f"{name}_scales"] = torch.stack([one.scale for one in made])
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return folder


def test_gpt_oss_as_transformers_loads_it(tmp_path):
    mxfp4_stacks(tmp_path)
    assert reader_of(tmp_path)[0] == "mxfp4"
    held = MXFP4().open(tmp_path, gpt_oss().to("meta"))
    assert held.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    reference = loaded(tmp_path)
    for layer, block in enumerate(reference.model.layers):
        for index in range(4):
            first = block.mlp.experts.gate_up_proj[index]
            place = f"model.layers.{layer}.mlp.experts.{index}"
            expected = {"gate": first[:, ::2].T, "up": first[:, 1::2].T, "down": block.mlp.experts.down_proj[index].T}
            for projection, dense in expected.items():
                weight = held.read(f"{place}.{projection}_proj.weight")
                assert isinstance(weight, MXFP4Weight)
                assert weight.bits_per_weight == 4.25
                assert held.entries[f"{place}.{projection}_proj.weight"].nbytes == weight.nbytes
                assert torch.equal(weight.dequantize(), dense)
    bias = "model.layers.0.mlp.experts.down_proj_bias"
    assert torch.equal(held.read(bias), load_file(tmp_path / "model.safetensors")[bias])


GROUPS = {
    "tensor": ("naive-quantized", {"num_bits": 8, "strategy": "tensor"}, "fp8 a scale a tensor"),
    "channel": ("float-quantized", {"num_bits": 8, "strategy": "channel"}, "fp8 a scale a row"),
    "block": ("float-quantized", {"num_bits": 8, "strategy": "block", "block_structure": [32, 48]}, "fp8 32x48"),
    "group": ("naive-quantized", {"num_bits": 8, "strategy": "group", "group_size": 16}, "fp8 g16"),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}, "mxfp8 g32"),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, "mxfp4"),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}, "nvfp4"),
}


def made(name, weight):
    if name in ("mxfp8", "mxfp4"):
        return {"mxfp8": round_to_mxfp8, "mxfp4": round_to_mxfp4}[name](weight, "even")
    if name == "nvfp4":
        return round_to_nvfp4(weight, float(weight.abs().max()))
    rows, columns = weight.shape
    block = {"tensor": (rows, columns), "channel": (1, columns), "block": (32, 48), "group": (1, 16)}[name]
    return round_to_fp8(weight, block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GROUPS)
def test_floats_as_compressed_tensors_decodes_them(tmp_path, name, dtype):
    from tests.readers.test_compressed import compressor, quantization

    kind, arguments, told = GROUPS[name]
    if kind.startswith("mx"):
        arguments = arguments | {"scale_dtype": torch.uint8}
    if name == "nvfp4":
        arguments = arguments | {"scale_dtype": E4M3}
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(type="float", symmetric=True, **arguments)
    )
    decoded = {}

    def pack(module, weight):
        ours = made(name, weight.float())
        parts = {"weight_scale": ours.scale, "weight_packed": ours.codes}
        if isinstance(ours, FP8Weight):
            parts = {"weight_scale": ours.scale if ours.scale.dtype == torch.uint8 else ours.scale.to(dtype)}
            parts["weight"] = ours.codes.view(E4M3)
            if name == "tensor":
                parts["weight_scale"] = parts["weight_scale"].view(1)
        if isinstance(ours, NVFP4Weight):
            parts |= {"weight_scale": ours.scale.view(E4M3), "weight_global_scale": ours.global_scale.view(1)}
        decoded[module] = compressor(kind).decompress(parts, scheme)["weight"]
        return parts

    weights = {"type": "float", "symmetric": True} | GROUPS[name][1]
    group = {"targets": ["Linear"], "weights": weights, "format": None}
    said = {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}
    held = CompressedTensors().open(write(tmp_path / "q", pack, said), skeleton())
    assert held.made_by == f"compressed-tensors, {told}"
    for module, dense in decoded.items():
        weight = held.read(f"{module}.weight")
        assert torch.equal(weight.dequantize(dense.dtype), dense), module
        assert held.entries[f"{module}.weight"].nbytes == weight.nbytes


def damage(part, change):
    def pack(module, weight):
        parts = deepseek(module, weight)
        if module == Q:
            parts[part] = change(parts[part])
        return parts

    return pack


def with_nan(tensor):
    tensor = tensor.clone().view(torch.uint8) if tensor.dtype == E4M3 else tensor.clone()
    tensor[0, 0] = 127 if tensor.dtype == torch.uint8 else torch.nan
    return tensor.view(E4M3) if tensor.dtype == torch.uint8 else tensor


@pytest.mark.parametrize(
    ("pack", "said", "words"),
    [
        (damage("weight_scale_inv", lambda t: t[:, :1].repeat(1, 3)), {}, "do not divide a weight"),
        (damage("weight_scale_inv", lambda t: t.long()), {}, "int64"),
        (damage("weight", lambda t: t.view(torch.uint8)), {}, "uint8"),
        (damage("weight", lambda t: t[:32]), {}, "shape"),
        (damage("weight", with_nan), {}, "a code is not a finite number"),
        (damage("weight_scale_inv", with_nan), {}, "a scale is not a finite number"),
        (deepseek, {"weight_block_size": [0, 128]}, "weight_block_size"),
        (deepseek, {"weight_block_size": "all"}, "weight_block_size"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, pack, said, words):
    path = write(tmp_path / "q", pack, {"quant_method": "fp8", "weight_block_size": [32, 32]} | said)
    with pytest.raises(ReadError, match=words) as caught:
        FP8().open(path, skeleton()).read(f"{Q}.weight")
    assert "\n" not in str(caught.value)
    assert Q in str(caught.value) or "weight_block_size" in str(caught.value)
