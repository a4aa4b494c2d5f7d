"""Random weights of real shapes: the published sizes, blocks that depend on nothing but the seed, and a chain."""

import json
from importlib import resources
from pathlib import Path

import pytest
import torch

from qbench.errors import RequestError
from qbench.passes.chain import Chain
from qbench.sources import skeleton
from qbench.sources.ahead import ahead
from qbench.sources.random import Drawn, Random
from qbench.sources.shapes import SHAPES, configuration
from tests.conftest import refused
from tests.sources.cases import CPU, assert_same, gpu, needs_cuda, tensors

# as the Hub shows for each repository, the head that is tied to the embedding counted once
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "phi-4": 14_659_507_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2.5": 235_741_434_880,
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_the_published_number_of_parameters(name):
    model = skeleton.make(configuration(name), torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_a_block_depends_on_the_seed_and_its_number_alone():
    torch.manual_seed(1)
    source = Drawn("smollm2-135m", 0, torch.bfloat16, CPU, layers=3)
    state = torch.get_rng_state()
    one, two = source.block(1), source.block(2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = Drawn("smollm2-135m", 0, torch.bfloat16, CPU)
    assert len(again) == 30
    assert_same(tensors(again.block(2)), tensors(two))
    assert_same(tensors(source.block(1)), tensors(one))
    assert not torch.equal(one.mlp.up_proj.weight, two.mlp.up_proj.weight)
    assert not torch.equal(one.self_attn.k_proj.weight, one.self_attn.v_proj.weight)
    other = Drawn("smollm2-135m", 1, torch.bfloat16, CPU).block(1)
    assert not torch.equal(one.mlp.up_proj.weight, other.mlp.up_proj.weight)
    assert one.input_layernorm.weight.unique().tolist() == [1]
    assert one.mlp.up_proj.weight.float().std().item() == pytest.approx(0.02, rel=0.01)


def test_it_is_a_chain_that_runs():
    source = Drawn("smollm2-135m", 0, torch.float32, CPU, layers=2)
    model = source.rest()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert source.bytes_of_block(None) == 4 * (49152 * 576 + 576)
    chain = Chain.of(model)
    ids = torch.tensor([[1, 2, 3, 4]])
    states, calls = chain.begin(ids)
    for i, block in ahead(source.block, range(len(source)), CPU):
        states = chain.block(i, states, calls, block)
    logits = chain.finish(states, ids)
    assert logits.shape == (1, 4, 49152)
    for i in range(2):
        model.model.layers[i] = source.block(i)
    assert torch.equal(model(ids).logits, logits)


def test_what_is_not_known_is_refused():
    with pytest.raises(RequestError) as error:
        Drawn("qwen3-8", 0, torch.float32, CPU)
    refused(error.value, "model.shape", ["qwen3-8b"])
    for layers in (0, 37):
        with pytest.raises(
            RequestError, match=f"model.layers={layers} must be between 1 and 36, the layers of qwen3-8b"
        ):
            Drawn("qwen3-8b", 0, torch.float32, CPU, layers)


@pytest.mark.parametrize(
    ("settings", "given", "name", "fingerprint"),
    [
        ({}, (), "random-qwen3-8b", "random:1:qwen3-8b:36layers:seed0"),
        ({"layers": 36}, ("layers",), "random-qwen3-8b-36layers", "random:1:qwen3-8b:36layers:seed0"),
        ({"layers": 2, "seed": 3}, (), "random-qwen3-8b-2layers-seed3", "random:1:qwen3-8b:2layers:seed3"),
        ({"layers": 2, "seed": 3, "name": "mine"}, ("seed",), "mine-seed3", "random:1:qwen3-8b:2layers:seed3"),
        ({"layers": 2, "name": "mine"}, ("shape",), "mine", "random:1:qwen3-8b:2layers:seed0"),
    ],
)
def test_a_name_that_is_its_own_and_a_fingerprint_of_what_is_drawn(settings, given, name, fingerprint):
    source = Random(shape="qwen3-8b", **settings)
    assert source.named(given).name == name
    assert source.fingerprint() == fingerprint


def test_every_model_of_the_hub_that_is_configured_has_a_shape():
    folder = resources.files("qbench.conf") / "model"
    hub = [f.name.removesuffix(".yaml") for f in folder.iterdir() if "\nid: " in f.read_text() and f.name != "hub.yaml"]
    assert {"qwen3-8b", "phi-4", "llama-3.1-8b"} <= {*hub} <= {*SHAPES}


def test_the_yaml_lists_the_shapes():
    text = (resources.files("qbench.conf") / "model" / "random.yaml").read_text(encoding="utf-8")
    listed = text.partition("Shapes:")[2].partition("name:")[0].replace("#", " ").replace(",", " ").split()
    assert listed == sorted(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_room_for_the_byte_tokenizer(name):
    source = Random(shape=name, layers=1)
    tokenizer, config = source.tokenizer(None), source.configuration()
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(tokenizer) == 258 <= config.vocab_size
    assert config.num_hidden_layers == len(source.skeleton().model.layers) == 1


@pytest.mark.parametrize(
    ("settings", "key", "names"),
    [
        ([], "model.shape", SHAPES),
        (["model.shape=qwen3-9b"], "model.shape", ["did you mean 'qwen3-8b'?", *SHAPES]),
        (["model.shape=qwen3-8b", "model.layers=37"], "model.layers", ["between 1 and 36"]),
        (["model.shape=qwen3-8b", "model.layers=0"], "model.layers", ["between 1 and 36"]),
        (["model.architecture=dense"], "model.architecture", ["model.shape", "model.layers", "model.seed"]),
    ],
)
def test_what_a_command_asks_wrongly_is_one_sentence(qbench, settings, key, names):
    refused(qbench("model=random", *settings, "task.max_windows=1"), key=key, names=names)


@pytest.mark.slow
def test_the_plan_of_a_model_of_any_size(qbench):
    """Nothing is drawn."""
    outcome = qbench("model=random", "model.shape=qwen3-30b-a3b", "quantizer=rtn", "task.max_windows=1", "--dry-run")
    assert outcome.status == 0, outcome.stderr
    assert 16e9 < outcome.summary["plan"][0]["estimated_model_bytes"] < 20e9


@pytest.mark.slow
def test_a_point_of_a_random_model(qbench):
    request = ("model=random", "model.shape=smollm2-135m", "model.layers=1", "quantizer=rtn", "task.max_windows=1")
    outcome = qbench(*request)
    assert outcome.status == 0, outcome.stderr
    assert outcome.summary["model"] == "random-smollm2-135m-1layers"
    assert outcome.summary["fingerprint"] == "random:1:smollm2-135m:1layers:seed0"
    [result] = [json.loads(path.read_text()) for path in Path("outputs/results").glob("*/result.json")]
    assert result["model"]["note"] == "seeded random weights: perplexities mean nothing"
    assert 1e4 < outcome.summary["baseline_ppl"] < 1e6  # near the size of the vocabulary


@gpu
@needs_cuda
def test_a_mixture_too_large_for_the_gpu_streams_through_it():
    source = Drawn("deepseek-v2.5", 0, torch.bfloat16, torch.device("cuda"))
    chain = Chain.of(source.rest())
    ids = torch.arange(512, device="cuda").view(2, 256)
    states, calls = chain.begin(ids)
    torch.cuda.reset_peak_memory_stats()
    rest = torch.cuda.memory_allocated()
    for i, block in ahead(source.block, range(6), torch.device("cuda")):
        states = chain.block(i, states, calls, block)
        assert states.isfinite().all()
    assert torch.cuda.max_memory_allocated() - rest < 2.2 * source.bytes_of_block(5)
