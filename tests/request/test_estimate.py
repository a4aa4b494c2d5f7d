"""Sizes by arithmetic are those of the model itself, and a plan of plain decoders imports no model's code."""

import json
import subprocess
import sys

import pytest
import torch

from qbench.model.linears import block_list, find_linears, matrix
from qbench.request import plain
from qbench.sources import tiny
from qbench.sources.shapes import SHAPES
from qbench.sources.smollm2 import SmolLM2

SMALL = dict(
    vocab_size=101,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 10}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 10}),
        ("qwen3", {"head_dim": 6, "attention_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_sizes_by_arithmetic_are_those_of_the_model(kind, change):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **SMALL | change)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    known = plain.sizes(json.loads(config.to_json_string()))
    found = find_linears(model)
    assert known.parameters == sum(p.numel() for p in model.parameters())
    assert {name: tuple(layer.weight.shape) for name, layer in known.found.layers.items()} == {
        name: tuple(matrix(layer).shape) for name, layer in found.layers.items()
    }
    assert sum(known.shapes.values()) == len(found.layers)
    assert known.found.skipped == found.skipped == []
    prefix = block_list(model)
    assert known.largest_block == sum(p.numel() for p in model.get_submodule(f"{prefix}.0").parameters())
    assert known.outside == known.parameters - 3 * known.largest_block
    assert (known.hidden, known.vocabulary) == (24, 101)


def test_the_built_in_models_are_described_as_they_are():
    dense = tiny.build("dense", 0)[0]
    assert plain.sizes(tiny.Tiny(architecture="dense").config_json()).parameters == sum(
        p.numel() for p in dense.parameters()
    )
    assert tiny.Tiny(architecture="moe").config_json() is None
    assert plain.sizes(SmolLM2().config_json()).parameters == 134_515_008


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma2"},
        {"tie_word_embeddings": None},
        {"num_key_value_heads": None},
        {"hidden_size": "24"},
        {"auto_map": {"AutoModel": "x.Y"}},
        {"quantization_config": {"bits": 4}},
        {"model_type": "qwen3", "head_dim": None},
    ],
)
def test_what_is_not_known_to_be_plain_is_left_to_the_model(change):
    assert plain.sizes({"model_type": "llama", **SMALL}) is not None
    assert plain.sizes({"model_type": "llama", **SMALL} | change) is None
    assert plain.sizes({}) is None


def test_published_shapes_are_those_of_their_names():
    kind, shape = SHAPES["llama-3.1-8b"]
    assert kind == "LlamaConfig"
    assert plain.sizes({"model_type": "llama", **shape}).parameters == 8_030_261_248


@pytest.mark.slow
def test_a_plan_of_a_plain_model_imports_no_models_code(tmp_path):
    """Which takes longer than all the rest of it. Torch is imported: a method is asked what it stores of a matrix."""
    packages = (
        "transformers",
        "lm_eval",
        "datasets",
        "wandb",
        "scipy",
        "pandas",
        "triton",
        "tokenizers",
        "torch._dynamo",
    )
    arguments = ["-m", "model=tiny-dense,smollm2-135m", "quantizer=rtn,sinq", "--dry-run"]
    code = (
        f"import sys; sys.argv[1:] = {arguments}; from qbench.__main__ import main; assert main() == 0;"
        f"print([name for name in {packages} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "[]"
    sizes = json.loads(done.stdout.splitlines()[-1])["passes"]
    assert [size["model"] for size in sizes] == ["tiny-dense", "smollm2-135m"]
    assert sizes[1]["state_bytes"] == sizes[1]["tokens"] * 576 * 4 * 3
