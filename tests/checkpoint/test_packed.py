"""Packed checkpoints: the same logits to the bit, complete or absent, and a clear word about every broken file."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from qbench.checkpoint import packed as checkpoint
from qbench.checkpoint.manifest import MANIFEST, read, seal
from qbench.errors import RequestError
from qbench.format.weight import QuantizedWeight
from qbench.layers.linear import PackedWeight, QuantLinear
from qbench.model.linears import find_linears, replace_module
from qbench.quant.rounding import round_to_nearest
from qbench.registry import make_quantizer
from qbench.sources.tiny import build, byte_tokenizer

IDS = torch.arange(40).view(2, 20)


def permuted(weight):
    """Like GPTQ's act-order: the columns are quantized in another order."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3))
    plain = round_to_nearest(weight[:, order], nbits=4, group_size=32, method="gptq")
    return QuantizedWeight.build(
        plain.codes(), plain.scale, nbits=4, group_size=32, zero=plain.zero, permutation=order, method="gptq"
    )


def by(name, **fields):
    return make_quantizer({"name": name, **fields}).quantize_one


WAYS = {
    "rtn 3 bit": by("rtn", nbits=3),
    "sinq 4 bit": by("sinq", nbits=4),
    "nf4": by("nf4"),
    "int8 aux": by("rtn", nbits=4, aux_dtype="int8"),
    "permutation": permuted,
    "rotation": by("sinq", nbits=3, rotation="hadamard", t_dtype="fp8"),
    "pairs": by("higgs", nbits=3),
}


def quantized(quantize=WAYS["rtn 3 bit"], dtype=torch.float32, bias=False):
    model, tokenizer = build("dense", 0)
    model = model.to(dtype).eval().requires_grad_(False)
    for name, layer in find_linears(model).layers.items():
        values = torch.linspace(-1, 1, layer.out_features, dtype=dtype) if bias else None
        replace_module(model, name, QuantLinear(quantize(layer.weight), values))
    return model, tokenizer


@pytest.fixture
def saved(tmp_path):
    model, tokenizer = quantized()
    checkpoint.save(model, tokenizer, tmp_path / "packed", max_shard_bytes=20_000)
    return tmp_path / "packed"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_gives_the_same_logits_to_the_bit(tmp_path, way, dtype):
    model, tokenizer = quantized(WAYS[way], dtype)
    checkpoint.save(model, tokenizer, tmp_path / "packed")
    loaded = checkpoint.load(tmp_path / "packed")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded(IDS).logits.dtype == dtype
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            mine, other = module.quantized, loaded.get_submodule(name).quantized
            facts = ("shape", "nbits", "group_size", "method", "diagnostics")
            assert [getattr(mine, f) for f in facts] == [getattr(other, f) for f in facts]


def test_fused_biases_and_another_dtype(tmp_path):
    model, tokenizer = quantized(bias=True)
    checkpoint.save(model, tokenizer, tmp_path / "packed")
    assert torch.equal(checkpoint.load(tmp_path / "packed")(IDS).logits, model(IDS).logits)
    half = checkpoint.load(tmp_path / "packed", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.model.layers[0].mlp.up_proj.scale.dtype == torch.float16
    assert half(IDS).logits.dtype == torch.bfloat16


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    model, tokenizer = quantized()
    checkpoint.save(model, tokenizer, tmp_path / "packed")
    assert read(tmp_path / "packed")["tied"]["lm_head.weight"] == "model.embed_tokens.weight"
    loaded = checkpoint.load(tmp_path / "packed")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    stored = sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    written = sum(p.stat().st_size for p in (tmp_path / "packed").glob("*.safetensors"))
    assert stored < written < stored + 20_000  # the header


def test_shards(saved):
    shards = sorted(saved.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    model, _ = quantized()
    assert torch.equal(checkpoint.load(saved)(IDS).logits, model(IDS).logits)
    assert {p.suffix for p in saved.iterdir()} == {".json", ".safetensors"}  # nothing that pickle reads
    assert {p.name for p in saved.iterdir()} == {MANIFEST, *read(saved)["files"]}


def test_saving_again_replaces(saved):
    model, tokenizer = quantized(WAYS["nf4"])
    checkpoint.save(model, tokenizer, saved)
    assert torch.equal(checkpoint.load(saved)(IDS).logits, model(IDS).logits)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    assert len(list(saved.glob("*.safetensors"))) == 1


def test_an_empty_folder_is_taken_and_a_foreign_one_refused(tmp_path):
    model, tokenizer = quantized()
    (tmp_path / "empty").mkdir()
    checkpoint.save(model, tokenizer, tmp_path / "empty")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(RequestError, match="not empty and holds no packed checkpoint"):
        checkpoint.save(model, tokenizer, foreign)
    with pytest.raises(RequestError, match="is a file"):
        checkpoint.save(model, tokenizer, foreign / "thesis.tex")
    assert (foreign / "thesis.tex").read_text() == "years of work"


def damage_last_byte(path: Path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model-00002-of-*.safetensors", "config.json", "tokenizer.json", MANIFEST])
@pytest.mark.parametrize(
    "harm",
    [damage_last_byte, lambda p: p.write_bytes(p.read_bytes()[:-100]), lambda p: p.write_bytes(b"{}"), Path.unlink],
    ids=["tampered", "truncated", "foreign", "missing"],
)
def test_a_harmed_file_is_named(saved, name, harm):
    (path,) = saved.glob(name)
    harm(path)
    with pytest.raises(RequestError, match=path.name) as caught:
        checkpoint.load(saved)
    assert "\n" not in str(caught.value)


def edited(folder: Path, edit) -> None:
    manifest = read(folder)
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(seal(manifest)))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda m: m.update(version=2), "version 2"),
        (lambda m: m.update(format="other"), "foreign"),
        (lambda m: m.update(layers={}), "does not describe the model"),
        (lambda m: m["layers"]["model.layers.0.mlp.up_proj"].update(kind="Other"), "is a Other"),
        (lambda m: m["layers"]["model.layers.0.mlp.up_proj"]["weights"][""].update(nbits=5), "does not describe"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(saved, edit, sentence):
    edited(saved, edit)
    with pytest.raises(RequestError, match=sentence):
        checkpoint.load(saved)


def test_a_changed_manifest_is_noticed(saved):
    path = saved / MANIFEST
    path.write_text(path.read_text().replace('"nbits": 3', '"nbits": 2', 1))
    with pytest.raises(RequestError, match="was changed after"):
        checkpoint.load(saved)


@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch, existing):
    model, tokenizer = quantized()
    target = tmp_path / "packed"
    if existing:
        checkpoint.save(model, tokenizer, target)
    save_file, written = checkpoint.save_file, []

    def full_disk(content, path, **kwargs):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(content, path, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(RequestError, match="No space left"):
        checkpoint.save(model, tokenizer, target, max_shard_bytes=20_000)
    assert len(written) == 2
    assert [p.name for p in tmp_path.iterdir()] == (["packed"] if existing else [])
    if existing:
        assert torch.equal(checkpoint.load(target)(IDS).logits, model(IDS).logits)


def test_models_that_cannot_be_packed_are_refused(tmp_path):
    plain, tokenizer = build("dense", 0)
    with pytest.raises(RequestError, match="no quantized layer"):
        checkpoint.save(plain, tokenizer, tmp_path / "packed")
    model, _ = quantized()

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = PackedWeight(WAYS["nf4"](torch.ones(4, 8)))

    model.model.layers[0].mlp.experts = Stack()
    with pytest.raises(RequestError, match=r"mlp\.experts \(Stack\) holds packed weights"):
        checkpoint.save(model, byte_tokenizer(), tmp_path / "packed")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", WAYS)
def test_a_model_laid_out_for_the_kernels_is_saved_in_the_packed_format(tmp_path, way):
    model, tokenizer = quantized(WAYS[way])
    expected, state = model(IDS).logits, {name: t.clone() for name, t in model.state_dict().items()}
    holders = [module for module in model.modules() if isinstance(module, PackedWeight)]
    laid_out = [module for module in holders if module.lay_out()]
    assert bool(laid_out) == (way != "pairs")  # no kernel holds a codebook of vectors
    found = model.state_dict()  # what any other writer would save
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    checkpoint.save(model, tokenizer, tmp_path / "packed")
    assert all(module.layout is not None for module in laid_out)  # as it was before
    assert torch.equal(checkpoint.load(tmp_path / "packed")(IDS).logits, expected)
