"""GGUF files: every architecture's tensors come back as the model has them, every type to the reference's bits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants

from qbench.checkpoint import gguf as checkpoint
from qbench.format.format import Format
from qbench.format.gguf import GGUFLatent
from qbench.layers.expert_form import expert_weights, form, stacked_parameters
from qbench.model.linears import find_linears
from qbench.passes.quantize import quantize_model
from qbench.readers.gguf import GGUF
from qbench.readers.reader import ReadError
from qbench.registry import make_quantizer
from qbench.sources.tiny import byte_tokenizer
from qbench.testing import ReaderConformance
from tests.conftest import refused
from tests.passes.architectures import build
from tests.readers.gguf_files import ARCHITECTURES, converted, made, meta, settings_of, write

WIDE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=1)


def own_weights(model) -> dict[str, torch.Tensor]:
    """By the names of an open file: experts' matrices one by one."""
    found = {}
    for path, module in model.named_modules():
        if stacked_parameters(module):
            for index in range(module.num_experts):
                matrices = zip(form(module).projections, expert_weights(module, index), strict=True)
                found |= {f"{path}.{index}.{projection}.weight": weight for projection, weight in matrices}
    stacks = {f"{path}.{key}" for path, module in model.named_modules() for key in stacked_parameters(module)}
    return found | {name: value for name, value in model.state_dict().items() if name not in stacks}


class TestGGUF(ReaderConformance):
    """Q8_0 and Q4_1 by gguf's own encoder, embedding included; decoded by gguf's decoder."""

    architecture = "qwen3"

    def make(self):
        return GGUF()

    def write(self, model, folder):
        tensors, expected = converted(model, self.architecture), {}
        matrices = [name for name, value in tensors.items() if value.ndim > 1 and "gate_inp" not in name]
        types = {name: "Q4_1" if "down" in name or "embd" in name else "Q8_0" for name in matrices}
        path = write(folder / "model.gguf", self.architecture, tensors, settings_of(model.config), types)
        stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        decoded = {name: quants.dequantize(held.data, held.tensor_type) for name, held in stored.items()}
        held = GGUF().open(path, meta(model))
        for name, weight in held.weights.items():
            piece = weight.pieces[0]
            rows = decoded[piece.stored.name].reshape(piece.stored.rows, -1)
            rows = rows[piece.start :][: piece.rows if piece.rows else None]
            expected[name] = torch.from_numpy(rows.reshape(weight.shape).copy())
        return path, expected


class TestMixture(TestGGUF):
    kind = "moe"
    architecture = "qwen3moe"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_comes_back_to_the_bit(name, tmp_path):
    model, arch = made(name), ARCHITECTURES[name]
    path = write(tmp_path / "model.gguf", arch, converted(model, arch), settings_of(model.config))
    held, expected = GGUF().open(path, meta(model)), own_weights(model)
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    assert held.entries.keys() == expected.keys()
    assert held.made_by == "GGUF F32"
    assert held.file_bytes == path.stat().st_size
    assert not held.ignored
    for key, value in expected.items():
        found = held.read(key)
        assert tuple(found.shape) == held.entries[key].shape == tuple(value.shape), key
        if arch.startswith("gemma") and key.endswith("norm.weight"):
            assert torch.equal(found, value + 1 - 1)
        else:
            assert torch.equal(found, value), key


TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
TYPES += ["IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"]
TYPES += [pytest.param("IQ3_S", marks=pytest.mark.slow)]  # whose encoder makes tables first


@pytest.mark.parametrize("type", TYPES)
def test_a_llama_in_each_type_is_what_the_reference_decodes(type, tmp_path):
    pytest.importorskip("libgguf", reason="the encoder; it comes with the extra gguf")
    model = build("Llama", **WIDE)
    skeleton = meta(model)
    quantize_model(model, make_quantizer({"name": f"gguf/{type.lower()}"}))
    checkpoint.write(model, byte_tokenizer(), path := tmp_path / "model.gguf")
    held, stored = GGUF().open(path, skeleton), {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {f"{kind}_proj": f"ffn_{kind}" for kind in ("gate", "up", "down")}
    linears = [name for name in held.entries if name.endswith("_proj.weight")]
    assert len(linears) == 7
    for name in linears:
        short, tensor = name.split(".")[-2], stored[f"blk.0.{names[name.split('.')[-2]]}.weight"]
        expected = quants.dequantize(tensor.data, tensor.tensor_type)
        if short in ("q_proj", "k_proj"):
            heads = model.config.num_attention_heads if short == "q_proj" else model.config.num_key_value_heads
            expected = expected.reshape(heads, -1, 2, 256).swapaxes(1, 2).reshape(-1, 256)
        found = held.read(name)
        assert isinstance(found, Format)
        assert held.entries[name].kind == tensor.tensor_type.name == type
        assert held.entries[name].nbytes == found.nbytes == tensor.n_bytes
        assert np.array_equal(found.dequantize().numpy().view(np.uint32), expected.view(np.uint32))
        linear = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(found.dequantize(), linear.quantized.dequantize())


@pytest.mark.parametrize("quantized", [False, True])
def test_the_two_parts_of_a_latent_projection_are_one_weight(quantized, tmp_path):
    model = build("DeepseekV2", kv_lora_rank=32, qk_nope_head_dim=32, v_head_dim=32)
    tensors = converted(model, "deepseek2", latent=True)
    types = {name: "Q8_0" if "k_b" in name else "Q5_1" for name in tensors if re.search("_[kv]_b", name)}
    path = write(tmp_path / "m.gguf", "deepseek2", tensors, settings_of(model.config), types if quantized else {})
    held, name = GGUF().open(path, meta(model)), "model.layers.1.self_attn.kv_b_proj.weight"
    found, expected = held.read(name), model.state_dict()[name]
    assert held.entries[name].quantized == quantized
    if not quantized:
        assert torch.equal(found, expected)
        return
    assert isinstance(found, GGUFLatent)
    assert held.entries[name].kind == "Q8_0 and Q5_1"
    assert float((found.dequantize() - expected).norm() / expected.norm()) < 0.05


def test_experts_that_are_stored_as_gate_and_up_in_one_or_alone(tmp_path):
    model = build("Qwen3Moe")
    tensors, expected = converted(model, "qwen3moe"), own_weights(model)
    for block in range(3):
        gate, up = (tensors.pop(f"blk.{block}.ffn_{kind}_exps.weight") for kind in ("gate", "up"))
        if block < 2:
            tensors[f"blk.{block}.ffn_gate_up_exps.weight"] = np.concatenate([gate, up], 1)
        else:
            for kind, stack in (("gate", gate), ("up", up)):
                tensors |= {f"blk.{block}.ffn_{kind}.{index}.weight": stack[index] for index in range(4)}
    held = GGUF().open(write(tmp_path / "m.gguf", "qwen3moe", tensors, settings_of(model.config)), meta(model))
    for name in held.entries:
        assert torch.equal(held.read(name), expected[name]), name


def test_one_expert_is_read_and_not_the_stack(tmp_path):
    model = build("Qwen3Moe")
    tensors = converted(model, "qwen3moe")
    types = {name: "Q8_0" for name in tensors if "_exps" in name}
    held = GGUF().open(write(tmp_path / "m.gguf", "qwen3moe", tensors, settings_of(model.config), types), meta(model))
    entry = held.entries["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert (entry.shape, entry.kind, entry.nbytes) == ((32, 64), "Q8_0", 32 * 2 * 34)
    found = held.read("model.layers.1.mlp.experts.2.up_proj.weight")
    encoded = quants.quantize(tensors["blk.1.ffn_up_exps.weight"][2], GGMLQuantizationType.Q8_0)
    expected = quants.dequantize(encoded, GGMLQuantizationType.Q8_0)
    assert np.array_equal(found.dequantize().numpy(), expected)


def test_a_split_file_is_one_model(tmp_path):
    model = build("Llama")
    tensors = converted(model, "llama")
    write(tmp_path / "m.gguf", "llama", tensors, settings_of(model.config), split_max_tensors=20)
    parts = sorted(tmp_path.glob("m-*-of-*.gguf"))
    assert len(parts) == 2
    for place in (*parts, tmp_path):
        assert GGUF().recognizes(place)
        held = GGUF().open(place, meta(model))
        assert held.file_bytes == sum(part.stat().st_size for part in parts)
        assert all(torch.equal(held.read(name), value) for name, value in own_weights(model).items())
    parts[1].unlink()
    with pytest.raises(ReadError, match=r"m-00002-of-00002.gguf is not beside it"):
        GGUF().open(parts[0], meta(model))
    alone = parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(ReadError, match=r"alone.gguf is one of 2 parts, whose names must end"):
        GGUF().open(alone, meta(model))


def test_what_changes_nothing_is_ignored_with_a_reason(tmp_path):
    model = build("Llama")
    tensors = converted(model, "llama") | {"rope_freqs.weight": np.ones(8, np.float32)}
    held = GGUF().open(write(tmp_path / "m.gguf", "llama", tensors, settings_of(model.config)), meta(model))
    assert held.ignored == {"rope_freqs.weight": "rotary factors: the model makes its own from its configuration"}


def test_a_head_of_its_own_or_none(tmp_path):
    model = build("Llama")
    tensors = converted(model, "llama")
    tensors.pop("output.weight")
    held = GGUF().open(write(tmp_path / "m.gguf", "llama", tensors, settings_of(model.config)), meta(model))
    assert torch.equal(held.read("lm_head.weight"), model.model.embed_tokens.weight)
    tied = build("Qwen3", tie_word_embeddings=True)
    tensors = converted(tied, "qwen3") | {"output.weight": np.ones((258, 64), np.float32)}
    held = GGUF().open(write(tmp_path / "t.gguf", "qwen3", tensors, settings_of(tied.config)), meta(tied))
    assert torch.equal(held.read("lm_head.weight"), torch.ones(258, 64))


def test_a_folder_with_several_models_asks_which(tmp_path):
    model = build("Llama")
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf"):
        write(tmp_path / name, "llama", converted(model, "llama"), settings_of(model.config))
    assert GGUF().recognizes(tmp_path)
    with pytest.raises(ReadError, match=r"holds 2 GGUF models, and one is to be named, as .*/a.gguf: a.gguf, b.gguf$"):
        GGUF().open(tmp_path, meta(model))
    assert not GGUF().recognizes(tmp_path / "missing.gguf")


@pytest.fixture
def wide(tmp_path):
    """A folder with a tiny model whose rows are one block of 256, and the model."""
    folder, model = tmp_path / "wide", build("Llama", **WIDE, tie_word_embeddings=True)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder, model


def test_the_bits_of_a_quantized_embedding_are_counted(wide, qbench, tmp_path):
    """As in a Q4_K_M: linears in one type, the embedding, which is the head as well, in a larger one."""
    pytest.importorskip("libgguf", reason="the encoder; it comes with the extra gguf")
    folder, model = wide
    types = {name: "Q6_K" if "embd" in name else "Q4_K" for name in converted(model, "llama")}
    types = {name: type for name, type in types.items() if "norm" not in name}
    path = write(tmp_path / "m.gguf", "llama", converted(model, "llama"), settings_of(model.config), types)
    point = ("model=local", f"model.path={folder}", "task.max_windows=1", "task.window=64")
    summary = qbench(*point, "quantizer=file", f"quantizer.path={path}").summary
    linears, embedding = find_linears(model).quantizable, model.model.embed_tokens.weight.numel()
    norms = sum(parameter.numel() for parameter in model.parameters()) - linears - embedding
    assert (summary["bits_per_weight"], summary["embedding_bits"], summary["head_bits"]) == (4.5, 6.5625, 6.5625)
    assert summary["model_bytes"] == linears * 4.5 / 8 + embedding * 6.5625 / 8 + 2 * norms
    assert summary["kl"] > 0


@pytest.mark.slow  # libgguf makes tables first
def test_two_bits_take_their_matrix_from_the_calibration_text(wide, qbench):
    pytest.importorskip("libgguf", reason="the encoder; it comes with the extra gguf")
    short = ("task.max_windows=1", "task.window=64", "calibration.window=64", "calibration.sequences=2")
    point = ("model=local", f"model.path={wide[0]}", *short)
    outcome = qbench(*point, "quantizer=gguf/iq2_xxs")
    assert outcome.summary["bits_per_weight"] == 2.0625
    (result,) = Path("outputs/results").glob("*/result.json")
    assert json.loads(result.read_text())["quantization"]["calibration"]["tokens"] == 128
    refused(qbench(*point, "quantizer=gguf/iq2_xxs", "quantizer.imatrix=false"), "quantizer.imatrix", ["IQ2_XXS"])
