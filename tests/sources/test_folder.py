"""A folder, a block at a time: every tensor has from_pretrained's bits, and what is wrong is known before reading."""

import json
import os
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qbench.errors import PointError, RequestError
from qbench.model.blocks import NotAChainError
from qbench.passes.chain import Chain
from qbench.sources.ahead import ahead
from qbench.sources.folder import Folder, straight
from qbench.sources.local import Local
from qbench.sources.stream import assembled
from qbench.sources.tiny import byte_tokenizer
from tests.conftest import thinned
from tests.passes.architectures import CHAINS, build
from tests.sources.cases import CPU, assert_same, gpu, needs_cuda, save, tensors


@pytest.mark.parametrize(("name", "dtype"), thinned(CHAINS, [torch.float32, torch.bfloat16]))
def test_every_tensor_has_the_bits_of_from_pretrained(name, dtype, tmp_path):
    folder = save(name, tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 3
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    source = Folder(folder, dtype, CPU)
    assert source.shards.bytes_read == 0
    model = source.rest()
    assert source.shards.bytes_read == source.bytes_of_block(None)
    rest = {n: t for n, t in tensors(model).items() if not n.startswith(source.prefix)}
    assert_same(rest, {n: t for n, t in tensors(expected).items() if not n.startswith(source.prefix)})
    for i in (*range(len(source)), 0):  # the first one again
        before = source.shards.bytes_read
        block = source.block(i)
        assert source.shards.bytes_read - before == source.bytes_of_block(i)
        assert_same(tensors(block), tensors(expected.get_submodule(f"{source.prefix}.{i}")))
        assert not block.training
        assert all(t.is_meta for t in tensors(model.get_submodule(f"{source.prefix}.{i}")).values())
    ids = torch.arange(40).view(2, 20)
    chain = Chain.of(model)
    states, calls = chain.begin(ids)
    with closing(ahead(source.block, range(len(source)), CPU)) as blocks:
        for i, block in blocks:
            states = chain.block(i, states, calls, block)
    assert torch.equal(chain.finish(states, ids), expected(ids, use_cache=False).logits)


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=[gpu, needs_cuda])], ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"), thinned([*CHAINS, "Gemma4Text", "Gemma3nText"], [torch.float32, torch.bfloat16])
)
def test_the_whole_model_is_what_from_pretrained_gives(name, dtype, device, tmp_path):
    folder = save(name, tmp_path, **({"tie_word_embeddings": True} if name == "Qwen3Moe" else {}))
    said = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(said | {"temperature": 0.25, "do_sample": True}))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False).to(device)
    model = straight(folder, str(folder), dtype, device)
    assert type(model) is type(expected)
    assert_same(tensors(model), tensors(expected))
    assert tied(model) == tied(expected)
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert (model.name_or_path, model.device, model.dtype) == (expected.name_or_path, expected.device, expected.dtype)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = torch.arange(40, device=device).view(2, 20)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, expected(ids, use_cache=False).logits)


def tied(model):
    """The names of the parameters that are one."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


def test_the_settings_of_a_whole_model_reach_its_blocks(tmp_path):
    model = assembled(Folder(save("Qwen3Moe", tmp_path), torch.float32, CPU))
    model.set_attn_implementation("eager")  # the blocks share the configuration
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}


def test_what_is_no_folder_of_blocks_is_left_to_from_pretrained(tmp_path):
    folder = save("Zamba2", tmp_path / "shared")
    assert straight(folder, str(folder), torch.float32, CPU) is None
    assert straight(tmp_path / "nothing", "nothing", torch.float32, CPU) is None
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    byte_tokenizer().save_pretrained(folder)
    local = Local(path=str(folder))
    assert_same(tensors(local.load(torch.float32, CPU, tmp_path).model), tensors(expected))


def test_a_model_is_loaded_without_from_pretrained_unless_it_is_offloaded(tmp_path, monkeypatch):
    folder = save("Llama", tmp_path)
    byte_tokenizer().save_pretrained(folder)
    local = Local(path=str(folder))

    def asked(*_, **__):
        raise ValueError("from_pretrained was asked")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", asked)
    local.load(torch.float32, CPU, tmp_path)
    for other, offload in ((local, True), (replace(local, trust_remote_code=True), False)):
        with pytest.raises(RequestError, match="from_pretrained was asked"):
            other.load(torch.float32, CPU, tmp_path, offload)


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_stored_beside_the_embedding_is_tied_if_it_is_the_same(equal, tmp_path):
    folder = save("Llama", tmp_path, tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + (0 if equal else 1)}))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = Folder(folder, torch.float32, CPU).rest()
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == equal


def rewrite(folder, change):
    """Stores the folder's tensors in one file after `change` of the dictionary that holds them."""
    held = {}
    for file in sorted(folder.glob("*.safetensors")):
        held |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(held)
    save_file({name: tensor.clone() for name, tensor in held.items()}, folder / "model.safetensors")


def drop(*names):
    return lambda held: [held.pop(name) for name in names]


def put(name, *shape):
    return lambda held: held.update({name: torch.zeros(shape)})


def codes(name):
    return lambda held: held.update({name: held[name].to(torch.int8)})


EXPERT = "model.layers.1.mlp.experts.2"


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("Llama", drop("model.layers.1.mlp.up_proj.weight"), r"1 tensor is missing.*: model.layers.1.mlp.up_proj.wei"),
        (
            "Llama",
            drop(*(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3))),
            "3 tensors are missing .* random: model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight, m",
        ),
        ("Llama", drop("model.norm.weight", "lm_head.weight"), "2 tensors are missing.*: lm_head.weight, model.norm.w"),
        ("Llama", put("model.layers.2.mlp.extra", 3), "1 tensor is not part of the model: model.layers.2.mlp.extra"),
        ("Llama", put("model.layers.3.mlp.up_proj.weight", 3), "1 tensor is not part of the model: model.layers.3.ml"),
        (
            "Llama",
            put("model.norm.weight", 3),
            r"1 tensor is of another shape: model.norm.weight \[3\] in place of \[64",
        ),
        ("Llama", put("model.layers.0.mlp.up_proj.weight", 4, 4), r"0.mlp.up_proj.weight \[4, 4\] in place of \[128, "),
        (
            "Qwen3Moe",
            drop(f"{EXPERT}.down_proj.weight"),
            r"1.mlp.experts.down_proj \[3, 64, 32\] in place of \[4, ",
        ),
        ("Qwen3Moe", drop(f"{EXPERT}.up_proj.weight"), "json: model.layers.1.mlp.experts.gate_up_proj cannot be made"),
        ("Mixtral", put("model.layers.1.block_sparse_moe.experts.2.w2.weight", 4, 4), "1.mlp.experts.down_proj cannot"),
        (
            "Llama",
            codes("model.layers.2.mlp.up_proj.weight"),
            r"is quantized already \(torch.int8\): name the check",
        ),
    ],
)
def test_what_does_not_fit_the_configuration_is_named_before_anything_is_read(name, change, sentence, tmp_path):
    folder = save(name, tmp_path)
    rewrite(folder, change)
    with pytest.raises(RequestError, match=sentence) as caught:
        Folder(folder, torch.float32, CPU)
    assert "\n" not in str(caught.value)


def test_what_the_model_ignores_is_ignored(tmp_path):
    folder = save("GPT2", tmp_path)
    rewrite(folder, put("transformer.h.1.attn.bias", 1, 1, 8, 8))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same(tensors(assembled(Folder(folder, torch.float32, CPU))), tensors(expected.requires_grad_(False)))


def shorten(folder):
    file = sorted(folder.glob("*.safetensors"))[2]
    os.truncate(file, file.stat().st_size - 10)


def hide(folder):
    sorted(folder.glob("*.safetensors"))[2].unlink()


def double(folder):
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())


def configure(**settings):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def overwrite(pattern, content):
    return lambda folder: sorted(folder.glob(pattern))[0].write_bytes(content)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            shorten,
            r"00003-of-\d+.safetensors is truncated: its header tells of \d+ bytes, and it has \d+; get it anew$",
        ),
        (hide, r"lacks the shard model-00003-of-\d+.safetensors, which model.safetensors.index.json lists$"),
        (double, r"\w+.weight is both in model-00001-of-\d+.safetensors and in model-00002-of-\d+.safetensors$"),
        (overwrite("*.safetensors", b"a page of HTML, which is no model"), "is truncated or no safetensors file"),
        (overwrite("*.safetensors", b"\3" + b"\0" * 7 + b"[1]"), "has no readable safetensors header"),
        (overwrite("*.safetensors", b""), "is truncated or no safetensors file: no header fits into its 0 bytes"),
        (overwrite("*.index.json", b"{}"), "is not an index of safetensors shards: it needs a weight_map"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "has neither model.safetensors nor model"),
        (overwrite("config.json", b"{}"), "cannot read a model from .*: its config.json makes no causal"),
        (configure(quantization_config={"quant_method": "fp8"}), "is quantized already, with fp8"),
    ],
)
def test_a_folder_that_is_no_complete_model_is_refused_in_one_sentence(change, sentence, tmp_path):
    folder = save("Llama", tmp_path)
    change(folder)
    with pytest.raises(RequestError, match=sentence) as caught:
        Folder(folder, torch.float32, CPU)
    assert "\n" not in str(caught.value)


def test_blocks_that_share_weights_are_refused(tmp_path):
    build("Zamba2").save_pretrained(tmp_path)
    with pytest.raises(NotAChainError, match="Zamba2ForCausalLM"):
        Folder(tmp_path, torch.float32, CPU)


def test_a_shard_that_shrinks_while_it_is_read_is_said_and_the_source_stays_usable(tmp_path):
    folder = save("Llama", tmp_path)
    source = Folder(folder, torch.float32, CPU)
    [file] = {source.shards.tensors[f"model.layers.1.{n}.weight"].file for n in ["mlp.up_proj"]}
    content = file.read_bytes()
    os.truncate(file, 200)
    with pytest.raises(PointError, match="has become shorter since it was opened"):
        source.block(1)
    file.write_bytes(content)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same(tensors(source.block(1)), tensors(expected.model.layers[1].requires_grad_(False)))


def test_a_device_that_is_full_is_said(tmp_path, monkeypatch):
    source = Folder(save("Llama", tmp_path), torch.float32, CPU)

    def full(*_):
        raise torch.OutOfMemoryError("out of memory\nand more")

    monkeypatch.setattr("qbench.readers.shards._empty", full)
    with pytest.raises(PointError, match=r"^model\.layers\.\d\.\S+, \d\.\d MB, has no room on cpu: out of memory$"):
        source.block(0)
