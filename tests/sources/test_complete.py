"""Files that hold another model than config.json describes are refused, by the names of the tensors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qbench.errors import RequestError
from qbench.readers.shards import Shards
from qbench.sources.local import Local
from tests.conftest import thinned

CPU = torch.device("cpu")
DOWN = "model.layers.1.mlp.down_proj.weight"


def llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**shape, **settings))


@pytest.fixture
def folder(tmp_path, tiny):
    """edit -> a folder whose tensors went through it; `settings` are the configuration's."""

    def make(edit, **settings):
        place = tmp_path / "model"
        llama(**settings).save_pretrained(place)
        tiny[1].save_pretrained(place)
        save_file(edit(load_file(place / "model.safetensors")), place / "model.safetensors", {"format": "pt"})
        return place

    return make


def loaded(place, cache):
    config = Local(path=str(place))
    return config.load(torch.float32, CPU, cache).model


def streamed(place, cache, monkeypatch):
    """Opened as a stream, with shards from which no byte of a weight can be read."""

    def read(*_):
        raise AssertionError("a weight was read before the sentence was said")

    with monkeypatch.context() as patched:
        patched.setattr(Shards, "read", read)
        return Local(path=str(place)).stream(torch.float32, CPU, cache)


def doubled(tensors):
    more = {k.replace("layers.1", "layers.2"): v.clone() for k, v in tensors.items() if "layers.1" in k}
    return tensors | more


BROKEN = {
    "a weight": (lambda t: {k: v for k, v in t.items() if k != DOWN}, rf"1 tensor is missing.*random: {DOWN}\."),
    "the head": (
        lambda t: {k: v for k, v in t.items() if "lm_head" not in k},
        r"1 tensor is missing.*: lm_head\.weight",
    ),
    "a norm": (lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}, r"missing.*: model\.norm\.weight"),
    "a prefix": (
        lambda t: {f"base_model.{k}": v for k, v in t.items()},
        r"21 tensors are missing.*; 21 .* not part",
    ),
    "a layer more": (doubled, r"9 tensors are not part of the model: model\.layers\.2\.input_layernorm.*, \.\.\."),
    "a shape": (
        lambda t: t | {DOWN: torch.zeros(8, 64)},
        rf"1 tensor is of another shape: {DOWN} \[8, 64\] in place of \[32, 64\]",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_checkpoint_of_another_model_is_refused_by_name(folder, tmp_path, what, monkeypatch):
    edit, sentence = BROKEN[what]
    place = folder(edit)
    with pytest.raises(RequestError, match=sentence) as caught:
        loaded(place, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    with pytest.raises(RequestError) as of_the_stream:
        streamed(place, tmp_path, monkeypatch)
    assert str(of_the_stream.value) == str(caught.value)


def test_what_an_architecture_declares_is_no_fault(folder, tmp_path):
    tied = loaded(folder(lambda t: t, tie_word_embeddings=True), tmp_path)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # a buffer that files of old versions hold
    place = folder(lambda t: t | old)
    loaded(place, tmp_path)
    assert len(Local(path=str(place)).stream(torch.float32, CPU, tmp_path)) == 2


def test_a_tied_embedding_that_is_nowhere_is_refused(folder, tmp_path, monkeypatch):
    place = folder(lambda t: {k: v for k, v in t.items() if "embed" not in k}, tie_word_embeddings=True)
    with pytest.raises(RequestError, match="missing and would be random"):
        loaded(place, tmp_path)
    with pytest.raises(RequestError, match=r"would be random: lm_head\.weight, model\.embed"):
        streamed(place, tmp_path, monkeypatch)


def test_layers_that_a_class_leaves_out_by_itself(tmp_path, tiny):
    """DeepSeek-V3's files hold a layer for multi-token prediction, which transformers' class names as unused."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    shape = dict(vocab_size=258, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    heads = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=2, topk_group=1)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**shape, **heads, **experts, first_k_dense_replace=1))
    place = tmp_path / "model"
    model.save_pretrained(place)
    tiny[1].save_pretrained(place)
    weights = load_file(place / "model.safetensors")
    save_file(
        weights | {"model.layers.61.eh_proj.weight": torch.ones(2)}, place / "model.safetensors", {"format": "pt"}
    )
    assert loaded(place, tmp_path).config.num_hidden_layers == 1


def test_a_failed_check_is_one_sentence_before_anything_is_measured(qbench, folder):
    place = folder(BROKEN["a weight"][0])
    outcome = qbench("model=local", f"model.path={place}", "quantizer=rtn", "task.max_windows=1")
    assert outcome.status == 2
    assert outcome.stderr.count("qbench: ") == 1
    assert DOWN in outcome.stderr


@pytest.mark.parametrize(
    ("said", "place"),
    thinned(
        [
            ({"quant_method": "bitsandbytes", "load_in_8bit": True, "_load_in_4bit": False}, "bitsandbytes 8 bit"),
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4 bit"),
            ({"quant_method": "gptq", "bits": 3}, "gptq 3 bit"),
            ({"quant_method": "awq", "w_bit": 4}, "awq 4 bit"),
            ({"quant_method": "hqq", "quant_config": {}}, "hqq"),
            ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
            ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
            ({"quant_method": "mxfp4"}, "mxfp4"),
        ],
        ["config", "text part", "dry run"],
    ),
)
def test_a_quantized_checkpoint_is_refused_by_its_config_alone(qbench, tmp_path, said, place):
    settings, format = said
    folder = tmp_path / "m"
    folder.mkdir()
    about = {"quantization_config": settings}
    config = {"model_type": "llama"} | ({"text_config": about} if place == "text part" else about)
    (folder / "config.json").write_text(json.dumps(config))  # no weights are there to be read
    arguments = ("model=local", f"model.path={folder}", *(("--dry-run",) if place == "dry run" else ()))
    outcome = qbench(*arguments)
    assert outcome.status == 2
    assert f"is quantized already ({format})" in outcome.stderr
    assert outcome.stderr.count("qbench: ") == 1


def test_integer_weights_are_refused_whatever_the_config_says(tiny):
    from qbench.sources.complete import require_complete
    from qbench.sources.tiny import build

    report = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    model, _ = build("dense", 0)
    require_complete(model, report, "m")
    codes = torch.zeros(192, 64, dtype=torch.int8)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(codes, requires_grad=False)
    with pytest.raises(RequestError, match=r"m is quantized already \(torch\.int8\)"):
        require_complete(model, report, "m")


def test_a_header_without_bound_is_not_read(tmp_path):
    """A sparse file whose first bytes tell of a header as long as itself."""
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write((2**33).to_bytes(8, "little"))
        opened.truncate(2**33 + 8)
    with pytest.raises(RequestError, match="no header fits"):
        Shards(tmp_path)
