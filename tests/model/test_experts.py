"""Mixtures of experts: found, quantized expert by expert, and computed as the original would with those weights."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from qbench.errors import PointError
from qbench.format.weight import QuantizedWeight
from qbench.layers.experts import QuantExperts, is_router
from qbench.layers.linear import QuantLinear
from qbench.model.linears import ROUTER, coverage, find_linears, linear_weights, quantized_weights
from qbench.passes.quantize import quantize_model, require_finite
from qbench.plugins.asinq import ASINQ
from qbench.plugins.awq import AWQ
from qbench.plugins.gptq import GPTQ
from qbench.plugins.rtn import RTN
from qbench.plugins.sinq import SINQ
from qbench.sources import tiny
from tests.conftest import thinned
from tests.passes.test_calibrate import calibration

SHAPE = dict(
    vocab_size=258,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.1,
)


def qwen3_moe():
    return tiny.build("moe", 0)[0]


def qwen2_moe():
    """Has a shared expert with a gate of one row."""
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, shared_expert_intermediate_size=96)
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SHAPE, intermediate_size=128, **experts))


def deepseek_v2():
    """Shared experts, latent attention, and a first layer without experts."""
    latent = dict(q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    routing = dict(n_routed_experts=4, n_shared_experts=2, num_experts_per_tok=2, first_k_dense_replace=1)
    shape = SHAPE | {"num_key_value_heads": 4}
    config = DeepseekV2Config(**shape, intermediate_size=128, moe_intermediate_size=96, **latent, **routing)
    return DeepseekV2ForCausalLM(config)


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SHAPE, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2))


MODELS = [qwen3_moe, qwen2_moe, deepseek_v2, mixtral]
QUANTIZERS = [RTN(), SINQ(), SINQ(nbits=3, aux_dtype="int8", group_size=48)]
CALIBRATED = [GPTQ(act_order=True, static_groups=False), AWQ(ratios=2), ASINQ(ratios=2, iterations=2)]


def made(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        for name, p in model.named_parameters():
            if "gate.weight" in name:  # routers start at zero in some classes, which would use two experts only
                nn.init.normal_(p, std=0.5)
    return model.eval().requires_grad_(False)


def logits(model):
    return model(torch.arange(96)[None] * 2).logits


def dense_copy(model, quantized):
    """The original classes, holding what the quantized model's weights dequantize to."""
    copy = deepcopy(model)
    for name, module in quantized.named_modules():
        if isinstance(module, QuantLinear):
            copy.get_submodule(name).weight.copy_(module.quantized.dequantize())
        elif isinstance(module, QuantExperts):
            gate, up, down = (getattr(module, p).quantized.dequantize() for p in ("gate_proj", "up_proj", "down_proj"))
            copy.get_submodule(name).gate_up_proj.copy_(torch.cat([gate, up], 1))
            copy.get_submodule(name).down_proj.copy_(down)
    return copy


@pytest.mark.parametrize(("quantizer", "build"), thinned([*QUANTIZERS, *CALIBRATED], MODELS))
def test_a_mixture_computes_what_the_original_class_computes_with_its_weights(build, quantizer):
    model = made(build)
    weights, parameters = linear_weights(model), dict(model.named_parameters())
    quantized = deepcopy(model)
    rows, skipped = quantize_model(quantized, quantizer, calibration() if quantizer.needs else None)
    assert 0.99 <= coverage(quantized) < 1
    assert linear_weights(quantized) == weights
    assert {s.reason for s in skipped} == {ROUTER}

    experts = [row for row in rows if ".experts." in row.name]
    blocks = [m for m in quantized.modules() if isinstance(m, QuantExperts)]
    assert len(experts) == 3 * 4 * len(blocks) > 0
    assert len({row.name for row in rows}) == len(rows)
    assert all(0 < row.relative_error < 0.4 for row in rows)

    packed = quantized_weights(quantized)
    assert sum(w.nbytes for w in packed) == sum(row.packed_bytes for row in rows)
    assert sum(w.numel for w in packed) == sum(row.shape[0] * row.shape[1] for row in rows)
    assert not any(p.dim() == 3 for p in quantized.parameters())

    dense = dense_copy(model, quantized)
    torch.testing.assert_close(logits(quantized), logits(dense), rtol=1e-4, atol=1e-4)
    assert (logits(quantized) - logits(model)).abs().max() > 1e-2  # it is not the original that was compared
    dense.set_experts_implementation("eager")
    torch.testing.assert_close(logits(quantized), logits(dense), rtol=1e-4, atol=1e-4)
    # rows are named by what they hold
    row = next(r for r in experts if r.name.endswith("experts.3.up_proj"))
    parent = row.name.removesuffix(".3.up_proj")
    original = parameters[f"{parent}.gate_up_proj"][3].chunk(2)[1]
    restored = quantized.get_submodule(parent).up_proj.quantized.select(3).dequantize()
    assert float((original - restored).norm() / original.norm()) == pytest.approx(row.relative_error)


def test_rows_follow_the_order_of_the_modules():
    rows, _ = quantize_model(made(deepseek_v2), RTN())
    layers = [int(row.name.split(".")[2]) for row in rows]
    assert layers == sorted(layers)
    assert any("shared_experts.down_proj" in row.name for row in rows)
    assert any("kv_a_proj_with_mqa" in row.name for row in rows)


def test_routers_stay_and_shared_experts_do_not():
    found = find_linears(made(qwen2_moe))
    assert {s.name.partition(".mlp.")[2] for s in found.skipped} == {"gate.weight", "shared_expert_gate"}
    assert sum("shared_expert." in name for name in found.layers) == 2 * 3
    assert is_router("gate", 8, 8)
    assert is_router("router.layer", 8, 8)
    assert not is_router("shared_experts.down_proj", 64, 64)
    assert not is_router("gate_proj", 96, 8)


def test_a_weight_already_on_the_grid_is_named_in_a_warning(caplog):
    model = made(mixtral)
    once = deepcopy(model)
    quantize_model(once, RTN())
    quantize_model(dense_copy(model, once), RTN())
    assert "experts.2.up_proj: error" in caplog.text


def test_a_nan_in_an_expert_is_named():
    model = made(qwen3_moe)
    require_finite(model)
    model.model.layers[1].mlp.experts.gate_up_proj[2, 96 + 5, 7] = float("nan")
    with pytest.raises(PointError, match=r"layer model\.layers\.1\.mlp\.experts\.2\.up_proj: 1 of 6144 weights"):
        require_finite(model)


def test_only_the_experts_that_are_hit_are_dequantized(monkeypatch):
    model = made(mixtral)
    quantize_model(model, RTN())
    block = model.model.layers[0].mlp.experts
    hit, select = [], QuantizedWeight.select
    monkeypatch.setattr(QuantizedWeight, "select", lambda weight, index: hit.append(index) or select(weight, index))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    # 4 is the mark for an expert of another process: it adds nothing
    out = block(x, torch.tensor([[1, 4]] * 5), torch.ones(5, 2))
    assert set(hit) == {1}
    assert torch.equal(out, block(x, torch.tensor([[1]] * 5), torch.ones(5, 1)))


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts, self.act_fn = 4, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 64, 192))
        self.down_proj = nn.Parameter(torch.zeros(4, 96, 64))


class Undeclared(Transposed):
    """The right shapes, but nothing says that the forward is the usual one (LongCat's is not)."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 192, 64))
        self.down_proj = nn.Parameter(torch.zeros(4, 64, 96))


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.w13 = nn.Parameter(torch.zeros(4, 192, 64))
        self.w13_bias = nn.Parameter(torch.zeros(4, 192))
        self.w2 = nn.Parameter(torch.zeros(4, 64, 96))


class TwoNorms(nn.Module):
    """Declares the common layout and holds more than it."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.act_fn, self.second_norm = 4, nn.SiLU(), nn.LayerNorm(64)
        self.is_transposed, self.has_bias, self.has_gate, self.is_concatenated = False, False, True, True
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 192, 64))
        self.down_proj = nn.Parameter(torch.zeros(4, 64, 96))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


@pytest.mark.parametrize(
    ("build", "name", "why"),
    [
        (Transposed, "Transposed", "does not declare its layout"),
        (Undeclared, "Undeclared", "does not declare its layout"),
        (Other, "Other", "does not declare its layout"),
        (TwoNorms, "TwoNorms", "it also holds second_norm"),
    ],
)
def test_another_layout_is_skipped_with_its_class_and_counts_against_coverage(build, name, why):
    model = made(qwen3_moe)
    for layer in model.model.layers:
        layer.mlp.experts = build()
    found = find_linears(model)
    fused = [s for s in found.skipped if s.reason != ROUTER]
    assert not found.experts
    assert len(fused) == 2 * 2  # the biases are not linear weights
    assert all(name in s.reason and why in s.reason for s in fused)
    assert len(found.skipped) - len(fused) == 2  # the routers are still told apart
    quantize_model(model, RTN())
    assert coverage(model) < 0.2
