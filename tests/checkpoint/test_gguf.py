"""GGUF files of ours: exact where it is said, with llama.cpp's settings, and refused in a sentence where not."""

from __future__ import annotations

import pytest
import torch
from gguf import GGUFReader

from qbench.checkpoint import gguf
from qbench.errors import RequestError
from qbench.format.gguf import of_blocks
from qbench.passes.quantize import quantize_model
from qbench.quant.quantizer import Quantizer
from qbench.readers.gguf import GGUF
from qbench.registry import make_quantizer
from qbench.sources.file import File
from qbench.sources.tiny import byte_tokenizer
from qbench.testing import gaussian
from tests.passes.architectures import build
from tests.readers.gguf_files import meta

ORIGIN = {"run_id": "0123456789ab"}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def rtn(**settings) -> Quantizer:
    return make_quantizer({"name": "rtn", "nbits": 4, "group_size": 32, "symmetric": True} | settings)


class AsTheyAre(Quantizer):
    def quantize_one(self, weight, stats=None):
        return of_blocks("F32", weight.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("nbits", "type"), [(4, "Q4_0"), (8, "Q8_0")])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_symmetric_integers_are_a_type_to_the_bit(nbits, type, group_size):
    weight = rtn(nbits=nbits, group_size=group_size).quantize_one(gaussian(6, 192))
    blocks = gguf.as_blocks(weight)
    assert blocks.type == type
    assert torch.equal(blocks.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"symmetric": False}, "it stores zero points, which GGUF's minima in fp16 would round"),
        ({"nbits": 3}, "codes of 3 bits in groups of 32 are no type of GGUF"),
        ({"group_size": 48}, "in groups of 48 are no type"),
        ({"aux_dtype": "int8"}, "use quantizer.aux_dtype=fp16"),
    ],
)
def test_what_is_no_type_is_said(settings, sentence):
    weight = rtn(**settings).quantize_one(gaussian(4, 192))
    assert sentence in gguf.format_refusal(weight)
    with pytest.raises(RequestError, match=r"\w"):
        gguf.as_blocks(weight)


TURNS = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN |= {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256}
LONG |= {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
SCALED = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
KINDS = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": SCALED}
WRITTEN = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": False},
    "Qwen3": {},
    "Mixtral": {},
    "Qwen3Moe": {"norm_topk_prob": True},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "Gemma3Text": {"num_hidden_layers": 7, "layer_types": TURNS, "rope_parameters": KINDS},
    "Phi3": {"rope_parameters": LONG},
    "DeepseekV2": {"q_lora_rank": 32, "kv_lora_rank": 32, "topk_method": "greedy", "rope_parameters": YARN},
}


def made(name, **settings):
    """A small model whose norms are no ones, and are numbers of 16 bits as in published models."""
    model = build(name, **settings)
    for key, value in model.named_parameters():
        if "norm" in key:
            value += gaussian(1, value.numel())[0].bfloat16() / 4
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_read_back_to_the_bit(name, tmp_path):
    model = made(name, **WRITTEN[name])
    assert gguf.GGUF().refuse_model(model, rtn()) is None
    quantize_model(model, rtn())
    gguf.GGUF().save(model, byte_tokenizer(), tmp_path / "out", ORIGIN)
    held = GGUF().open(tmp_path / "out", meta(model))
    for path, module in model.named_modules():
        if hasattr(module, "packed"):
            for prefix, weight in module.packed().items():
                dense = weight.dequantize()
                for index, expected in enumerate(dense) if dense.dim() == 3 else [(None, dense)]:
                    key = f"{path}.weight" if index is None else f"{path}.{index}.{prefix}weight"
                    assert held.entries[key].kind == "Q4_0"
                    assert torch.equal(held.read(key).dequantize(), expected), key
    for key, value in model.named_parameters():
        assert torch.equal(held.read(key), value), key


@torch.no_grad()
@pytest.mark.parametrize("name", WRITTEN)
def test_the_file_computes_what_the_packed_model_does(name, tmp_path):
    model = made(name, **WRITTEN[name])
    quantize_model(model, rtn())
    gguf.GGUF().save(model, byte_tokenizer(), tmp_path / "out", ORIGIN)
    loaded = File(path=str(tmp_path / "out")).load(torch.float32, torch.device("cpu"), tmp_path).model
    ids = torch.arange(40)[None] * 7 % 256
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_settings_are_those_that_llama_cpp_asks_for(tmp_path):
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = build("Llama", rope_parameters=scaling)
    gguf.write(model, byte_tokenizer(), tmp_path / "model.gguf")
    reader = GGUFReader(tmp_path / "model.gguf")
    found = {key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")}
    assert found == {
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 3,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": 258,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.freq_base": 500000.0,
    }
    assert reader.fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 258
    [factors] = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    assert factors.shape == (8,)
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(8)


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("Olmo2", {}, "a olmo2 model is not written as GGUF here; known are llama"),
        ("Gemma2", {"layer_types": ["sliding_attention"] * 3}, "its layers do not take turns as llama.cpp's do"),
        ("Gemma2", WRITTEN["Gemma2"] | {"query_pre_attn_scalar": 32}, "llama.cpp divides by the root of 16"),
        ("Gemma2", WRITTEN["Gemma2"] | {"final_logit_softcapping": None}, "it caps no scores or no logits"),
        ("Gemma3Text", WRITTEN["Gemma3Text"] | {"final_logit_softcapping": 3.0}, "it caps scores or logits"),
        ("Gemma3Text", WRITTEN["Gemma3Text"] | {"use_bidirectional_attention": True}, "sees what follows"),
        (
            "Gemma3Text",
            WRITTEN["Gemma3Text"] | {"rope_parameters": KINDS | {"sliding_attention": SCALED}},
            "its layers with a window have other rotary positions",
        ),
        ("Gemma", {"hidden_act": "silu"}, "its MLP has the activation silu"),
        ("Phi3", {"sliding_window": 8}, "its attention sees a sliding window"),
        ("DeepseekV2", {"topk_method": "greedy"}, "its queries have no low rank"),
        ("DeepseekV2", {"topk_method": "group_limited_greedy", "n_group": 2}, "its router chooses experts within"),
        (
            "DeepseekV2",
            WRITTEN["DeepseekV2"] | {"rope_parameters": YARN | {"mscale": 1.0}},
            "an mscale that is not mscale_all_dim",
        ),
        ("Qwen2", {}, "its attention sees a sliding window"),
        ("Qwen3Moe", {}, "its router does not scale the chosen experts' weights"),
        ("Llama", {"mlp_bias": True}, "its MLP has biases"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "of the kind dynamic",
        ),
    ],
)
def test_a_model_that_llama_cpp_computes_otherwise_is_refused(name, settings, sentence, tmp_path):
    model = build(name, **settings)
    assert sentence in gguf.GGUF().refuse_model(model, rtn())
    quantize_model(model, AsTheyAre())
    with pytest.raises(RequestError, match=sentence.split(";")[0]):
        gguf.GGUF().save(model, byte_tokenizer(), tmp_path / "out", ORIGIN)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_no_block_divides_is_named():
    model = build("Llama", intermediate_size=144)
    assert gguf.GGUF().refuse_model(model, rtn()) == (
        "layer model.layers.0.mlp.down_proj has 144 input channels, which groups of 32 and 32 do not divide"
    )
