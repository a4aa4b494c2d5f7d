"""A compiled step computes the same, is compiled once for all blocks of a kind, and leaves the model as it was."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV32Config, DeepseekV32ForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from qbench.config import SpeedConfig
from qbench.evaluate import attention, speed, steps, ways
from qbench.layers.linear import packed_weights
from qbench.model.offload import runs_offloaded
from qbench.passes.quantize import quantize_model
from qbench.registry import make_quantizer
from qbench.sources import tiny

SMALL = SpeedConfig("default", batch_size=2, prefill_tokens=[12, 5], context_tokens=8, decode_tokens=6, repeats=1)
ATTEND = attention.attend
LATENT = {
    **{
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 2,
    },
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 48},
    **{"v_head_dim": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "max_position_embeddings": 64},
}
MORE = (("dense", False), ("moe", False), ("moe", True))


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(ways, "BACKEND", "eager")  # what is traced is run as it is: no compiler is waited for
    counters.clear()


def model(architecture="dense", laid_out=False, blocks=2):
    built, _ = tiny.build(architecture, 0)
    built.eval().requires_grad_(False)
    if laid_out:
        quantize_model(built, make_quantizer({"name": "sinq", "nbits": 4, "group_size": 64}))
        assert all(module.lay_out() for module in packed_weights(built).values())
    return built


def prompt():
    return torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def decoded(decoder, run):
    decoder.rewind()
    tokens = [decoder.token.clone()]
    for _ in range(5):
        run()
        tokens.append(decoder.token.clone())
    return torch.cat(tokens, 1)


@pytest.mark.parametrize(
    ("architecture", "laid_out"),
    [("dense", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
@torch.inference_mode()
def test_a_compiled_decode_is_the_eager_decode(architecture, laid_out):
    tested = model(architecture, laid_out)
    before = {name: dict(vars(module)) for name, module in tested.named_modules()}
    decoder = steps.Decoder(tested, prompt(), steps=6)
    expected = decoded(decoder, decoder.step)
    with ways.compiled(decoder) as way:
        assert torch.equal(decoded(decoder, way.run), expected)
        assert (way.attention, way.difference) == (attention.NAME, pytest.approx(0, abs=1e-5))
        assert way.compile_seconds > 0
    assert counters["stats"]["unique_graphs"] == 1  # for both blocks
    assert torch.equal(decoded(decoder, decoder.step), expected)
    after = {name: vars(module) for name, module in tested.named_modules()}
    assert {name: set(kept) for name, kept in after.items()} == {name: set(kept) for name, kept in before.items()}
    assert [layer.self_attn.layer_idx for layer in tested.model.layers] == [0, 1]
    assert tested.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("laid_out", [True, *(pytest.param(case, marks=pytest.mark.slow) for case in (False, None))])
@torch.inference_mode()
def test_a_compiled_decode_over_latents(laid_out):
    """No keys and values are made of DeepSeek's cache; laid_out=None: packed, without a kernel."""
    torch.manual_seed(0)
    tested = DeepseekV2ForCausalLM(DeepseekV2Config(**LATENT)).eval().requires_grad_(False)
    if laid_out is not False:
        quantize_model(tested, make_quantizer({"name": "sinq", "nbits": 4, "group_size": 64}))
    if laid_out:
        assert all(module.lay_out() for module in packed_weights(tested).values())
    decoder = steps.Decoder(tested, prompt(), steps=6)
    expected = decoded(decoder, decoder.step)
    with ways.compiled(decoder) as way:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DeepseekV2Attention, "expand_kv", None)  # it is not called
            assert torch.equal(decoded(decoder, way.run), expected)
        assert way.difference == pytest.approx(0, abs=1e-5)
    assert not any("expand_kv" in vars(module) for module in tested.modules())
    with attention.static(tested):  # a prompt makes keys and values after all
        fed = tested(prompt()).logits
    assert torch.allclose(fed, tested(prompt()).logits, atol=1e-5)


@pytest.mark.slow
@torch.inference_mode()
def test_whole_numbers_of_a_layout_that_differ_between_blocks_are_arguments():
    """The exponent of t differs from layer to layer: five blocks take two compilations, the second for all the rest."""
    shape = tiny.SHAPE | {"num_hidden_layers": 5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "SHAPE", shape)
        tested = model(laid_out=True)
    for number, module in enumerate(packed_weights(tested).values()):
        module._numbers[5] = number % 4
    decoder = steps.Decoder(tested, prompt(), steps=6)
    expected = decoded(decoder, decoder.step)
    with ways.compiled(decoder) as way:
        assert torch.equal(decoded(decoder, way.run), expected)
    assert counters["stats"]["unique_graphs"] == 2


class Numbered(Qwen3DecoderLayer):
    """A block that computes with its number, which a compiled one does not know."""

    def forward(self, hidden_states, **options):
        return super().forward(hidden_states, **options) * (1 - 3 * self.self_attn.layer_idx)


@pytest.mark.slow
@torch.inference_mode()
def test_a_block_that_computes_with_its_number_is_refused():
    tested = model()
    tested.model.layers[1].__class__ = Numbered
    decoder = steps.Decoder(tested, prompt(), steps=6)
    told = r"its logits differ from the eager ones by [0-9.]+ of their norm"
    with pytest.raises(ways.RefusedError, match=told), ways.compiled(decoder):
        pass
    assert [layer.self_attn.layer_idx for layer in tested.model.layers] == [0, 1]


@pytest.mark.slow
def test_what_cannot_be_compiled_is_timed_all_the_same():
    """The loop over the chosen experts, as plain torch has it, asks which those are: no graph can hold that."""
    built, _ = tiny.build("moe", 0)
    quantize_model(built.eval().requires_grad_(False), make_quantizer({"name": "rtn", "nbits": 4, "group_size": 64}))
    found = speed.measure(built, replace(SMALL, prefill_tokens=4, compile=True)).decode
    eager, compiled = found.ways
    assert (found.method, found.eager_because, found.tokens_per_second) == ("eager", None, eager.tokens_per_second)
    assert compiled.tokens_per_second is None
    assert compiled.refused
    assert "\n" not in compiled.refused
    assert found.refusals("compiled") == [compiled.refused]
    assert found.refusals("eager") == []


@pytest.mark.slow
def test_every_way_is_recorded():
    found = speed.measure(model(), replace(SMALL, compile=True))
    assert len(found.more_prefill) == 1
    for phase in (found.prefill, found.decode, *found.more_prefill):
        assert [way.method for way in phase.ways] == ["eager", "compiled"]
        assert phase.tokens_per_second.median == max(way.tokens_per_second.median for way in phase.ways)
        assert phase.tokens_per_second == phase.rate(phase.method)
    assert [way.attention for way in found.decode.ways] == ["sdpa", attention.NAME]
    assert [way.attention for way in found.prefill.ways] == ["sdpa", attention.NAME]


def test_on_a_cpu_nothing_is_compiled_unasked():
    assert [SpeedConfig(compile=asked).compiles("cpu") for asked in (None, True, False)] == [False, True, False]
    assert [SpeedConfig(compile=asked).compiles("cuda") for asked in (None, True, False)] == [True, True, False]
    found = speed.measure(model(), replace(SMALL, prefill_tokens=4, decode_tokens=1))
    assert [way.method for way in found.decode.ways] == ["eager"]


@pytest.mark.parametrize(("heads", "shared"), [(4, 2), (4, 4), (6, 1)])
def test_attention_of_one_token(heads, shared):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, heads, 1, 8), torch.randn(2, shared, 11, 8), torch.randn(2, shared, 11, 5)
    mask = (torch.arange(11) < torch.tensor([7, 9])[:, None])[:, None, None]
    found, _ = attention.attend(None, query, key, value, mask, scaling=0.3)
    wide = [tensor.repeat_interleave(heads // shared, 1) for tensor in (key, value)]
    expected = F.scaled_dot_product_attention(query, *wide, attn_mask=mask, scale=0.3)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)


def test_other_attention_is_transformers_own():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, 3, 8) for _ in range(3))
    module = torch.nn.Module()
    module.is_causal = True
    found, _ = attention.attend(module, query, key, value, None)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)


@torch.inference_mode()
def test_a_prompt_that_fills_the_cache_needs_no_mask_also_while_it_is_captured(monkeypatch):
    work, masks = steps.Prefill(model(), prompt()), []
    expected = work.step()
    monkeypatch.setattr(
        attention, "attend", lambda *given, **options: masks.append(given[4]) or ATTEND(*given, **options)
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with attention.static(work.model):
        work.rewind()
        assert torch.equal(work.step(), expected)
    assert masks == [None, None]  # of two blocks
    assert attention.mask(4, 8, batch_size=1, q_offset=4).shape == (1, 1, 4, 8)
    assert attention.mask(4, 4, batch_size=1, local_size=2, allow_is_causal_skip=False).shape == (1, 1, 4, 4)


@torch.inference_mode()
def test_over_latents_an_offloaded_weight_comes_when_its_module_is_called():
    torch.manual_seed(0)
    tested = DeepseekV2ForCausalLM(DeepseekV2Config(**LATENT)).eval().requires_grad_(False)
    decoder = steps.Decoder(tested, prompt(), steps=6)
    expected = decoded(decoder, decoder.step)
    with runs_offloaded(tested, True), attention.static(tested):
        assert tested.model.layers[0].self_attn.kv_b_proj.weight.is_meta
        assert torch.equal(decoded(decoder, decoder.step), expected)


@torch.inference_mode()
def test_a_model_that_asks_for_the_name_of_its_attention_keeps_it():
    """DeepSeek-V3.2's own code masks what its indexer left out, if its attention is called "sdpa"."""
    torch.manual_seed(0)
    sizes = LATENT | {"num_hidden_layers": 1, "index_topk": 3, "index_n_heads": 2, "index_head_dim": 16}
    tested = DeepseekV32ForCausalLM(DeepseekV32Config(**sizes)).eval()
    work = steps.Prefill(tested, prompt())
    expected = work.step()
    with attention.static(work.model):
        work.rewind()
        assert torch.equal(work.step(), expected)
    assert steps.Decoder(tested, prompt(), steps=1).uncapturable == "its cache holds more than keys and values"


def test_experts_are_multiplied_as_asked_and_then_as_before():
    mixture = model("moe")
    before = ways.experts_of(mixture)
    assert before is not None
    with ways.multiplying(mixture, "batched_mm"):
        assert ways.experts_of(mixture) == "batched_mm"
    assert ways.experts_of(mixture) == before
    assert ways.experts_of(model()) is None
