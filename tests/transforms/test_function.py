"""Both transforms on small random models of many architectures: the function stays, the record says what was done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from qbench.passes.chain import Chain
from qbench.passes.transformed import TOKENS, Transformed
from qbench.passes.wide import Wide
from qbench.testing.transforms import transformed
from qbench.transforms.block import Block, Fold
from qbench.transforms.hadamard import Hadamard
from qbench.transforms.presinq import PreSINQ
from qbench.transforms.transform import LIMIT, Transform
from tests.passes.architectures import build

PRESINQ = PreSINQ(iterations=8, repeats=2, group_size=16)


def uneven(name, **settings):
    """A model whose gains, biases and input channels are not alike: folding them has something to do."""
    model, random = build(name, **settings), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.rand(parameter.shape, generator=random)
        elif parameter.dim() == 2 and parameter.shape[0] != 258:
            parameter.data *= 4 ** torch.rand(parameter.shape[-1], generator=random)
    return model


def of_block(record, i=1):
    """where -> what it covers, of one block, by the last part of the names."""
    inside = [row for row in record.folds if f".{i}." in row.where]
    return {row.where.partition(f".{i}.")[2]: [linear.rpartition(".")[2] for linear in row.linears] for row in inside}


# architecture -> what presinq covers, what hadamard covers (of all linear weights), whether the residual stream turns
MODELS = {
    "Llama": (1.0, 7 / 9, True),
    "Qwen3": (1.0, 7 / 9, True),
    "Gemma3Text": (1.0, 1 / 9, False),  # norms between what writes to the stream and the stream
    "Phi3": (1.0, 7 / 9, True),  # q, k and v in one matrix, gate and up in another
    "Mixtral": (0.998, 0.702, True),  # the rest are routers
    "DeepseekV2": (0.996, 0.719, True),
    "DeepseekV3": (0.996, 0.659, True),
    "GPT2": (2 / 3, 1 / 12, False),  # LayerNorm, GELU without a gate
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("transform", [PRESINQ, Hadamard()], ids=["presinq", "hadamard"])
def test_logits_stay_and_the_coverage_is_known(name, transform):
    before, after, record, _ = transformed(uneven(name), transform)
    assert float((after - before).norm() / before.norm()) <= LIMIT
    presinq, hadamard, residual = MODELS[name]
    folded = isinstance(transform, PreSINQ)
    assert record.coverage == pytest.approx(presinq if folded else hadamard, abs=1e-3)
    assert record.residual == (residual and not folded)
    assert 0 < record.moved <= LIMIT
    assert not [row for row in record.alone if row.reason.startswith("folding")]


def test_what_is_folded_where():
    dense = {"input_layernorm": ["q_proj", "k_proj", "v_proj"], "post_attention_layernorm": ["gate_proj", "up_proj"]}
    feeds = {"self_attn.v_proj -> self_attn.o_proj": ["o_proj"], "mlp.up_proj -> mlp.down_proj": ["down_proj"]}
    record = transformed(uneven("Llama"), PRESINQ)[2]
    assert of_block(record) == feeds | dense
    assert {row.times for row in record.folds} == {2}, "of two repeats"
    mla = of_block(transformed(uneven("DeepseekV3"), PRESINQ)[2])
    assert mla == {
        "self_attn.kv_b_proj -> self_attn.o_proj": ["o_proj"],
        "mlp.shared_experts.up_proj -> mlp.shared_experts.down_proj": ["down_proj"],
        "mlp.experts: up -> down": ["down_proj"],
        "input_layernorm": ["q_a_proj", "kv_a_proj_with_mqa"],
        "self_attn.q_a_layernorm": ["q_b_proj"],
        "self_attn.kv_a_layernorm": ["kv_b_proj"],
        "post_attention_layernorm": ["gate_up_proj", "gate_proj", "up_proj"],
    }
    gemma = of_block(transformed(uneven("Gemma3Text"), PRESINQ)[2])
    assert gemma["pre_feedforward_layernorm"] == ["gate_proj", "up_proj"]


def test_routers_and_gains_are_compensated():
    """Without the router's share another expert would be chosen; a gain is stored as what it is above 1 in Gemma 3."""
    model = uneven("Mixtral")
    _, _, _, new = transformed(model, PRESINQ)
    old, router = (m.model.layers[0].mlp.gate.weight for m in (model, new))
    gain = new.model.layers[0].post_attention_layernorm.weight / model.model.layers[0].post_attention_layernorm.weight
    assert gain.std() > 0.02
    torch.testing.assert_close(router * gain, old)
    model = uneven("Gemma3Text")
    _, _, _, new = transformed(model, PRESINQ)
    old, norm = (m.model.layers[0].input_layernorm.weight for m in (model, new))
    gain = (1 + norm) / (1 + old)
    torch.testing.assert_close(
        new.model.layers[0].self_attn.k_proj.weight * gain, model.model.layers[0].self_attn.k_proj.weight
    )


def test_what_is_left_alone_has_a_reason():
    record = transformed(uneven("Olmo2"), PRESINQ)[2]  # norms after attention and MLP, none before
    alone = {row.name.rpartition(".")[2]: row.reason for row in record.alone}
    assert alone.keys() == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert set(alone.values()) == {"what it reads comes neither from a norm nor, channel by channel, from one linear"}
    record = transformed(uneven("Llama"), Hadamard())[2]
    assert {(r.name.rpartition(".")[2], r.reason) for r in record.alone} == {
        ("down_proj", "this transform folds nothing into what it reads")
    }
    record = transformed(uneven("Gemma3Text"), Hadamard())[2]
    stream = next(row for row in record.alone if row.name == "the residual stream")
    assert stream.reason.startswith("a rotation of it is none of model.layers.0: it moved the block's output by")


def test_a_linear_that_no_token_reaches_keeps_its_norm_from_being_folded():
    model = uneven("Llama")
    for layer in model.model.layers:  # as an expert that is a module of its own: it would read the norm
        layer.mlp.spare = torch.nn.Linear(64, 64, bias=False)
    record = transformed(model.eval().requires_grad_(False), PRESINQ)[2]
    assert not [where for where in of_block(record) if "layernorm" in where]
    assert next(r.reason for r in record.alone if r.name.endswith("spare")) == "no token of the observation reached it"


@dataclass(frozen=True)
class Careless(Transform):
    """Forgets the readers of a norm, and folds the rest as it should be."""

    def folds(self, block: Block) -> Iterator[Fold]:
        for norm in block.norms:
            fold = block.scaled(norm, torch.full((64,), 2.0))
            yield replace(fold, tensors={k: v for k, v in fold.tensors.items() if k.startswith(norm.name)})
        for feed in block.feeds:
            yield block.scaled_feed(feed, torch.full((len(feed.channels.unique()),), 2.0))


def test_a_fold_that_moves_the_block_is_taken_back_and_said():
    model = uneven("Llama")
    before, after, record, new = transformed(model, Careless())
    assert float((after - before).norm() / before.norm()) <= LIMIT
    assert set(of_block(record)) == {"self_attn.v_proj -> self_attn.o_proj", "mlp.up_proj -> mlp.down_proj"}
    reason = next(row.reason for row in record.alone if row.name.endswith("q_proj"))
    assert reason.startswith("folding input_layernorm: it moved the block's output by ")
    assert reason.endswith("relative in fp32, more than 1e-05")
    assert torch.equal(new.model.layers[0].input_layernorm.weight, model.model.layers[0].input_layernorm.weight)


def test_the_rotations_rotate():
    """Every basis is orthogonal, whatever the width, and spreads one channel over all."""
    for size in (1, 2, 12, 64, 576, 36):
        basis = Hadamard().basis(size, torch.device("cpu")).double()
        torch.testing.assert_close(basis @ basis.T, torch.eye(size).double(), rtol=0, atol=1e-6)
    assert float(Hadamard().basis(64, torch.device("cpu")).abs().max()) == pytest.approx(1 / 8)
    model = uneven("Llama", tie_word_embeddings=True)
    _, _, record, new = transformed(model, Hadamard())
    assert new.lm_head.weight is not new.model.embed_tokens.weight, "the head has the last gain in it"
    assert torch.equal(new.model.norm.weight, torch.ones(64))
    assert record.residual
    one = transformed(uneven("Llama"), Hadamard(values=False))[2]
    assert all("->" not in row.where for row in one.folds)
    other = transformed(uneven("Llama"), Hadamard(residual=False))[2]
    assert not other.residual
    assert all("->" in row.where for row in other.folds)


def test_a_block_that_does_not_run_in_fp32_is_left_alone(monkeypatch):
    model = uneven("Llama")

    def observed(self, run):
        raise RuntimeError("expected scalar type BFloat16\nand more")

    monkeypatch.setattr(Transformed, "_observed", observed)
    before, after, record, _ = transformed(model, PRESINQ)
    assert torch.equal(before, after)
    assert record.coverage == 0
    reasons = {row.reason for row in record.alone}
    assert reasons == {"its block cannot be observed in fp32: expected scalar type BFloat16"}


@torch.no_grad()
def test_a_tie_between_experts_is_no_reason_to_refuse_a_fold():
    """The router is made to give second and third place the same logit for one token of each block that is observed."""
    model = uneven("Mixtral")
    ids = torch.arange(TOKENS)[None] * (258 // TOKENS)
    for number, layer in enumerate(model.model.layers):
        handed = []
        handle = layer.mlp.gate.register_forward_pre_hook(lambda _, args, handed=handed: handed.append(args[0]))
        model(ids)
        handle.remove()
        x = handed[0].view(-1, 64)[5 + number]
        weight = layer.mlp.gate.weight
        second, third = (weight @ x).topk(3).indices[1:]
        weight[third] += x * ((weight[second] - weight[third]) @ x) / (x @ x)
    states, calls = Chain.of(model).begin(ids)
    run = Wide(model.model.layers[0], calls[0], states)
    assert (~run._settled).nonzero().tolist() == [[5]]
    for transform in (PRESINQ, Hadamard()):
        record = transformed(model, transform)[2]
        assert not [row for row in record.alone if row.reason.startswith("folding")]
        assert record.coverage > 0.7
