"""GPTQ's and AWQ's folders: every tensor as the formats' own decoders give it, and whatever is wrong in a sentence."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from qbench.checkpoint import autogptq
from qbench.format.mixed import Mixed
from qbench.format.plain import Plain
from qbench.format.weight import QuantizedWeight
from qbench.layers.linear import QuantLinear
from qbench.model.linears import find_linears, replace_module
from qbench.readers.awq import AWQ
from qbench.readers.gptq import GPTQ
from qbench.readers.reader import ReadError
from qbench.registry import make_quantizer
from qbench.sources.tiny import build
from qbench.testing import statistics_of
from tests.readers.cases import skeleton, write

GROUP = 32


def random_parts(module, weight, nbits, groups, seed=0):
    """Codes `[out, in]`, zero points and scales `[out, groups]` of no weight in particular."""
    generator = torch.Generator().manual_seed(seed + len(module))
    rows, columns = weight.shape
    codes = torch.randint(0, 2**nbits, (rows, columns), generator=generator)
    zero = torch.randint(0, 2**nbits, (rows, groups), generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) / 10 + 1e-4).half()
    return codes, zero, scale


def bits_of(values, nbits):
    """`[n, m]` as a stream along the first dimension, bit by bit, in int32 words."""
    bits = torch.stack([(values >> b) & 1 for b in range(nbits)], 1).flatten(0, 1)  # [n * nbits, m]
    bits = torch.nn.functional.pad(bits, (0, 0, 0, -len(bits) % 32)).unflatten(0, (-1, 32))
    words = sum(bits[:, b].long() << b for b in range(32))
    return torch.where(words >= 2**31, words - 2**32, words).int()


@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize("order", [False, True])
def test_gptq(tmp_path, nbits, v1, order):
    """Against the published formula, in fp16: scales[g_idx] * (code - zero[g_idx])."""
    expected = {}

    def pack(module, weight):
        if module.endswith("o_proj"):
            return {}  # a mixture of types is the rule
        _rows, columns = weight.shape
        groups = columns // GROUP
        codes, zero, scale = random_parts(module, weight, nbits, groups)
        if v1 and nbits == 4:
            zero[0, 0] = 0  # stored as -1, which is 15
        g_idx = torch.arange(columns) // GROUP
        if order:
            g_idx = g_idx[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
        expected[module] = scale[:, g_idx] * (codes - zero[:, g_idx])
        stored = (zero - int(v1)) & (2**nbits - 1)
        return {
            "qweight": bits_of(codes.T, nbits),
            "qzeros": bits_of(stored, nbits).T,
            "scales": scale.T,
            "g_idx": g_idx.int(),
        }

    config = {"quant_method": "gptq", "bits": nbits, "group_size": GROUP, "desc_act": order}
    path = write(tmp_path / "q", pack, config | {"checkpoint_format": "gptq" if v1 else "gptq_v2"})
    reader = GPTQ()
    assert reader.recognizes(path)
    assert not AWQ().recognizes(path)
    held = reader.open(path, skeleton())
    assert held.made_by == f"GPTQ, {nbits} bits, groups of {GROUP}" + (", act-order" if order else "")
    assert held.file_bytes == (path / "model.safetensors").stat().st_size
    for module, weight in expected.items():
        read = held.read(f"{module}.weight")
        assert isinstance(read, QuantizedWeight)
        assert weight.dtype == torch.float16
        assert torch.equal(read.dequantize(torch.float16), weight), module
        entry = held.entries[f"{module}.weight"]
        assert (entry.shape, entry.kind, entry.quantized) == (tuple(weight.shape), f"int{nbits} g{GROUP}", True)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert not held.entries[name].quantized
    assert torch.equal(held.read(name), build("dense", 0)[0].half().get_parameter(name))


@pytest.mark.parametrize(("name", "fields"), [("rtn", {"symmetric": True}), ("rtn", {}), ("gptq", {"act_order": True})])
def test_our_own_export_comes_back(tmp_path, name, fields):
    model, tokenizer = build("dense", 0)
    quantizer = make_quantizer({"name": name, "group_size": 32, **fields})
    weights = {}
    for path, layer in find_linears(model).layers.items():
        inputs = torch.randn(200, layer.in_features, generator=torch.Generator().manual_seed(1))
        [weights[path]] = quantizer.quantize([layer.weight.detach()], statistics_of(inputs, quantizer.needs))
        replace_module(model, path, QuantLinear(weights[path], None))
    autogptq.save(model, tokenizer, tmp_path / "q")
    held = GPTQ().open(tmp_path / "q", skeleton())
    for path, weight in weights.items():
        assert torch.equal(held.read(f"{path}.weight").dequantize(), weight.dequantize()), path


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_awq(tmp_path, version):
    expected = {}

    def pack(module, weight):
        codes, zero, scale = random_parts(module, weight, 4, weight.shape[1] // GROUP)
        expected[module] = (codes - zero.repeat_interleave(GROUP, 1)) * scale.repeat_interleave(GROUP, 1)
        if version == "gemv":
            pad = (0, -zero.shape[1] % 8)
            zero, scale = (torch.nn.functional.pad(part, pad) for part in (zero, scale))
            return {"qweight": bits_of(codes.T, 4).T, "qzeros": bits_of(zero.T, 4).T, "scales": scale}
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        mixed = [part.unflatten(0, (-1, 8))[:, order].flatten(0, 1) for part in (codes, zero)]
        return {"qweight": bits_of(mixed[0], 4).T, "qzeros": bits_of(mixed[1], 4).T, "scales": scale.T}

    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": version}
    path = write(tmp_path / "q", pack, config)
    held = AWQ().open(path, skeleton())
    assert held.made_by == f"AWQ, 4 bits, groups of {GROUP}"
    assert len(expected) == 14
    for module, weight in expected.items():
        assert torch.equal(held.read(f"{module}.weight").dequantize(torch.float16), weight), module


def test_experts_are_named_one_by_one(tmp_path):
    expected = {}

    def pack(module, weight):
        codes, zero, scale = random_parts(module, weight, 4, weight.shape[1] // GROUP)
        if ".experts.2." in module:
            return {}
        expected[module] = (codes - zero.repeat_interleave(GROUP, 1)) * scale.repeat_interleave(GROUP, 1)
        return {"qweight": bits_of(codes.T, 4), "qzeros": bits_of(zero, 4).T, "scales": scale.T}

    path = write(tmp_path / "q", pack, {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "moe")
    held = GPTQ().open(path, skeleton("moe"))
    for module, weight in expected.items():
        assert torch.equal(held.read(f"{module}.weight").dequantize(torch.float16), weight), module
    fused = build("moe", 0)[0].half().model.layers[0].mlp.experts
    for projection, weight in zip(("gate_proj", "up_proj"), fused.gate_up_proj[2].chunk(2), strict=True):
        assert torch.equal(held.read(f"model.layers.0.mlp.experts.2.{projection}.weight"), weight)
    assert torch.equal(held.read("model.layers.0.mlp.experts.2.down_proj.weight"), fused.down_proj[2])
    assert not held.ignored


def test_experts_are_alike(tmp_path):
    """One whose columns are in order already, and whose zero points are all in the centre, stacks with the others."""

    def pack(module, weight):
        codes, zero, scale = random_parts(module, weight, 4, weight.shape[1] // GROUP)
        g_idx = torch.arange(weight.shape[1]) // GROUP
        if ".experts.1." in module:
            zero = torch.full_like(zero, 8)
        else:
            g_idx = g_idx.flip(0)
        parts = {"qweight": bits_of(codes.T, 4), "qzeros": bits_of(zero, 4).T, "scales": scale.T}
        return parts | {"g_idx": g_idx.int()}

    config = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "desc_act": True, "sym": False}
    held = GPTQ().open(write(tmp_path / "q", pack, config, "moe"), skeleton("moe"))
    weights = [held.read(f"model.layers.0.mlp.experts.{i}.up_proj.weight") for i in range(4)]
    stack = QuantizedWeight.stack(weights)
    for i, weight in enumerate(weights):
        assert torch.equal(stack.select(i).dequantize(), weight.dequantize())


def test_an_expert_in_16_bits_stands_among_the_others(tmp_path):
    def pack(module, weight):
        return {} if ".experts.0.up_proj" in module else packed(module, weight)

    path = write(tmp_path / "q", pack, {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "moe")
    held = GPTQ().open(path, skeleton("moe"))
    read = {
        p: [held.read(f"model.layers.0.mlp.experts.{i}.{p}.weight") for i in range(4)] for p in ("up_proj", "gate_proj")
    }
    assert [type(weight) for weight in read["gate_proj"]] == [QuantizedWeight] * 4
    assert [type(weight) for weight in read["up_proj"]] == [torch.Tensor, Mixed, Mixed, Mixed]
    stack = Plain.stack([Plain.of(read["up_proj"][0]), *read["up_proj"][1:]])
    assert torch.equal(stack.select(0).dequantize(torch.float16), read["up_proj"][0])
    assert torch.equal(stack.select(3).dequantize(), read["up_proj"][3].dequantize())


def packed(module, weight):
    codes, zero, scale = random_parts(module, weight, 4, weight.shape[1] // GROUP)
    return {"qweight": bits_of(codes.T, 4), "qzeros": bits_of(zero, 4).T, "scales": scale.T}


@pytest.fixture
def edited(tmp_path):
    """edit(tensors) or settings -> a GPTQ folder that was changed by them."""

    def make(edit=lambda tensors: tensors, **settings):
        config = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "group_size": GROUP} | settings
        path = write(tmp_path / "q", packed, config)
        save_file(edit(load_file(path / "model.safetensors")), path / "model.safetensors")
        return path

    return make


Q = "model.layers.1.self_attn.q_proj"
WRONG = {
    "a part is missing": (lambda t: {k: v for k, v in t.items() if k != f"{Q}.scales"}, f"{Q}: scales is missing"),
    "a tensor is missing": (lambda t: {k: v for k, v in t.items() if "norm" not in k}, "lacks model.layers.0"),
    "twice": (lambda t: t | {f"{Q}.weight": torch.zeros(64, 64)}, f"holds {Q}.weight twice"),
    "another shape": (lambda t: t | {f"{Q}.qweight": t[f"{Q}.qweight"][:-1]}, f"{Q}: qweight [7, 64] holds no"),
    "another type": (lambda t: t | {f"{Q}.qweight": t[f"{Q}.qweight"].long()}, f"{Q}: qweight is stored in int64"),
    "a group too few": (
        lambda t: t | {f"{Q}.scales": t[f"{Q}.scales"][:1]},
        f"{Q}: qzeros has the shape [2, 8], and a weight [64, 64] needs [1, 8]",
    ),
    "vocabulary": (
        lambda t: t | {"model.embed_tokens.weight": torch.zeros(300, 64)},
        "model.embed_tokens.weight has the shape [300, 64], and the original's is [258, 64]",
    ),
    "another layer": (
        lambda t: t | {k.replace("layers.1", "layers.7"): v.clone() for k, v in t.items() if "layers.1" in k},
        "is quantized, and the original has no such weight",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_anything_is_read(edited, case):
    edit, said = WRONG[case]
    with pytest.raises(ReadError) as error:
        GPTQ().open(edited(edit), skeleton())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_values_that_mean_nothing_are_refused_by_name(edited):
    held = GPTQ().open(edited(lambda t: t | {f"{Q}.scales": t[f"{Q}.scales"] * torch.nan}), skeleton())
    with pytest.raises(ReadError, match=Q):
        held.read(f"{Q}.weight")
    backward = torch.zeros(64, dtype=torch.int32)
    held = GPTQ().open(edited(lambda t: t | {f"{Q}.g_idx": backward}), skeleton())
    with pytest.raises(ReadError, match="g_idx"):
        held.read(f"{Q}.weight")


def test_a_bias_that_the_original_lacks_must_be_zero(edited):
    """AutoGPTQ writes one for every layer."""
    held = GPTQ().open(edited(lambda t: t | {f"{Q}.bias": torch.zeros(64)}), skeleton())
    assert isinstance(held.read(f"{Q}.weight"), QuantizedWeight)
    assert f"{Q}.bias" in held.ignored
    held = GPTQ().open(edited(lambda t: t | {f"{Q}.bias": torch.ones(64)}), skeleton())
    with pytest.raises(ReadError, match="has a bias, and the original's layer has none"):
        held.read(f"{Q}.weight")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"group_size": "many"}, "group_size"),
        ({"group_size": None}, "None"),
    ],
)
def test_settings_that_are_not_known(edited, settings, said):
    with pytest.raises(ReadError, match=said):
        GPTQ().open(edited(**settings), skeleton())


def test_another_architecture(edited):
    path = edited()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ReadError, match="architecture llama, and the original is a qwen3"):
        GPTQ().open(path, skeleton())


def test_older_names_of_files(edited):
    """AutoGPTQ's first files: one of another name, and the settings beside config.json."""
    path = edited()
    config = json.loads((path / "config.json").read_text())
    (path / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").rename(path / "gptq_model-4bit-32g.safetensors")
    assert GPTQ().recognizes(path)
    assert GPTQ().recognizes(path / "gptq_model-4bit-32g.safetensors")
    for place in (path, path / "gptq_model-4bit-32g.safetensors"):
        assert isinstance(GPTQ().open(place, skeleton()).read(f"{Q}.weight"), QuantizedWeight)


def test_pickles_are_never_opened(edited):
    path = edited()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ReadError, match=r"pickled weights \(pytorch_model.bin\), which are never opened"):
        GPTQ().open(path, skeleton())


def test_a_folder_in_the_place_of_a_file(edited):
    path = edited()
    (path / "model.safetensors").unlink()
    (path / "other.safetensors").mkdir()
    with pytest.raises(ReadError, match=r"other\.safetensors"):
        GPTQ().open(path, skeleton())


@pytest.mark.parametrize(("packing", "reader"), [("auto_round:auto_gptq", GPTQ), ("auto_round:auto_awq", AWQ)])
def test_autoround_goes_by_its_packing(edited, packing, reader):
    path = edited(quant_method="auto-round", packing_format=packing)
    assert [r for r in (GPTQ, AWQ) if r().recognizes(path)] == [reader]
    if reader is GPTQ:
        assert GPTQ().open(path, skeleton()).made_by.startswith("AutoRound")


def official(package, module):
    """One module of a frozen package, which stays off sys.path, without the package around it."""
    file = Path(sys.prefix) / "oracle" / package / f"{module}.py"
    if not file.is_file():
        pytest.skip(f"{package} is not installed; make oracle does it")
    spec = importlib.util.spec_from_file_location(f"oracle_{package}_{file.stem}", file)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.oracle
def test_awq_as_autoawq_decodes_it(tmp_path):
    utils = official("awq", "utils/packing_utils")

    def pack(module, weight):
        rows, columns = weight.shape
        generator = torch.Generator().manual_seed(len(module))
        words = [
            torch.randint(-(2**31), 2**31, (n, rows // 8), generator=generator).int() for n in (columns, columns // 32)
        ]
        return {"qweight": words[0], "qzeros": words[1], "scales": torch.rand(columns // 32, rows).half()}

    path = write(tmp_path / "q", pack, {"quant_method": "awq", "group_size": GROUP, "version": "gemm"})
    tensors = load_file(path / "model.safetensors")
    held = AWQ().open(path, skeleton())
    for name, entry in held.entries.items():
        if entry.quantized:
            parts = [tensors[f"{name.removesuffix('.weight')}.{part}"] for part in ("qweight", "qzeros", "scales")]
            expected = utils.dequantize_gemm(*parts, 4, GROUP).T
            assert torch.equal(held.read(name).dequantize(torch.float16), expected), name


@pytest.mark.oracle
@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
def test_gptq_as_autogptq_decodes_it(tmp_path, nbits):
    """Of any words at all; of 3 bits without the zero point that it leaves above the codes instead of wrapping it."""
    cuda_old = official("auto_gptq", "nn_modules/qlinear/qlinear_cuda_old")
    layers = {}

    def pack(module, weight):
        rows, columns = weight.shape
        layers[module] = layer = cuda_old.QuantLinear(nbits, GROUP, columns, rows, bias=False)
        layer.autogptq_cuda_available = False  # its own path in torch
        generator = torch.Generator().manual_seed(len(module))
        for name in ("qweight", "qzeros"):
            words = torch.randint(-(2**31), 2**31, getattr(layer, name).shape, generator=generator)
            setattr(layer, name, words.int())
        if nbits == 3:
            codes = torch.randint(0, 7, (rows, columns // GROUP), generator=generator)
            layer.qzeros = bits_of(codes, 3).T.contiguous()
        layer.scales = torch.rand(layer.scales.shape, generator=generator).half()
        return {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}

    held = GPTQ().open(write(tmp_path / "q", pack, {"quant_method": "gptq", "group_size": GROUP}), skeleton())
    for module, layer in layers.items():
        expected = layer(torch.eye(layer.infeatures).half()).T  # sums of one number and zeros
        assert torch.equal(held.read(f"{module}.weight").dequantize(torch.float16), expected), module


@pytest.mark.oracle
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_what_autoawq_packs(tmp_path, monkeypatch, version):
    """A weight on a grid of integers comes out of AutoAWQ's packer and our reader as it was."""
    place = Path(sys.prefix) / "oracle"
    if not (place / "awq").is_dir():
        pytest.skip("autoawq is not installed; make oracle does it")
    monkeypatch.syspath_prepend(str(place))
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):  # what they import does not import any more
        alone = ModuleType(name)
        alone.__path__ = [str(place.joinpath(*name.split(".")))]
        monkeypatch.setitem(sys.modules, name, alone)
    packer = getattr(importlib.import_module(f"awq.modules.linear.{version}"), f"WQLinear_{version.upper()}")
    expected = {}

    def pack(module, weight):
        rows, columns = weight.shape
        codes, zero, scale = random_parts(module, weight, 4, columns // GROUP)
        expected[module] = (codes - zero.repeat_interleave(GROUP, 1)) * scale.repeat_interleave(GROUP, 1)
        layer = torch.nn.Linear(columns, rows, bias=False).half()
        layer.weight.data = expected[module].clone()
        parts = (scale.T.contiguous(), zero.T.contiguous()) if version == "gemm" else (scale, zero)
        return dict(packer.from_linear(layer, 4, GROUP, False, *parts).state_dict())

    path = write(tmp_path / "q", pack, {"quant_method": "awq", "group_size": GROUP, "version": version})
    held = AWQ().open(path, skeleton())
    for module, weight in expected.items():
        assert torch.equal(held.read(f"{module}.weight").dequantize(torch.float16), weight), module
