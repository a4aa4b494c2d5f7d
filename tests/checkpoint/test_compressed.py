"""compressed-tensors' format: unpacked by its own library, loaded by transformers, and refused where it cannot hold."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qbench.checkpoint import compressed
from qbench.errors import RequestError
from qbench.format.blockfloat import NVFP4Weight
from qbench.layers.linear import QuantLinear
from qbench.passes.quantize import quantize_model
from qbench.readers.file import reader_of
from qbench.registry import EXPORTER, make, make_quantizer
from qbench.sources.tiny import build
from qbench.testing import gaussian, statistics_of
from tests.conftest import refused
from tests.model.test_layouts import gpt_oss, llama4

INTEGERS = [
    {"name": name, "nbits": nbits, "group_size": group_size, "symmetric": symmetric}
    for name in ("rtn", "gptq")
    for nbits in (4, 8)
    for group_size in (32, 64, 128, -1)
    for symmetric in (False, True)
]
FLOATS = [
    *({"name": "fp8", "scale": scale} for scale in ("tensor", "channel", "block")),
    *({"name": name} for name in ("mxfp8", "mxfp4", "nvfp4")),
]


def called(settings):
    return "-".join(map(str, settings.values())) if isinstance(settings, dict) else None


def quantized(settings, rows=96, columns=256):
    quantizer = make_quantizer(settings)
    inputs = gaussian(300, columns, seed=1)
    [made] = quantizer.quantize([gaussian(rows, columns)], statistics_of(inputs, quantizer.needs))
    return made


@pytest.mark.parametrize("settings", [*INTEGERS, {"name": "rtn", "nbits": 3}, *FLOATS], ids=called)
def test_its_own_library_decodes_the_same_weights(settings):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weight = quantized(settings)
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], **compressed.scheme(weight)})
    decoder = BaseCompressor.get_value_from_registry(scheme.format)
    for scale_dtype in ("stored", "fp32"):
        parts = compressed.parts(weight, scale_dtype)
        assert parts.keys() == set(decoder.compression_param_names(scheme))
        dense = decoder.decompress(parts, scheme)["weight"]
        assert torch.equal(dense, weight.dequantize(dense.dtype))


def model_of(settings, architecture="dense"):
    model, tokenizer = build(architecture, 0)
    model.eval().requires_grad_(False)
    quantize_model(model, make_quantizer(settings))
    return model, tokenizer


def loaded(folder, dtype=torch.float32, **config):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    given = {"quantization_config": CompressedTensorsConfig(**config)} if config else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given).eval().requires_grad_(False)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(64)[None]).logits


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({"name": "rtn", "nbits": 4, "group_size": 32, "symmetric": True}, {}),
        ({"name": "rtn", "nbits": 4, "group_size": 64, "symmetric": True}, {"dequantize": True}),
        ({"name": "rtn", "nbits": 8, "group_size": -1, "symmetric": True}, {}),
        ({"name": "rtn", "nbits": 4, "group_size": 32}, {"dequantize": True}),
        *(({"name": "fp8", "scale": scale}, {}) for scale in ("tensor", "channel", "block")),
        ({"name": "mxfp8"}, {"dequantize": True}),
        ({"name": "mxfp4"}, {"dequantize": True}),
    ],
    ids=called,
)
def test_transformers_computes_the_packed_models_logits(tmp_path, settings, config):
    model, tokenizer = model_of(settings)
    scale_dtype = "fp32" if config.get("dequantize") else "stored"
    compressed.save(model, tokenizer, tmp_path / "a", scale_dtype=scale_dtype)
    torch.testing.assert_close(logits(loaded(tmp_path / "a", **config)), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"name": "mxfp8"}, {"name": "mxfp4"}, {"name": "nvfp4"}], ids=called)
def test_a_model_in_bf16_is_loaded_as_it_is(tmp_path, settings):
    model, tokenizer = model_of(settings)
    model.bfloat16().model.rotary_emb = build("dense", 0)[0].model.rotary_emb  # whose frequencies stay in fp32
    compressed.save(model, tokenizer, tmp_path / "a")
    assert torch.equal(logits(loaded(tmp_path / "a", dtype=torch.bfloat16)), logits(model))


@pytest.mark.parametrize(
    ("settings", "precision"),
    [({"name": "rtn", "nbits": 4, "group_size": 32}, torch.float16), ({"name": "nvfp4"}, torch.bfloat16)],
    ids=["asymmetric", "nvfp4"],
)
def test_what_transformers_computes_in_16_bit_is_ours_rounded_to_them(tmp_path, settings, precision):
    model, tokenizer = model_of(settings)
    compressed.save(model, tokenizer, tmp_path / "a")
    found = loaded(tmp_path / "a", dequantize=True)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert torch.equal(found.get_submodule(name).weight, module.quantized.dequantize(precision).float()), name


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "rtn", "nbits": 4, "group_size": 32},
        {"name": "rtn", "nbits": 8, "group_size": -1},
        {"name": "rtn", "nbits": 4, "group_size": 64, "symmetric": True},
        *FLOATS,
    ],
    ids=called,
)
@pytest.mark.parametrize("scale_dtype", ["stored", "fp32"])
def test_read_back_it_is_the_packed_model_to_the_bit(tmp_path, settings, scale_dtype):
    model, tokenizer = model_of(settings)
    compressed.save(model, tokenizer, tmp_path / "a", scale_dtype=scale_dtype)
    kind, reader = reader_of(tmp_path / "a")
    assert kind == "compressed-tensors"
    held = reader.open(tmp_path / "a", build("dense", 0)[0].to("meta"))
    assert not held.ignored
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert torch.equal(held.read(f"{name}.weight").dequantize(), module.quantized.dequantize()), name
    for name, parameter in model.named_parameters():
        assert torch.equal(held.read(name), parameter), name


@pytest.mark.parametrize(
    "settings",
    [{"name": "rtn", "nbits": 4, "group_size": 32, "symmetric": True}, {"name": "fp8"}, {"name": "mxfp4"}],
    ids=called,
)
def test_experts_are_written_one_by_one(tmp_path, settings):
    model, tokenizer = model_of(settings, "moe")
    compressed.save(model, tokenizer, tmp_path / "a", scale_dtype="fp32")
    said = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"} == set(said["ignore"])
    held = reader_of(tmp_path / "a")[1].open(tmp_path / "a", build("moe", 0)[0].to("meta"))
    experts = model.model.layers[1].mlp.experts
    for projection in experts.projections:
        stack = getattr(experts, projection).quantized.dequantize()
        for index, dense in enumerate(stack):
            name = f"model.layers.1.mlp.experts.{index}.{projection}.weight"
            assert torch.equal(held.read(name).dequantize(), dense), name
    if settings["name"] != "mxfp4":  # whose experts transformers does not load
        found = logits(loaded(tmp_path / "a", dequantize=True))
        torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"name": "gptq", "group_size": 64}, {"name": "nvfp4"}], ids=called)
def test_read_back_it_measures_the_same(qbench, tmp_path, settings):
    point = ["model=tiny-dense", "task.max_windows=2", f"quantizer={settings['name']}"]
    point += [f"quantizer.{key}={value}" for key, value in settings.items() if key != "name"]
    ours = qbench(*point, f"export.dir={tmp_path / 'a'}", "export.format=compressed-tensors")
    assert ours.status == 0, ours.stderr
    file = qbench(*point[:2], "quantizer=file", f"quantizer.path={tmp_path / 'a'}")
    assert file.status == 0, file.stderr
    measures = ("ppl", "kl", "kl_reverse", "kl_p99", "top1_agreement", "true_token_rms_change")
    one, other = ([outcome.summary[key] for key in measures] for outcome in (ours, file))
    assert one == other
    assert ours.summary["quantizer"] != file.summary["quantizer"]


def test_layers_that_differ_have_config_groups_of_their_own(tmp_path):
    model, tokenizer = model_of({"name": "rtn", "nbits": 4, "group_size": 64, "symmetric": True})
    other = make_quantizer({"name": "fp8"})
    plain, _ = build("dense", 0)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        parent, _, child = name.rpartition(".")
        weight = plain.get_submodule(name).weight.detach()
        setattr(model.get_submodule(parent), child, QuantLinear(other.quantize_one(weight)))
    compressed.save(model, tokenizer, tmp_path / "a", max_shard_bytes=20_000)
    said = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert said["format"] == "mixed-precision"
    assert [len(group["targets"]) for group in said["config_groups"].values()] == [12, 2]
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits(loaded(tmp_path / "a")), logits(model), rtol=0, atol=1e-5)


def test_what_the_folder_says(tmp_path):
    model, tokenizer = model_of({"name": "rtn", "nbits": 4, "group_size": 64, "symmetric": True})
    compressed.save(model, tokenizer, tmp_path / "a", origin={"run_id": "r1"})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    said = config["quantization_config"]
    assert config["dtype"] == "float32"
    assert said["ignore"] == ["lm_head"]
    [group] = said["config_groups"].values()
    assert (group["targets"], group["weights"]["strategy"], group["weights"]["group_size"]) == (["Linear"], "group", 64)
    held = load_file(tmp_path / "a" / "model.safetensors")
    assert not any(name.endswith("_proj.weight") for name in held)
    assert list(held["model.layers.0.mlp.down_proj.weight_packed"].shape) == [64, 24]
    with pytest.raises(RequestError, match="another point"):
        make(EXPORTER, {"format": "compressed-tensors"}).check_target(tmp_path / "a", "r2")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "sinq"}, ["input scale t", "export.format=packed"]),
        ({"name": "awq"}, ["input scale t", "export.format=packed"]),
        ({"name": "nf4"}, ["codebook", "export.format=packed"]),
        ({"name": "hqq"}, ["zero points are not integers"]),
        ({"name": "rtn", "aux_dtype": "int8"}, ["aux_dtype=fp16"]),
        ({"name": "gptq", "static_groups": False}, ["act-order", "static_groups=true"]),
    ],
    ids=called,
)
def test_a_method_that_it_cannot_hold_is_refused_before_anything_runs(settings, words):
    reason = make(EXPORTER, {"format": "compressed-tensors"}).refuse(make_quantizer(settings))
    assert reason is not None
    assert all(word in reason for word in words), reason


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "rtn", "group_size": 48}, ["model.layers.0.self_attn.q_proj", "64 input channels", "48"]),
        ({"name": "gptq", "group_size": 48}, ["model.layers.0.self_attn.q_proj", "64 input channels", "48"]),
    ],
    ids=called,
)
def test_a_layer_that_it_cannot_hold_is_named(tiny, settings, words):
    reason = make(EXPORTER, {"format": "compressed-tensors"}).refuse_model(tiny[0], make_quantizer(settings))
    assert reason is not None
    assert all(word in reason for word in words), reason
    for fits in ({"name": "rtn", "group_size": 256}, {"name": "nvfp4"}, {"name": "fp8", "scale": "block"}):
        assert make(EXPORTER, {"format": "compressed-tensors"}).refuse_model(tiny[0], make_quantizer(fits)) is None


def test_experts_without_names_and_ragged_blocks_are_refused(tmp_path):
    exporter = make(EXPORTER, {"format": "compressed-tensors"})
    mixture, _ = build("moe", 0)
    assert exporter.refuse_model(mixture, make_quantizer({"name": "fp8"})) is None
    assert "experts.*.down_proj" in exporter.refuse_model(mixture, make_quantizer({"name": "rtn", "group_size": 64}))
    for fused in (gpt_oss(), llama4()):
        assert "experts" in exporter.refuse_model(fused, make_quantizer({"name": "fp8"}))
    quantize_model(fused.eval().requires_grad_(False), make_quantizer({"name": "fp8"}))
    with pytest.raises(RequestError, match="experts"):
        compressed.save(fused, None, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    for name, columns in (("mxfp4", 80), ("mxfp8", 80), ("nvfp4", 72)):
        weight = quantized({"name": name}, columns=columns)
        assert f"{columns} input channels" in compressed.shape_refusal(weight, columns, weight.group_size)
    weight = quantized({"name": "nvfp4"})
    assert "divides" in compressed.format_refusal(replace(weight, global_divides=False))
    assert isinstance(weight, NVFP4Weight)
    assert compressed.format_refusal(weight) is None


def test_a_zero_point_outside_of_the_codes_is_named(tmp_path):
    model, tokenizer = build("dense", 0)
    model.eval().requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight += 10
    quantize_model(model, make_quantizer({"name": "rtn", "group_size": 32}))
    with pytest.raises(RequestError, match=r"model\.layers\.1\.mlp\.up_proj.*symmetric=true"):
        compressed.save(model, tokenizer, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_from_the_command_line(qbench, tmp_path):
    point = ["model=tiny-dense", "quantizer=rtn", "quantizer.group_size=32", f"export.dir={tmp_path / 'a'}"]
    outcome = qbench(*point, "export.format=compressed-tensors", "+export.scale_dtype=fp64")
    refused(outcome, names=["scale_dtype", "stored", "fp32"])
    outcome = qbench(*point, "export.format=compressed-tensors", "quantizer=sinq")
    refused(outcome, names=["export.format=compressed-tensors", "input scale t", "export.format=packed"])
    outcome = qbench(*point, "export.format=compressed-tensors", "+export.scale_dtype=fp32")
    assert outcome.status == 0, outcome.stderr
    origin = json.loads((tmp_path / "a" / compressed.ORIGIN).read_text())["origin"]
    assert origin["run_id"] == outcome.summary["run_id"]
