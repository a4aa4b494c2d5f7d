"""Every layout of linear weights in transformers: found, quantized along the input channels, and computed with."""

from copy import deepcopy

import pytest
import torch
import transformers as t
from torch import nn

from qbench.checkpoint import packed as checkpoint
from qbench.layers import experts
from qbench.layers.expert_form import _computes_shares, expert_weights, form, refusal
from qbench.layers.experts import QuantExperts
from qbench.layers.linear import QuantLinear, use_kernels
from qbench.model.linears import ROUTER, coverage, find_linears, linear_weights, matrix
from qbench.passes.quantize import quantize_model
from qbench.plugins.asinq import ASINQ
from qbench.plugins.awq import AWQ
from qbench.plugins.gptq import GPTQ
from qbench.plugins.rtn import RTN
from qbench.plugins.sinq import SINQ
from qbench.sources.packed import Packed
from qbench.sources.tiny import byte_tokenizer
from tests.conftest import thinned
from tests.model.test_experts import SHAPE
from tests.passes.test_calibrate import calibration

TEXT = SHAPE | {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None}
MIXTURE = dict(num_local_experts=4, num_experts_per_tok=2)


def gpt_oss():
    """Transposed, gate and up interleaved, biases, a clamped and shifted gate."""
    shape = TEXT | dict(head_dim=16, intermediate_size=96, sliding_window=32, rope_parameters={"rope_theta": 1e4})
    return t.GptOssForCausalLM(t.GptOssConfig(**shape, **MIXTURE))


def llama4():
    """Transposed, without flags: each expert is handed its share of all tokens."""
    shape = TEXT | dict(head_dim=16, intermediate_size=96, intermediate_size_mlp=128)
    return t.Llama4ForCausalLM(t.Llama4TextConfig(**shape, num_local_experts=4, num_experts_per_tok=1))


def nemotron_h():
    """Experts without a gate, relu squared between up and down."""
    shape = TEXT | dict(head_dim=16, intermediate_size=128, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8)
    experts = dict(n_routed_experts=4, moe_intermediate_size=96, moe_shared_expert_intermediate_size=96)
    shape |= dict(layers_block_type=["moe", "attention", "moe"], num_hidden_layers=3, n_groups=1, num_experts_per_tok=2)
    return t.NemotronHForCausalLM(t.NemotronHConfig(**shape, **experts))


def aria():
    """Transposed, gate and up one after the other, flagged."""
    shape = TEXT | dict(intermediate_size=96, moe_num_experts=4, moe_topk=2, pad_token_id=0)
    return t.AriaTextForCausalLM(t.AriaTextConfig(**shape))


def minimax_m3():
    """The usual layout with a gate of its own."""
    shape = TEXT | dict(head_dim=16, intermediate_size=96, dense_intermediate_size=128, shared_intermediate_size=96)
    return t.MiniMaxM3VLForCausalLM(t.MiniMaxM3VLTextConfig(**shape, **MIXTURE))


def gpt2():
    """Conv1D, which is a linear with a transposed weight."""
    return t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=258, n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.1)
    )


MIXTURES = [gpt_oss, llama4, nemotron_h, aria]
MODELS = [*MIXTURES, gpt2]


def made(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        for name, p in model.named_parameters():
            if p.dim() == 3 and "conv" not in name:  # zero or empty in some classes
                nn.init.normal_(p, std=0.2)
            elif "router.weight" in name or "gate.weight" in name or name.endswith("_bias"):
                nn.init.normal_(p, std=0.5)
    return model.eval().requires_grad_(False)


def logits(model):
    return model(torch.arange(96)[None] * 2, use_cache=False).logits


def original_layout(module, stacks):
    """The parameters that hold the matrices `[experts, out, in]` of `form(module).projections`."""
    how = form(module)
    *first, down = stacks
    if len(first) == 2:
        rows = torch.stack(first, 2).flatten(1, 2) if how.interleaved else torch.cat(first, 1)
    else:
        rows = first[0]
    return {how.first: rows.mT if how.transposed else rows, "down_proj": down.mT if how.transposed else down}


def dense_copy(model, quantized):
    """The original classes in fp64, holding what the quantized model's weights dequantize to."""
    copy = deepcopy(model)
    for name, module in quantized.named_modules():
        if isinstance(module, QuantLinear):
            matrix(copy.get_submodule(name)).copy_(module.quantized.dequantize())
        elif isinstance(module, QuantExperts):
            original = copy.get_submodule(name)
            stacks = [getattr(module, projection).quantized.dequantize() for projection in module.projections]
            for key, value in original_layout(original, stacks).items():
                getattr(original, key).copy_(value)
    return copy


QUANTIZERS = [SINQ(), AWQ(ratios=2), GPTQ(act_order=True, static_groups=False), ASINQ(ratios=2, iterations=2)]


@pytest.mark.parametrize(("quantizer", "build"), thinned(QUANTIZERS, MODELS))
def test_a_quantized_layout_computes_what_the_original_class_computes_with_its_weights(build, quantizer):
    model = made(build)
    weights = linear_weights(model)
    quantized = deepcopy(model)
    rows, _ = quantize_model(quantized, quantizer, calibration(2) if quantizer.needs else None)
    assert coverage(quantized) > 0.95
    assert linear_weights(quantized) == weights
    assert all(0 < row.relative_error < 0.4 for row in rows)
    dense = dense_copy(model, quantized)
    if hasattr(dense, "set_experts_implementation"):
        dense.set_experts_implementation("eager")
    torch.testing.assert_close(logits(quantized.double()), logits(dense.double()), rtol=1e-6, atol=1e-6)
    assert (logits(dense) - logits(model)).abs().max() > 1e-2  # it is not the original that was compared


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_eight_bits_are_close_to_the_original(build):
    model = made(build)
    before = logits(model)
    quantize_model(model, RTN(nbits=8, group_size=16))
    p = before.log_softmax(-1)
    kl = (p.exp() * (p - logits(model).log_softmax(-1))).sum(-1)
    assert kl.mean() < 2e-3
    assert (logits(model) - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_a_checkpoint_of_the_layout_gives_the_same_logits(build, tmp_path):
    model = made(build)
    quantize_model(model, SINQ(aux_dtype="int8"))
    checkpoint.save(model, byte_tokenizer(), tmp_path / "packed")
    config = Packed(path=str(tmp_path / "packed"))
    loaded = config.load(torch.float32, torch.device("cpu"), tmp_path)
    assert torch.equal(logits(loaded.model), logits(model))


@pytest.mark.parametrize("build", MIXTURES, ids=lambda build: build.__name__)
def test_experts_laid_out_for_the_kernels_compute_the_same(build, monkeypatch):
    """Biases and gates are no matter of the kernels: they only multiply. Grouped launches, and single."""
    from qbench.kernels import ops

    model = made(build)
    quantize_model(model, SINQ())
    expected = logits(model)
    for module in model.modules():
        if hasattr(module, "lay_out"):
            assert module.lay_out()
    for pairs in (0, 10_000):
        monkeypatch.setattr(ops, "EXPERT_PAIRS", pairs)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("build", MIXTURES, ids=lambda build: build.__name__)
def test_experts_whose_pairs_are_sorted_compute_the_same(build, laid_out, monkeypatch):
    """As on a GPU, with kernels and without."""
    model = made(build)
    quantize_model(model, SINQ())
    expected, before = logits(model), experts.route
    if laid_out:
        assert all(module.lay_out() for module in model.modules() if hasattr(module, "lay_out"))
    calls = []
    monkeypatch.setattr(experts, "route", lambda *a: calls.append(a) or before(*a))
    monkeypatch.setattr(experts, "sorts", lambda x: True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == sum(isinstance(module, QuantExperts) for module in model.modules())


@pytest.mark.parametrize("laid_out", [False, True])
def test_sorted_experts_are_one_graph(laid_out, monkeypatch):
    model = made(nemotron_h)
    quantize_model(model, SINQ())
    block = next(module for module in model.modules() if isinstance(module, QuantExperts))
    if laid_out:
        assert all(module.lay_out() for module in block.children() if hasattr(module, "lay_out"))
    monkeypatch.setattr(experts, "sorts", lambda x: True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, block.hidden_dim, generator=torch.Generator().manual_seed(0))
    for index in (torch.tensor([[0, 3], [2, 1]] * 3), torch.tensor([[1, 2], [1, 4]] * 3)):
        scores = torch.full((6, 2), 0.5)
        torch.testing.assert_close(compiled(x, index, scores), block(x, index, scores))


def test_experts_that_live_elsewhere_add_nothing(monkeypatch):
    """Alone and among others: expert by expert, sorted, and a few pairs each for itself."""
    model = made(aria)
    quantize_model(model, RTN())
    block = next(module for module in model.modules() if isinstance(module, QuantExperts))
    x = torch.randn(6, block.hidden_dim, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 4], [4, 4], [3, 1], [2, 0], [4, 1], [1, 2]])
    scores = torch.rand(6, 2, generator=torch.Generator().manual_seed(1))
    one_by_one = block(x, index, scores)
    assert not one_by_one[1].any()
    monkeypatch.setattr(experts, "sorts", lambda x: True)
    torch.testing.assert_close(block(x, index, scores), one_by_one, rtol=1e-4, atol=1e-5)
    assert all(module.lay_out() for module in block.children() if hasattr(module, "lay_out"))
    torch.testing.assert_close(block(x, index, scores), one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [*MIXTURES, minimax_m3], ids=lambda build: build.__name__)
def test_single_matrices_are_read_out_of_each_layout(build):
    model = made(build)
    for module in find_linears(model).experts.values():
        stacks = [torch.stack(ms) for ms in zip(*(expert_weights(module, i) for i in range(4)), strict=True)]
        for key, value in original_layout(module, stacks).items():
            assert torch.equal(getattr(module, key), value)
    assert find_linears(model).experts
    assert {s.reason for s in find_linears(model).skipped if "router" in s.name or "gate" in s.name} == {ROUTER}


def test_a_forward_without_flags_must_compute_what_it_is_taken_for():
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    class Swapped(Llama4TextExperts):
        """The same shapes, with up in front of gate."""

        def forward(self, hidden_states):
            shares = hidden_states.view(self.gate_up_proj.shape[0], -1, self.hidden_size)
            up, gate = torch.bmm(shares, self.gate_up_proj).chunk(2, dim=-1)
            return torch.bmm(up * self.act_fn(gate), self.down_proj).view(-1, self.hidden_size)

    config = t.Llama4TextConfig(hidden_size=64, intermediate_size=96, num_local_experts=4)
    with torch.device("meta"):  # as in a plan
        assert refusal(Llama4TextExperts(config)) is None
        assert _computes_shares(Llama4TextExperts(config))
        assert refusal(Swapped(config)) == "its forward does not compute what a gated expert's does"


def test_use_kernels_leaves_a_cpu_alone():
    model = made(nemotron_h)
    quantize_model(model, RTN())
    use_kernels(model)
    assert all(m.layout is None for m in model.modules() if hasattr(m, "lay_out"))
