"""What is quantized and what stays: inside and outside of the blocks, plain linears and others, read and called."""

import pytest
import torch
import transformers as t
from torch import nn

from qbench.errors import PointError, RequestError
from qbench.layers.linear import QuantLinear, use_kernels
from qbench.model.coverage import settle_layers, share, too_few
from qbench.model.linears import OUTSIDE, READ, ROUTER, TOWER, Linears, coverage, find_linears, linear_weights
from qbench.model.readers import mark_read_weights, mark_without_storage
from qbench.passes.quantize import quantize_model
from qbench.plugins.gptq import GPTQ
from qbench.plugins.rtn import RTN
from qbench.sources import tiny
from tests.conftest import refused
from tests.model.test_experts import SHAPE
from tests.passes.test_calibrate import calibration, gemma4, sliding


def opt_350m():
    """Projects the embeddings into the blocks and out of them."""
    shape = dict(hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, do_layer_norm_before=False)
    return t.OPTForCausalLM(t.OPTConfig(**shape, vocab_size=258, word_embed_proj_dim=32, max_position_embeddings=256))


def gemma3_with_vision():
    text = sliding().config.to_dict()
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28)
    config = t.Gemma3Config(text_config=text, vision_config=vision | {"patch_size": 14}, mm_tokens_per_image=4)
    return t.Gemma3ForConditionalGeneration(config)


def mamba():
    return t.MambaForCausalLM(t.MambaConfig(vocab_size=258, hidden_size=64, num_hidden_layers=2, state_size=8))


def jamba():
    layers = dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)
    mixture = dict(num_experts=4, num_experts_per_tok=2, mamba_dt_rank=4, mamba_d_state=8, pad_token_id=0)
    return t.JambaForCausalLM(t.JambaConfig(**SHAPE, **layers, **mixture, intermediate_size=96))


@pytest.mark.parametrize("quantizer", [RTN(), GPTQ()], ids=["rtn", "gptq"])
@pytest.mark.parametrize("build", [opt_350m, gemma4], ids=["opt", "gemma4"])
def test_projections_of_the_embeddings_stay_and_are_listed_by_every_method(build, quantizer):
    model = build().eval()
    before = linear_weights(model)
    rows, skipped = quantize_model(model, quantizer, calibration(2) if quantizer.needs else None)
    outside = {row.name.rpartition(".")[2] for row in skipped if row.reason == OUTSIDE}
    assert outside == ({"project_in", "project_out"} if build is opt_350m else {"per_layer_model_projection"})
    assert all(".layers." in row.name for row in rows)
    assert coverage(model) == 1
    assert linear_weights(model) == before
    model(torch.arange(20)[None])


def test_another_list_of_layers_counts():
    model = tiny.build("dense", 0)[0]
    model.model.more = nn.ModuleList([nn.Linear(64, 64)])
    [skipped] = find_linears(model).skipped
    assert (skipped.name, skipped.reason, skipped.counted) == ("model.more.0", OUTSIDE, True)
    assert share(find_linears(model)) < 1


def test_a_vision_tower_is_left_alone_and_does_not_count():
    model = gemma3_with_vision().eval()
    found = find_linears(model)
    assert found.layers.keys() == {n for n in found.layers if ".language_model.layers." in n}
    tower = [s for s in found.skipped if s.reason == TOWER]
    assert len([s for s in tower if "vision_tower" in s.name and "proj" in s.name]) >= 3 * 4
    assert any("projector" in s.name for s in tower)
    assert not any(s.counted for s in tower)
    _, skipped = quantize_model(model, GPTQ(), calibration(2))
    assert [row.counted for row in skipped] == [False] * len(tower)
    assert coverage(model) == 1


class Codes(nn.Linear):
    """As a layer of a library that quantizes: the weight means something else than nn.Linear's."""

    def forward(self, x):
        return super().forward(x) * 2


def test_a_subclass_with_its_own_forward_is_no_linear():
    model = tiny.build("dense", 0)[0]
    model.model.layers[0].mlp.up_proj = Codes(64, 192, bias=False)
    [skipped] = find_linears(model).skipped
    assert skipped.reason == "Codes has a forward of its own"
    assert skipped.counted
    router = t.Llama4ForCausalLM(t.Llama4TextConfig(**SHAPE, intermediate_size=96, num_local_experts=4, head_dim=16))
    assert {s.reason for s in find_linears(router).skipped} == {ROUTER}


@pytest.mark.parametrize("build", [mamba, jamba], ids=["mamba", "jamba"])
def test_a_weight_that_the_model_reads_stays_in_16_bit(build):
    model = build().eval().requires_grad_(False)
    kinds = [type(module) for module in model.modules()]
    names = mark_read_weights(model)
    assert names
    assert all(name.endswith("dt_proj") for name in names)
    assert [type(module) for module in model.modules()] == kinds
    assert [s.name for s in find_linears(model).skipped if s.reason == READ] == names
    with torch.device("meta"):
        planned = build().eval()
    mark_without_storage(planned)
    assert [s.name for s in find_linears(planned).skipped if s.reason == READ] == names
    quantize_model(model, RTN())
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


class Asks(nn.Module):
    """Reads what is no computation of one weight, and computes with another."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.asked, self.used = inner, nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        assert self.asked.weight.shape[0] == 64
        return self.inner(self.asked(x.to(self.asked.weight.device)) + x @ self.used.weight.T)


def test_asking_for_a_shape_is_not_reading_a_weight():
    model = tiny.build("dense", 0)[0].eval()
    model.model.layers[0].mlp = Asks(model.model.layers[0].mlp)
    assert mark_read_weights(model) == ["model.layers.0.mlp.used"]
    quantize_model(model, RTN())
    model(torch.arange(20)[None])


def test_a_quantized_linears_weight_is_a_tensor_that_is_not_computed_with(layout):
    weight = torch.randn(64, 128)
    layer = QuantLinear(RTN().quantize_one(weight))
    use_kernels(layer)
    assert (layer.kernel is not None) == (layout == "laid out")
    assert isinstance(layer.weight, torch.Tensor)
    assert (layer.weight.shape, layer.weight.device) == (weight.shape, weight.device)
    assert layer.weight.numel() == weight.numel()
    assert "64, 128" in repr(layer.weight)
    for compute in (lambda w: w.norm(), lambda w: weight @ w.T, lambda w: w.mul_(2), lambda w: w.data.copy_(weight)):
        with pytest.raises(TypeError, match=r"^[^\n]*LINEAR\.quantized\.dequantize\(\)[^\n]*$"):
            compute(layer.weight)
    assert layer.quantized.dequantize().sub(weight).norm() < 0.2 * weight.norm()


def test_a_model_without_linears_is_refused_in_a_sentence():
    assert (
        too_few(Linears({}, {}, []), 0)
        == "there is nothing to quantize in this model; left out: no linear layer was found"
    )
    model = tiny.build("dense", 0)[0].eval()
    for name in list(find_linears(model).layers):
        parent, _, child = name.rpartition(".")
        old = getattr(model.get_submodule(parent), child)
        setattr(model.get_submodule(parent), child, Codes(old.in_features, old.out_features, bias=False))
    with pytest.raises(
        PointError, match=r"there is nothing to quantize in this model; left out: .*Codes has a forward"
    ):
        settle_layers(model, 0.0)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_min_coverage_is_a_share(value):
    from qbench.config import RuntimeConfig
    from qbench.model.coverage import check_setting

    with pytest.raises(RequestError) as refusal:
        check_setting(RuntimeConfig(min_coverage=value))
    refused(refusal.value, key="runtime.min_coverage", names=[str(value), "from 0 to 1"])
