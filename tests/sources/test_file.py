"""What somebody else quantized as the original: the suite, and that it is the model that the file stands for."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qbench.checkpoint import gguf
from qbench.checkpoint.packed import Packed
from qbench.errors import RequestError
from qbench.passes.quantize import quantize_model
from qbench.registry import make_quantizer
from qbench.sources.file import File
from qbench.sources.tiny import byte_tokenizer
from qbench.testing import SourceConformance
from tests.passes.architectures import build as build_of

CPU = torch.device("cpu")
RTN = {"name": "rtn", "nbits": 4, "group_size": 32, "symmetric": True}


def tokenizer_of_pairs():
    """A byte tokenizer with two merges, without which transformers reads none from a GGUF file."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<s>": 256, "</s>": 257, "th": 258, "he": 259}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("h", "e")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def written(place, architecture="Qwen3", seed=0):
    """A GGUF file of a tiny model whose linears are Q4_0, and that model."""
    settings = {"use_sliding_window": False} if architecture == "Qwen2" else {}
    model, tokenizer = build_of(architecture, vocab_size=260, **settings), tokenizer_of_pairs()
    model.model.embed_tokens.weight[0] += seed
    quantize_model(model, make_quantizer(RTN))
    place.mkdir(parents=True, exist_ok=True)
    gguf.write(model, tokenizer, place / "tiny-Q4_0.gguf")
    return place / "tiny-Q4_0.gguf", model


class TestGGUF(SourceConformance):
    def make(self, place):
        return File(path=str(written(place)[0]))

    def other(self, place):
        return File(path=str(written(place, seed=1)[0]))

    def broken(self, place):
        whole, _ = written(place)
        cut = whole.with_name("cut.gguf")
        cut.write_bytes(whole.read_bytes()[:-3000])
        return [File(), File(path=str(place / "missing")), File(path=str(cut))]


class TestFolder(SourceConformance):
    """A mixture in GGUF beside its config.json and tokenizer."""

    def make(self, place, seed=0):
        _, model = written(place, "Qwen3Moe", seed)
        model.config.save_pretrained(place)
        tokenizer_of_pairs().save_pretrained(place)
        return File(path=str(place))

    def other(self, place):
        return self.make(place, seed=1)

    def broken(self, place):
        source = self.make(place)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
        return [source]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["Qwen3", "Llama", "Qwen2"])
def test_the_model_is_what_the_file_stands_for(tmp_path, architecture):
    path, model = written(tmp_path, architecture)
    loaded = File(path=str(path)).load(torch.float32, CPU, tmp_path)
    ids = torch.arange(60)[None]
    assert torch.equal(loaded.model(ids).logits, model.eval()(ids).logits)
    assert loaded.note == (
        "a stand-in for the original, dequantized from GGUF Q4_0 and F32, by qbench: differences are to this, not to "
        "16-bit weights"
    )


def test_weights_of_another_name_are_read_and_their_settings_count(tmp_path):
    model, tokenizer = build_of("Qwen3"), tokenizer_of_pairs()
    quantize_model(model, make_quantizer(RTN))
    Packed().save(model, tokenizer, tmp_path / "packed", {"quantizer": RTN})
    source = File(path=str(tmp_path / "packed"))
    loaded, ids = source.load(torch.float32, CPU, tmp_path).model, torch.arange(100)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    before = source.fingerprint()
    (tmp_path / "packed" / "merges.txt").write_text("a b")
    assert source.fingerprint() != before


def test_a_file_of_weights_alone_asks_for_its_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    with pytest.raises(RequestError, match="name its folder"):
        File(path=str(tmp_path / "model.safetensors")).place()


def test_it_goes_by_the_files_name():
    assert File(path="/some/SmolLM2-Q4_K_M.gguf").named(["path"]).name == "SmolLM2-Q4_K_M"
    assert File(name="mine", path="/some/SmolLM2-Q4_K_M.gguf").named(["path"]).name == "mine"


def test_a_head_of_its_own_in_the_file_unties_the_model(tmp_path):
    model = build_of("Qwen3", tie_word_embeddings=False)
    tokenizer = byte_tokenizer()
    gguf.write(model, tokenizer, tmp_path / "model.gguf")
    model.config.tie_word_embeddings = True
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = File(path=str(tmp_path)).load(torch.float32, CPU, tmp_path).model
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_slowed_rotary_frequencies_ask_for_the_configuration(tmp_path):
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = build_of("Llama", rope_parameters=scaling)
    tokenizer = byte_tokenizer()
    path = tmp_path / "model.gguf"
    gguf.write(model, tokenizer, path)
    with pytest.raises(RequestError, match=r"model.gguf slows its rotary frequencies down.*config.json"):
        File(path=str(path)).configuration()
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, ids = File(path=str(tmp_path)).load(torch.float32, CPU, tmp_path).model, torch.arange(100)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
