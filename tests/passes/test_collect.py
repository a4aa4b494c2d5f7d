"""What is collected: bounded samples, and an expert's statistics as if it stood alone in a plain forward pass."""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from qbench.errors import PointError
from qbench.passes.calibrate import INPUTS
from qbench.passes.collect import INPUT_ROWS, MIN_EXPERT_TOKENS, Collector, ExpertInputs
from qbench.passes.quantize import quantize_model
from qbench.plugins.rtn import RTN
from qbench.quant.quantizer import Quantizer, Statistic
from tests.model.test_experts import SHAPE, deepseek_v2, dense_copy, made, qwen3_moe
from tests.passes.test_calibrate import EVERYTHING, calibration


@dataclass(frozen=True)
class Recorder(Quantizer):
    """Rounds to nearest and keeps the statistics it was given, group after group."""

    needs: ClassVar[frozenset[Statistic]] = EVERYTHING
    seen: ClassVar[list] = []

    def quantize_layers(self, names, weights, stats):
        self.seen.append((names, stats))
        return RTN(nbits=3, group_size=16).quantize(weights, None)


def recorded(model, calibration):
    """The rows, and the statistics that each layer was quantized with, by name."""
    Recorder.seen.clear()
    rows, _ = quantize_model(model, Recorder(), calibration)
    return rows, {name: stats for names, stats in Recorder.seen for name in names}


class LoneExperts(nn.Module):
    """Every expert as three linears, called with one token at a time, which are noted."""

    def __init__(self, fused):
        super().__init__()
        self.fused, self.noted = fused, {}

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for token, x in enumerate(hidden_states):
            for slot, expert in enumerate(top_k_index[token].tolist()):
                gate, up = self.fused.gate_up_proj[expert].double().chunk(2)
                inner = self.fused.act_fn(gate @ x.double()) * (up @ x.double())
                self.noted.setdefault((expert, "gate_proj"), []).append(x.double())
                self.noted.setdefault((expert, "up_proj"), []).append(x.double())
                self.noted.setdefault((expert, "down_proj"), []).append(inner)
                out[token] += top_k_weights[token, slot] * (self.fused.down_proj[expert].double() @ inner)
        return out


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(("build", "layers"), [(qwen3_moe, (0, 1)), (deepseek_v2, (1,))])
def test_statistics_of_an_expert_are_those_of_its_tokens_one_by_one_in_fp64(build, layers, inputs):
    model, text = made(build), replace(calibration(2, 100), inputs=inputs)
    original = deepcopy(model)
    _, collected = recorded(model, text)
    for i in layers:
        # quantized inputs: what is before block i is, and so are its gate and up; its attention is still the original
        plain = dense_copy(original, model) if inputs == "quantized" else deepcopy(original)
        plain.model.layers[i].self_attn = deepcopy(original.model.layers[i].self_attn)
        lone = plain.model.layers[i].mlp.experts = LoneExperts(plain.model.layers[i].mlp.experts)
        plain.double().set_experts_implementation("eager")
        for ids in text.ids:
            plain(torch.from_numpy(ids)[None])
        assert len(lone.noted) == 4 * 3
        for (expert, projection), rows in lone.noted.items():
            x = torch.stack(rows)
            stats = collected[f"model.layers.{i}.mlp.experts.{expert}.{projection}"]
            assert stats.tokens == len(x)
            close = dict(rtol=1e-3, atol=1e-4, check_dtype=False)
            torch.testing.assert_close(stats.hessian, x.T @ x, **close)
            torch.testing.assert_close(stats.absmean, x.abs().mean(0), **close)
            torch.testing.assert_close(stats.squares, x.square().mean(0), **close)
            torch.testing.assert_close(stats.inputs, x, **close)


def test_shared_experts_are_ordinary_groups():
    _, collected = recorded(made(deepseek_v2), calibration())
    shared = {k.rpartition(".")[2]: v for k, v in collected.items() if "layers.1.mlp.shared_experts." in k}
    assert set(shared) == {"gate_proj", "up_proj", "down_proj"}
    assert shared["gate_proj"] is shared["up_proj"] is not shared["down_proj"]
    assert all(stats.tokens == 120 for stats in shared.values())


def deepseek_v3():
    """Its router has a bias by which an expert can be starved."""
    latent = dict(q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    routing = dict(n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1)
    shape = SHAPE | {"num_key_value_heads": 4, "num_hidden_layers": 1}
    config = DeepseekV3Config(**shape, first_k_dense_replace=0, moe_intermediate_size=96, **latent, **routing)
    return DeepseekV3ForCausalLM(config)


def test_a_starved_expert_is_calibrated_on_all_tokens_and_says_so(caplog):
    model = made(deepseek_v3)
    model.model.layers[0].mlp.gate.e_score_correction_bias.copy_(torch.tensor([0, 0, 0, 0, -0.6, -9.0]))
    rows, collected = recorded(model, calibration(5, 80))
    name = "model.layers.0.mlp.experts"
    routed = {int(r.name.split(".")[-2]): int(r.diagnostics["routed_tokens"]) for r in rows if r.name.startswith(name)}
    assert sum(routed.values()) == 2 * 400
    assert routed[5] == 0 < routed[4] < MIN_EXPERT_TOKENS < min(routed[expert] for expert in range(4))

    methods = {row.name.removeprefix(f"{name}."): row.method for row in rows}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        for expert, own in routed.items():
            fed = own >= MIN_EXPERT_TOKENS
            assert collected[f"{name}.{expert}.{projection}"].tokens == (own if fed else 400)
            said = "recorder" if fed else f"recorder (all tokens: {own} routed)"
            assert methods[f"{expert}.{projection}"].replace("rtn", "recorder") == said
    assert "2 of 6 experts were routed fewer than 64 calibration tokens" in caplog.text
    assert f"the fewest: {name}.5, 0." in caplog.text

    # what a starved expert's down reads is computed with its own gate and up
    experts = model.model.layers[0].mlp.experts
    gate, up = (w.quantized.select(5).dequantize() for w in (experts.gate_proj, experts.up_proj))
    x = collected[f"{name}.5.gate_proj"].inputs
    inner = nn.functional.silu(x @ gate.T) * (x @ up.T)
    torch.testing.assert_close(collected[f"{name}.5.down_proj"].inputs, inner, rtol=1e-4, atol=1e-5)
    assert "all tokens" in experts.gate_proj.quantized.method


def test_no_warning_when_every_expert_is_fed(caplog):
    recorded(made(qwen3_moe), calibration(4, 80))
    assert "experts were routed" not in caplog.text


def test_a_text_shorter_than_the_minimum_starves_nobody_whom_it_all_reaches():
    inputs = ExpertInputs(EVERYTHING, 4)
    inputs(torch.randn(4, 8), torch.tensor([[0, 1]] * 4), torch.ones(4, 2))
    assert [inputs.starved(expert) for expert in (0, 1, 2)] == [False, False, True]


def test_experts_that_part_of_the_text_passes_by_are_named():
    inputs = ExpertInputs(EVERYTHING, 10)
    inputs(torch.randn(4, 8), torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2))
    with pytest.raises(PointError, match=r"layer some\.experts: 4 of 10 calibration tokens"):
        inputs.all_seen("some.experts")


def test_the_sample_of_inputs_is_bounded_and_even():
    tokens = 10 * INPUT_ROWS + 7
    collector = Collector(frozenset({Statistic.INPUTS}), 2, tokens, torch.device("cpu"))
    rows = torch.arange(float(tokens))[:, None].expand(tokens, 2)
    for part in rows.split(1000):
        collector(part[None])
    sample = collector.statistics("x").inputs[:, 0]
    assert len(sample) <= INPUT_ROWS
    assert len(sample) > 0.9 * INPUT_ROWS
    assert sample.tolist() == rows[:: collector.stride, 0].tolist()
