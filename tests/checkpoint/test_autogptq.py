"""AutoGPTQ's format, read back bit by bit by a reader written from its description."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from qbench.checkpoint import autogptq
from qbench.checkpoint import packed as checkpoint
from qbench.errors import RequestError
from qbench.format.words import pack_words
from qbench.layers.linear import QuantLinear
from qbench.model.linears import find_linears, replace_module
from qbench.registry import make_quantizer
from qbench.sources.tiny import build
from qbench.testing import statistics_of

ROWS, COLUMNS, GROUP = 32, 192, 64


def read_bits(words: list[int], nbits: int) -> list[int]:
    """The codes of a little-endian bit stream in 32-bit words."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (nbits * i)) & (2**nbits - 1) for i in range(32 * len(words) // nbits)]


def naive_dequantize(tensors, nbits, v1):
    """fp32 `[out, in]` from qweight, qzeros, scales and g_idx, one number at a time."""
    codes = [read_bits(column, nbits) for column in tensors["qweight"].T.tolist()]  # [out][in]
    zeros = [read_bits(row, nbits) for row in tensors["qzeros"].tolist()]  # [groups][out]
    scales, groups = tensors["scales"].float().tolist(), tensors["g_idx"].tolist()
    return torch.tensor(
        [
            [(c - zeros[g][o] - v1) * scales[g][o] for c, g in zip(row, groups, strict=True)]
            for o, row in enumerate(codes)
        ]
    )


def quantized(name="rtn", rows=ROWS, columns=COLUMNS, **fields):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(rows, columns, generator=generator)
    quantizer = make_quantizer({"name": name, **fields})
    inputs = torch.randn(300, columns, generator=generator) * torch.rand(columns, generator=generator)
    [result] = quantizer.quantize([weight], statistics_of(inputs, quantizer.needs))
    return result


@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "fields",
    [
        {"name": "rtn"},
        {"name": "rtn", "group_size": -1},
        {"name": "gptq", "act_order": True, "static_groups": False},
        {"name": "gptq", "act_order": True, "static_groups": True},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_naive_reader_finds_the_same_weights(nbits, fields, symmetric):
    weight = quantized(nbits=nbits, symmetric=symmetric, **fields)
    tensors = autogptq.layer_tensors(weight, v1=symmetric)
    groups = COLUMNS // weight.group_size
    assert {name: (t.dtype, list(t.shape)) for name, t in tensors.items()} == {
        "qweight": (torch.int32, [COLUMNS * nbits // 32, ROWS]),
        "qzeros": (torch.int32, [groups, ROWS * nbits // 32]),
        "scales": (torch.float16, [groups, ROWS]),
        "g_idx": (torch.int32, [COLUMNS]),
    }
    assert all(t.is_contiguous() for t in tensors.values())
    assert torch.equal(naive_dequantize(tensors, nbits, v1=symmetric), weight.dequantize())
    in_order = torch.equal(tensors["g_idx"], torch.arange(COLUMNS, dtype=torch.int32) // weight.group_size)
    assert in_order == (weight.permutation is None)


def test_three_bits_straddle_words_as_published():
    """32 codes in 3 words: ten whole ones, then the two low bits of the eleventh, and so on."""
    values = torch.zeros(32, 1, dtype=torch.int32)
    values[10], values[21], values[31] = 0b110, 0b101, 0b111
    low, middle, high = (word & 0xFFFFFFFF for word in pack_words(values, 3).flatten().tolist())
    assert low == 0b10 << 30
    assert middle == 1 | 1 << 31
    assert high == 0b10 | 0b111 << 29


@pytest.fixture
def model():
    def make(name="rtn", dtype=torch.float32, **fields):
        model, tokenizer = build("dense", 0)
        model = model.to(dtype).eval().requires_grad_(False)
        quantizer = make_quantizer({"name": name, "group_size": 32, **fields})
        for path, layer in find_linears(model).layers.items():
            inputs = torch.randn(200, layer.in_features, generator=torch.Generator().manual_seed(1))
            [weight] = quantizer.quantize([layer.weight], statistics_of(inputs, quantizer.needs))
            replace_module(model, path, QuantLinear(weight, torch.linspace(-1, 1, layer.out_features, dtype=dtype)))
        return model, tokenizer

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [20_000, 2**30])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_folder_holds_every_tensor_once(tmp_path, model, dtype, shard_bytes, symmetric):
    ours, tokenizer = model("gptq", dtype, static_groups=False, symmetric=symmetric)
    origin = {"run_id": "r1", "quantizer": {"name": "gptq"}}
    autogptq.save(ours, tokenizer, tmp_path / "a", max_shard_bytes=shard_bytes, origin=origin)
    files = sorted(tmp_path.glob("a/*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if shard_bytes == 20_000:
        assert len(files) > 3
        index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    else:
        assert [file.name for file in files] == ["model.safetensors"]

    described = json.loads((tmp_path / "a" / autogptq.QUANTIZE_CONFIG).read_text())
    assert described["meta"]["origin"] == origin
    assert {k: described[k] for k in ("bits", "group_size", "sym", "desc_act", "checkpoint_format")} == {
        "bits": 4,
        "group_size": 32,
        "sym": symmetric,
        "desc_act": True,
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
    }
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["quantization_config"] == described
    expected = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    assert config["dtype"] == str(expected).removeprefix("torch.")

    for name, module in ours.named_modules():
        if isinstance(module, QuantLinear):
            parts = {key: tensors.pop(f"{name}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx")}
            assert torch.equal(naive_dequantize(parts, 4, v1=symmetric), module.quantized.dequantize())
    for name, parameter in ours.named_parameters():  # each tied tensor once
        assert torch.equal(tensors.pop(name), parameter.to(expected))
    assert not tensors, "rotary frequencies and the like are not part of the format"


@pytest.mark.parametrize("fields", [{"name": "rtn", "symmetric": True}, {"name": "gptq", "static_groups": False}])
def test_a_model_laid_out_for_the_kernels_is_written_as_if_packed(tmp_path, model, fields):
    ours, tokenizer = model(**fields)
    autogptq.save(ours, tokenizer, tmp_path / "packed")
    assert all(module.lay_out() for module in ours.modules() if isinstance(module, QuantLinear))
    autogptq.save(ours, tokenizer, tmp_path / "laid_out")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "laid_out"))
    assert sum(name.endswith(".qweight") for name in found) == 14
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_saving_again_replaces_only_our_own(tmp_path, model):
    ours, tokenizer = model()
    autogptq.save(ours, tokenizer, tmp_path / "a", origin={"run_id": "r1"})
    before = (tmp_path / "a/model.safetensors").read_bytes()
    symmetric, _ = model(symmetric=True)
    autogptq.save(symmetric, tokenizer, tmp_path / "a", origin={"run_id": "r1"})
    assert (tmp_path / "a/model.safetensors").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(RequestError, match=r"checkpoint of another point \(r1\)"):
        autogptq.check_target(tmp_path / "a", "r2")
    checkpoint.save(ours, tokenizer, tmp_path / "packed")
    with pytest.raises(RequestError, match="holds no AutoGPTQ checkpoint of ours"):
        autogptq.save(ours, tokenizer, tmp_path / "packed")
    with pytest.raises(RequestError, match="holds no packed checkpoint"):
        checkpoint.save(ours, tokenizer, tmp_path / "a")


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        (lambda: quantized("sinq"), "input scale t"),
        (lambda: quantized("awq"), "input scale t"),
        (lambda: quantized("nf4"), "codebook"),
        (lambda: quantized("rtn", rotation="hadamard"), "rotated basis"),
        (lambda: quantized("hqq"), "not integers"),
        (lambda: quantized(aux_dtype="int8"), "use quantizer.aux_dtype=fp16"),
        (lambda: quantized(columns=160), "no multiple of quantizer.group_size=64"),
        (lambda: quantized(rows=40), r"shape \[40, 192\] is not a multiple of 32"),
        (lambda: quantized(columns=176, group_size=16), r"shape \[32, 176\] is not a multiple of 32"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_layer(tmp_path, model, weight, sentence):
    ours, tokenizer = model()
    name = "model.layers.1.mlp.up_proj"
    replace_module(ours, name, QuantLinear(weight()))
    with pytest.raises(RequestError, match=sentence) as caught:
        autogptq.save(ours, tokenizer, tmp_path / "a")
    assert str(caught.value).startswith(f"layer {name}: ")
    assert not list(tmp_path.iterdir())


def test_groups_on_one_side_of_zero_are_counted_and_refused(tmp_path, model):
    ours, tokenizer = model()
    layer = ours.model.layers[1].mlp.up_proj
    zero = layer.zero.clone()
    zero[0, 0], zero[3, 1], zero[4, 1] = -1, 16, 15  # the last one just fits
    layer.zero = zero
    with pytest.raises(
        RequestError, match=r"^2 of \d+ groups, the first in layer model.layers.1.mlp.up_proj"
    ) as caught:
        autogptq.save(ours, tokenizer, tmp_path / "a")
    assert "quantizer.symmetric=true" in str(caught.value)
    assert not list(tmp_path.iterdir())
    positive = make_quantizer({"name": "rtn"}).quantize_one(torch.rand(32, 64) + 1)
    assert (positive.zero.dense() < 0).all()  # it does happen


def test_layers_of_different_form_and_too_large_values_are_refused(tmp_path, model):
    ours, tokenizer = model()
    weight = ours.model.layers[0].mlp.down_proj.quantized
    other = make_quantizer({"name": "rtn", "nbits": 8, "group_size": 32}).quantize_one(weight.dequantize())
    replace_module(ours, "model.layers.0.mlp.down_proj", QuantLinear(other))
    with pytest.raises(RequestError, match="differ in bits or group size"):
        autogptq.save(ours, tokenizer, tmp_path / "a")
    ours, _ = model()
    ours.model.norm.weight[3] = 1e5
    with pytest.raises(RequestError, match="too large for fp16"):
        autogptq.save(ours, tokenizer, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    plain, _ = build("dense", 0)
    with pytest.raises(RequestError, match="no quantized layer"):
        autogptq.save(plain, tokenizer, tmp_path / "a")


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({(64, 64), (64, 192)}, 64),  # a whole row in one layer
        ({(64, 64), (192, 192)}, -1),
        ({(64, 128), (64, 192)}, 64),
        ({(64, 128), (192, 192)}, None),
    ],
)
def test_the_group_size_that_says_all_layers(sizes, said):
    assert autogptq.common_group(sizes) == said


KILLED = """
import sys, time
from pathlib import Path
from qbench.model.linears import find_linears, replace_module
from qbench.sources.tiny import build
from qbench.checkpoint import autogptq
from qbench.checkpoint import packed as checkpoint
from qbench.layers.linear import QuantLinear
from qbench.registry import make_quantizer

model, tokenizer = build("dense", 0)
for name, layer in find_linears(model).layers.items():
    weight = make_quantizer({"name": "rtn", "group_size": 32}).quantize_one(layer.weight.detach())
    replace_module(model, name, QuantLinear(weight))
save_file = checkpoint.save_file

def slow(*args, **kwargs):
    save_file(*args, **kwargs)
    print("written", flush=True)
    time.sleep(30)

checkpoint.save_file = slow
autogptq.save(model, tokenizer, Path(sys.argv[1]), max_shard_bytes=20_000)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_no_checkpoint(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout.readline() == b"written\n"
        process.kill()
    # nobody could tidy up: what is left is not mistaken for a checkpoint, and not in the way of the next
    [left] = tmp_path.iterdir()
    assert left.name.startswith(checkpoint.PARTIAL)
    assert not (left / "model.safetensors.index.json").exists()
    autogptq.check_target(tmp_path / "a")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_what_was_there(tmp_path, model, monkeypatch, failure, existing):
    ours, tokenizer = model()
    if existing:
        autogptq.save(ours, tokenizer, tmp_path / "a")
        before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    save_file, written = checkpoint.save_file, []

    def stopped(content, path, **kwargs):
        if len(written) == 2:
            raise failure
        written.append(path)
        save_file(content, path, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", stopped)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else RequestError
    with pytest.raises(expected):
        autogptq.save(ours, tokenizer, tmp_path / "a", max_shard_bytes=20_000)
    assert len(written) == 2
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if existing else [])
    if existing:
        assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [["quantizer=rtn", "quantizer.symmetric=true"], ["quantizer=gptq"]], ids=lambda s: s[0]
)
def test_read_back_it_measures_the_same(qbench, tmp_path, settings):
    point = ["model=tiny-dense", "task.max_windows=2", "runtime.dtype=bfloat16"]  # what is not quantized stays as it is
    ours = qbench(*point, *settings, f"export.dir={tmp_path / 'a'}", "export.format=autogptq")
    assert ours.status == 0, ours.stderr
    file = qbench(*point, "quantizer=file", f"quantizer.path={tmp_path / 'a'}")
    assert file.status == 0, file.stderr
    measures = ("ppl", "kl", "kl_reverse", "kl_p99", "top1_agreement", "true_token_rms_change")
    assert [ours.summary[key] for key in measures] == [file.summary[key] for key in measures]
