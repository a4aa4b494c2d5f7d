"""Calibration: the groups are observed, the statistics are right, and each block sees the prefix it is to see."""

import gc
import weakref
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from qbench.config import CalibrationConfig
from qbench.errors import PointError, RequestError
from qbench.evaluate.text import Text
from qbench.layers.linear import QuantLinear
from qbench.passes import shown
from qbench.passes.calibrate import INPUTS, Calibration, cut_sequences, quantize_blocks
from qbench.passes.quantize import quantize_linears, quantize_model, replace_module
from qbench.plugins.rtn import RTN
from qbench.quant.quantizer import Quantizer, Statistic
from qbench.sources.tiny import build, byte_tokenizer
from tests.conftest import refused
from tests.test_cli import recorded

EVERYTHING = frozenset(Statistic)


@dataclass(frozen=True)
class Watcher(Quantizer):
    """Rounds to nearest, and asks for every statistic."""

    needs: ClassVar[frozenset[Statistic]] = EVERYTHING

    def quantize_one(self, weight, stats=None):
        return RTN(nbits=3, group_size=16).quantize_one(weight)


def calibration(sequences=3, window=40):
    ids = np.random.default_rng(0).integers(0, 256, (sequences, window))
    return Calibration(ids, "test", "0")


def collect(model, quantize=None, inputs="quantized"):
    """{first layer of the group: (names, statistics)} in the order of the calls."""
    found = {}

    def note(group, stats):
        found[next(iter(group))] = (list(group), stats)
        if quantize is not None:
            for name, (module, _) in quantize_linears(group, quantize, stats).items():
                replace_module(model, name, module)

    text = replace(calibration(), inputs=inputs)
    quantize_blocks(model, Watcher(), text, note, lambda name, module, inputs: None)
    return found


def inputs_of(model, name, ids):
    """What the layer is really handed in plain forward passes, `[tokens, in]`."""
    rows = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for sequence in ids:
            model(torch.from_numpy(sequence)[None])
    handle.remove()
    return torch.cat(rows)


def test_groups_are_the_linears_that_read_one_tensor():
    groups = [names for names, _ in collect(build("dense", 0)[0].eval()).values()]
    expected = []
    for i in (0, 1):
        layer = f"model.layers.{i}"
        expected += [
            [f"{layer}.self_attn.{p}_proj" for p in "qkv"],
            [f"{layer}.self_attn.o_proj"],
            [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"],
            [f"{layer}.mlp.down_proj"],
        ]
    assert groups == expected


def sliding():
    """The blocks differ in what they attend to and in their rotary positions."""
    kinds = ["sliding_attention", "full_attention"]
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**shape, vocab_size=258, num_key_value_heads=2, sliding_window=8, layer_types=kinds)
    )


def zamba2():
    """Its blocks are handed the embeddings of the tokens besides, by position, and share a transformer block."""
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, n_mamba_heads=4)
    kinds = dict(layers_block_type=["mamba", "hybrid", "hybrid"], hybrid_layer_ids=[1, 2])
    mamba = dict(mamba_d_state=8, mamba_headdim=32, mamba_ngroups=1, num_mem_blocks=1, adapter_rank=8)
    return Zamba2ForCausalLM(Zamba2Config(**shape, **kinds, **mamba, vocab_size=258, num_key_value_heads=4))


@pytest.mark.parametrize(
    "make",
    [lambda: build("dense", 0)[0], sliding, lambda: gemma4(), lambda: recurrent_gemma(), zamba2],
    ids=["qwen3", "gemma3", "gemma4", "recurrent_gemma", "zamba2"],
)
def test_statistics_equal_those_of_plain_forward_passes(make):
    """Also the proof that the attention is causal and positions are right: the passes are the model's own."""
    model = make().eval()
    for name, (_, stats) in collect(model).items():
        x = inputs_of(model, name, calibration().ids)
        assert stats.tokens == 120
        torch.testing.assert_close(stats.absmean, x.abs().mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(stats.hessian, x.T @ x, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stats.inputs, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: build("dense", 0)[0], sliding, lambda: gemma4()], ids=["qwen3", "3", "4"])
def test_sequences_in_batches_give_the_same_statistics(make, monkeypatch):
    torch.manual_seed(0)
    model = make().eval()
    alone = collect(model)
    monkeypatch.setitem(shown.BATCH_TOKENS, "cpu", 80)  # two of the three sequences, then one
    together = collect(model)
    assert list(alone) == list(together)
    for name, (group, stats) in together.items():
        assert group == alone[name][0]
        torch.testing.assert_close(stats.hessian, alone[name][1].hessian, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stats.inputs, alone[name][1].inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inputs", INPUTS)
def test_no_more_of_a_block_runs_than_is_asked_for(inputs):
    """One batch tells what there is; from the next on down is not multiplied until the block is quantized."""
    model = build("dense", 0)[0].eval()
    calls = {0: 0, 1: 0}
    for i, block in enumerate(model.model.layers):
        block.mlp.down_proj.register_forward_hook(lambda *_, i=i: calls.update({i: calls[i] + 1}))
    collect(model, inputs=inputs)
    # each sequence to see, and if it is to go on, again; nobody is shown what the last block gives out
    assert calls == ({0: 1 + 3, 1: 1} if inputs == "quantized" else {0: 3, 1: 3})


def test_no_statistics_outlive_their_turn():
    """Without help from the garbage collector, which comes when it likes: a Hessian can take half a gigabyte."""
    handed = []

    def note(group, stats):
        handed.append(weakref.ref(stats.hessian))
        assert sum(one() is not None for one in handed) == 1

    gc.disable()
    try:
        quantize_blocks(build("dense", 0)[0].eval(), Watcher(), calibration(), note, lambda name, module, inputs: None)
    finally:
        gc.enable()
    assert len(handed) == 8


def test_later_blocks_see_the_quantized_prefix():
    model = build("dense", 0)[0].eval()
    stats = collect(model, quantize=Watcher())
    name = "model.layers.1.self_attn.q_proj"
    seen = inputs_of(model, name, calibration().ids)  # block 0 is quantized by now
    torch.testing.assert_close(stats[name][1].inputs, seen, rtol=1e-4, atol=1e-5)
    fresh = inputs_of(build("dense", 0)[0].eval(), name, calibration().ids)
    assert (fresh - seen).norm() > 0.01 * seen.norm()


@pytest.mark.parametrize("make", [lambda: build("dense", 0)[0], sliding], ids=["qwen3", "gemma3"])
def test_original_inputs_are_those_of_the_unquantized_model(make):
    """What earlier blocks were quantized to has no say: equal to the bit, so rounding noise cannot grow either."""
    torch.manual_seed(0)
    model = make().eval()
    untouched = collect(deepcopy(model))
    stats = collect(model, quantize=Watcher(), inputs="original")
    assert isinstance(model.model.layers[0].mlp.down_proj, QuantLinear)
    assert list(stats) == list(untouched)
    for name, (group, found) in stats.items():
        assert group == untouched[name][0]
        assert torch.equal(found.hessian, untouched[name][1].hessian)
        assert torch.equal(found.inputs, untouched[name][1].inputs)


def test_sequences_are_cut_from_the_start():
    text = Text("abcdefghij" * 10, "t")
    cut = cut_sequences(text, byte_tokenizer(), CalibrationConfig(name="t", window=30))
    assert cut.ids.shape == (3, 30)
    limited = cut_sequences(text, byte_tokenizer(), CalibrationConfig(name="t", window=30, sequences=2))
    assert limited.ids.tolist() == cut.ids[:2].tolist()
    assert limited.token_ids_sha256 != cut.token_ids_sha256
    with pytest.raises(RequestError) as refusal:
        cut_sequences(text, byte_tokenizer(), CalibrationConfig(name="t", window=200))
    refused(refusal.value, key="calibration.window", names=["100 tokens", "200"])


def test_a_calibrated_method_without_calibration_is_refused():
    with pytest.raises(PointError, match="needs a calibration text"):
        quantize_model(build("dense", 0)[0], Watcher())


def test_a_linear_that_no_token_reaches_stays_in_16_bit_and_is_listed():
    model = build("dense", 0)[0]
    model.model.layers[1].mlp.unused = torch.nn.Linear(64, 64)
    rows, skipped = quantize_model(model, Watcher(), calibration())
    assert len(rows) == 14
    [row] = skipped
    assert (row.name, row.weights) == ("model.layers.1.mlp.unused", 64 * 64)
    assert row.reason == "no calibration token reached it"
    assert row.counted


def test_a_linear_that_only_a_later_sequence_reaches_is_calibrated_on_it():
    class Rare(torch.nn.Module):
        """An expert of its own: called with the tokens whose first hidden value is the largest of all sequences."""

        def __init__(self, inner, limit):
            super().__init__()
            self.inner, self.rare, self.limit = inner, torch.nn.Linear(64, 64), limit

        def forward(self, x):
            chosen = x[..., 0] >= self.limit
            out = self.inner(x)
            if chosen.any():
                out = out + torch.zeros_like(out).masked_scatter(chosen[..., None], self.rare(x[chosen]))
            return out

    model = build("dense", 0)[0].eval()
    x = inputs_of(model, "model.layers.0.mlp.gate_proj", calibration().ids)[:, 0].view(3, 40)
    last = int(x.amax(1).argmax())
    text = calibration()
    order = [i for i in range(3) if i != last] + [last]
    model.model.layers[0].mlp = Rare(model.model.layers[0].mlp, float(x.max()))
    rows, skipped = quantize_model(model, Watcher(), replace(text, ids=text.ids[order]))
    assert not skipped
    assert "model.layers.0.mlp.rare" in {row.name for row in rows}


def gemma4():
    """Every block is handed an embedding of its own of each token, and blocks share keys and values."""
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, head_dim=16)
    kinds = ["sliding_attention", "full_attention"] * 2
    return Gemma4ForCausalLM(
        Gemma4TextConfig(**shape, vocab_size=258, vocab_size_per_layer_input=258, hidden_size_per_layer_input=16,
                         num_key_value_heads=2, sliding_window=8, layer_types=kinds, num_kv_shared_layers=2)
    )  # fmt: skip


def recurrent_gemma():
    """Its blocks take their arguments by position."""
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, lru_width=64)
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**shape, vocab_size=258, attention_window_size=16))


@pytest.mark.slow
def test_calibrated_point_records_what_it_was_shown(qbench):
    tiny = ("model=tiny-dense", "task.max_windows=2", "quantizer=gptq", "calibration.sequences=4")
    outcome = qbench(*tiny)
    assert outcome.status == 0, outcome.stderr
    (result,) = recorded()
    shown = result.quantization.calibration
    assert (shown.sequences, shown.tokens, shown.text_source) == (4, 2048, "qbench.texts/mini-calibration.txt")
    assert {row.method for row in result.quantization.layers} == {"gptq"}
    assert all("damping" in row.diagnostics for row in result.quantization.layers)
    more = qbench(*tiny[:-1], "calibration.sequences=5")
    assert more.summary["run_id"] != outcome.summary["run_id"]
    original = qbench(*tiny, "calibration.inputs=original")
    assert {r.run_id: r.quantization.calibration.inputs for r in recorded()} == {
        outcome.summary["run_id"]: "quantized",
        more.summary["run_id"]: "quantized",
        original.summary["run_id"]: "original",
    }
    assert original.summary["ppl"] != outcome.summary["ppl"]
    free = [qbench(*tiny[:2], "quantizer=rtn", f"calibration.sequences={n}").summary["run_id"] for n in (4, 5)]
    assert free[0] == free[1]  # a calibration-free method is the same point whatever the calibration


def test_a_mixture_is_calibrated_from_the_command_line(qbench):
    outcome = qbench("model=tiny-moe", "task.max_windows=2", "quantizer=gptq", "calibration.sequences=2")
    assert outcome.status == 0, outcome.stderr
    (result,) = recorded()
    assert result.quantization.coverage > 0.99
    experts = [row for row in result.quantization.layers if ".experts." in row.name]
    assert len(experts) == 2 * 4 * 3
    assert all("damping" in row.diagnostics for row in experts)
    routed = {row.name.rpartition(".")[0]: row.diagnostics["routed_tokens"] for row in experts}
    assert sum(routed.values()) == 2 * 2 * 1024  # two blocks, two experts a token


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["calibration=mimi"], "unknown calibration 'mimi'; did you mean 'mini'?"),
        (["calibration=file"], "calibration=file names no text: set calibration.path=FILE"),
        (["calibration=file", "calibration.path=nowhere"], "cannot read calibration.path=nowhere"),
        (["calibration.window=1000000"], "less than one sequence of 1000000"),
        (["calibration.sequences=0"], "calibration.sequences at least 1"),
        (["calibration=wikitext2"], "calibration=mini"),
        (["calibration.inputs=orginal"], "unknown calibration.inputs 'orginal'; did you mean 'original'?"),
    ],
)
def test_wrong_calibration_is_refused(qbench, arguments, sentence):
    outcome = qbench("model=tiny-dense", "quantizer=gptq", *arguments)
    assert outcome.status == 2
    assert sentence in outcome.stderr
    assert not list(Path().rglob("result.json"))
