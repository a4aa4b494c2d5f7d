"""compressed-tensors' folders: what the package packs is read as the package unpacks it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qbench.readers.compressed import CompressedTensors
from qbench.readers.reader import ReadError
from tests.readers.cases import skeleton, write

compressors = pytest.importorskip("compressed_tensors.compressors")
quantization = pytest.importorskip("compressed_tensors.quantization")

Q = "model.layers.0.self_attn.q_proj"
CASES = {
    "int4 g32": dict(num_bits=4, strategy="group", group_size=32, symmetric=True),
    "int4 g32, asymmetric": dict(num_bits=4, strategy="group", group_size=32, symmetric=False),
    "int4, channels": dict(num_bits=4, strategy="channel", symmetric=False),
    "int3 g64": dict(num_bits=3, strategy="group", group_size=64, symmetric=True),
    "int2 g32": dict(num_bits=2, strategy="group", group_size=32, symmetric=False),
    "int8, channels": dict(num_bits=8, strategy="channel", symmetric=True),
    "int8, a tensor": dict(num_bits=8, strategy="tensor", symmetric=True),
}


def scheme(arguments):
    return quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**arguments))


def compressor(kind):
    return compressors.BaseCompressor.get_value_from_registry(kind)


def packer(kind, arguments, decoded, dtype=torch.bfloat16):
    """Packs with the package, scales by the largest value of each group; `decoded` is filled with what it unpacks."""

    def pack(module, weight):
        weight, rows = weight.to(dtype), len(weight)
        width = {"group": arguments.get("group_size"), "channel": weight.shape[1], "tensor": weight.numel()}
        blocks = weight.reshape(-1, width[arguments["strategy"]])
        top = 2 ** (arguments["num_bits"] - 1)
        scale = (
            (blocks.abs().amax(1) / (top - 0.5)).reshape(rows, -1)
            if len(blocks) > 1
            else blocks.abs().max()[None] / top
        )
        state = {"weight": weight, "weight_scale": scale}
        generator = torch.Generator().manual_seed(len(module))
        if not arguments["symmetric"]:
            state["weight_zero_point"] = torch.randint(-top, top, scale.shape, generator=generator).to(torch.int8)
        packed = compressor(kind).compress(state, scheme(arguments))
        decoded[module] = compressor(kind).decompress(packed, scheme(arguments))["weight"]
        return packed

    return pack


def config(kind, arguments, **more):
    group = {"targets": ["Linear"], "weights": {"type": "int"} | arguments}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}, **more}


@pytest.mark.parametrize("kind", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("case", CASES)
def test_as_the_package_decodes_it(tmp_path, kind, case):
    decoded, arguments = {}, CASES[case]
    path = write(tmp_path / "q", packer(kind, arguments, decoded), config(kind, arguments, ignore=["lm_head"]))
    assert CompressedTensors().recognizes(path)
    held = CompressedTensors().open(path, skeleton())
    assert held.made_by.startswith(f"compressed-tensors, int{arguments['num_bits']} ")
    assert len(decoded) == 14
    for module, weight in decoded.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(held.read(f"{module}.weight").dequantize(torch.bfloat16), weight), module


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_of_other_types(tmp_path, dtype):
    decoded, arguments = {}, CASES["int4 g32, asymmetric"]
    path = write(
        tmp_path / "q", packer("pack-quantized", arguments, decoded, dtype), config("pack-quantized", arguments)
    )
    held = CompressedTensors().open(path, skeleton())
    assert torch.equal(held.read(f"{Q}.weight").dequantize(dtype), decoded[Q])


def test_act_order(tmp_path):
    """Scales go by g_idx, -1 of which means that there is none."""
    decoded, expected, arguments = {}, {}, CASES["int4 g32"]
    inner = packer("pack-quantized", arguments, decoded, torch.float16)

    def pack(module, weight):
        parts, columns = inner(module, weight), weight.shape[1]
        g_idx = torch.full((columns,), -1)
        if module == Q:
            g_idx = (torch.arange(columns) // 32)[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
            scale = parts["weight_scale"]
            codes = (decoded[module].unflatten(1, (-1, 32)) / scale.unsqueeze(-1)).flatten(1).round()
            expected[module] = codes * scale[:, g_idx]
        return parts | {"weight_g_idx": g_idx.int()}

    held = CompressedTensors().open(write(tmp_path / "q", pack, config("pack-quantized", arguments)), skeleton())
    for module, weight in (decoded | expected).items():
        assert torch.equal(held.read(f"{module}.weight").dequantize(torch.float16), weight), module


def test_every_module_goes_by_its_own_group(tmp_path):
    """A name or a pattern goes before a class; activations' scales are left aside with a reason."""
    decoded, kinds = {}, {"q_proj": "int8, channels", "down_proj": "int4, channels"}

    def pack(module, weight):
        last = module.rpartition(".")[2]
        if last == "o_proj":
            return {}
        arguments = CASES[kinds.get(last, "int4 g32")]
        kind = "int-quantized" if last == "q_proj" else "pack-quantized"
        more = {"input_scale": torch.ones(1)} if last == "q_proj" else {}
        return packer(kind, arguments, decoded)(module, weight) | more

    settings = config("pack-quantized", CASES["int4 g32"])
    settings["config_groups"] |= {
        "group_1": {"targets": [r"re:.*q_proj$"], "format": "int-quantized", "weights": CASES["int8, channels"]},
        "group_2": {"targets": [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)], "weights": CASES["int4, channels"]},
    }
    held = CompressedTensors().open(write(tmp_path / "q", pack, settings), skeleton())
    for module, weight in decoded.items():
        assert torch.equal(held.read(f"{module}.weight").dequantize(torch.bfloat16), weight), module
    assert held.made_by == "compressed-tensors, int4 g192, int4 g32, int8 g64"
    assert "stay in 16 bits" in held.ignored[f"{Q}.input_scale"]
    assert not held.entries["model.layers.0.self_attn.o_proj.weight"].quantized


def test_classes(tmp_path):
    """Embeddings and linears by groups of their own, each in another number of bits."""
    decoded = {}
    linears = packer("pack-quantized", CASES["int4 g32"], decoded)
    path = write(tmp_path / "q", linears, config("pack-quantized", CASES["int4 g32"]))
    tensors, name = load_file(path / "model.safetensors"), "model.embed_tokens"
    parts = packer("int-quantized", CASES["int8, channels"], decoded)(name, tensors.pop(f"{name}.weight"))
    save_file(tensors | {f"{name}.{part}": value for part, value in parts.items()}, path / "model.safetensors")
    about = json.loads((path / "config.json").read_text())
    group = {"targets": ["Embedding"], "format": "int-quantized", "weights": CASES["int8, channels"]}
    about["quantization_config"]["config_groups"]["group_1"] = group
    (path / "config.json").write_text(json.dumps(about))
    held = CompressedTensors().open(path, skeleton())
    assert held.entries[f"{name}.weight"].kind == "int8 g64"
    for module, weight in decoded.items():
        assert torch.equal(held.read(f"{module}.weight").dequantize(torch.bfloat16), weight), module


@pytest.fixture
def edited(tmp_path):
    def make(edit=lambda tensors: tensors, **settings):
        arguments = CASES["int4 g32, asymmetric"]
        path = write(
            tmp_path / "q", packer("pack-quantized", arguments, {}), config("pack-quantized", arguments) | settings
        )
        save_file(edit(load_file(path / "model.safetensors")), path / "model.safetensors")
        return path

    return make


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "marlin-24"}, "stored as marlin-24"),
        ({"config_groups": {}}, "no config_groups"),
        ({"config_groups": {"a": 3}}, "no list of targets"),
        ({"config_groups": {"a": {"targets": ["re:(x+)+y"], "weights": {}}}}, "no pattern to be matched"),
        ({"config_groups": {"a": {"targets": ["re:(x"], "weights": {}}}}, "no pattern to be matched"),
        (
            {"config_groups": {"a": {"targets": ["re:y"], "weights": {"num_bits": 4}}}},
            "no group of the quantization_config",
        ),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    ],
)
def test_settings_that_are_not_known(edited, settings, said):
    with pytest.raises(ReadError) as error:
        CompressedTensors().open(edited(**settings), skeleton())
    assert said in str(error.value)


def test_parts_that_do_not_fit(edited):
    path = edited(lambda t: {k: v for k, v in t.items() if k != f"{Q}.weight_zero_point"})
    with pytest.raises(ReadError, match=f"{Q}.*weight_zero_point"):
        CompressedTensors().open(path, skeleton()).read(f"{Q}.weight")
    path = edited(lambda t: t | {f"{Q}.weight_shape": torch.tensor([64, 63])})
    with pytest.raises(ReadError, match="weight_shape"):
        CompressedTensors().open(path, skeleton()).read(f"{Q}.weight")
    assert json.loads((path / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
