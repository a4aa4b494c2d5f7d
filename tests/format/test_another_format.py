"""A format that qbench does not know, from quantizing to a checkpoint and back: nothing of ours is edited for it."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points

import pytest
import torch

from qbench import registry
from qbench.checkpoint import autogptq
from qbench.checkpoint import packed as checkpoint
from qbench.checkpoint.manifest import MANIFEST, read, seal
from qbench.errors import PointError, RequestError
from qbench.evaluate.memory import weight_bytes
from qbench.kernels import kernel
from qbench.layers.experts import QuantExperts
from qbench.layers.linear import PackedWeight, backend
from qbench.model.linears import coverage, find_linears, matrix, quantized_weights
from qbench.passes.quantize import quantize_group, quantize_model
from qbench.quant.quantizer import Quantizer
from qbench.quant.rounding import round_to_nearest
from qbench.record.quantization import WeightBytes
from qbench.sources import tiny
from qbench.testing import FormatConformance, QuantizerConformance
from tests.conftest import refused
from tests.format.block_float import BLOCK, BlockFloat, BytePerCodeKernel, ToBlockFloat

IDS = torch.arange(40).view(2, 20)
LINEARS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)  # weights of the two layers of the tiny dense model
BUILDERS = {"QuantExperts": lambda old, weights: QuantExperts(weights, old)}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """As if a package with this entry point were installed."""
    found = EntryPoint(BlockFloat.name, f"{BlockFloat.__module__}:BlockFloat", "qbench.formats")
    both = lambda group: [*entry_points(group=group), *([found] if group == found.group else [])]  # noqa: E731
    monkeypatch.setattr(registry, "entry_points", both)


@pytest.fixture
def with_kernel(monkeypatch):
    monkeypatch.setattr(kernel, "_kernels", dict(kernel._kernels))
    kernel.register(BlockFloat, BytePerCodeKernel())


class TestBlockFloat(FormatConformance):
    def make(self, generator, shape):
        return ToBlockFloat().quantize_one(torch.randn(shape, generator=generator))


@pytest.mark.usefixtures("with_kernel")
class TestBlockFloatWithItsKernel(TestBlockFloat):
    pass


class TestToBlockFloat(QuantizerConformance):
    def make(self):
        return ToBlockFloat()


def quantized(architecture):
    model, tokenizer = tiny.build(architecture, 0)
    model.eval().requires_grad_(False)
    rows, _ = quantize_model(model, ToBlockFloat())
    return model, tokenizer, rows


def test_rounding_is_to_the_nearest_value_of_the_block():
    weight = torch.zeros(2, 40)
    weight[0, :4] = torch.tensor([6.0, -0.74, 0.76, 2.4])
    weight[1, 32:35] = torch.tensor([-48.0, 4.1, 19.0])  # of the ragged block: the scale is 8
    dense = ToBlockFloat().quantize_one(weight).dequantize()
    assert dense[0, :4].tolist() == [6.0, -0.5, 1.0, 2.0]
    assert dense[1, 32:35].tolist() == [-48.0, 4.0, 16.0]


@pytest.mark.parametrize(("architecture", "routers"), [("dense", 0), ("moe", 2 * 4 * 64)])
def test_a_model_computes_with_the_weights_that_it_holds(architecture, routers):
    model, _, _ = quantized(architecture)
    plain, _ = tiny.build(architecture, 0)
    plain.eval().requires_grad_(False)
    found = find_linears(plain)
    assert bool(found.experts) == (architecture == "moe")
    assert coverage(model) == 1 - routers / found.weights
    for name, layer in found.layers.items():
        matrix(layer).copy_(model.get_submodule(name).quantized.dequantize())
    for name, module in found.experts.items():
        held = model.get_submodule(name)
        gate, up, down = (getattr(held, projection).quantized.dequantize() for projection in held.projections)
        module.gate_up_proj.copy_(torch.cat([gate, up], 1))
        module.down_proj.copy_(down)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


def test_the_record_tells_what_the_format_stores():
    model, _, rows = quantized("dense")
    row = next(row for row in rows if row.name.endswith("layers.1.mlp.down_proj"))
    assert (row.shape, row.method, row.backend) == ((64, 192), "block-float", "dequantize + matmul")
    assert row.stored_bytes == {"codes": 64 * 192 // 2, "exponent": 64 * 192 // BLOCK}
    assert row.packed_bytes == sum(row.stored_bytes.values())
    assert row.bits_per_weight == 4.25
    assert 0.05 < row.relative_error < 0.2
    assert row.kurtosis_after == row.kurtosis_before  # there is no input scale
    assert row.imbalance_before > 1
    assert row.diagnostics.keys() == {"largest_exponent"}
    counted = weight_bytes(model)
    assert counted == WeightBytes(
        {"codes": LINEARS // 2, "exponent": LINEARS // BLOCK},
        embeddings=counted.embeddings,
        rest=counted.rest,
    )
    assert (counted.codes, counted.aux) == (LINEARS // 2, LINEARS // BLOCK)
    assert counted.quantized == {"codes": LINEARS // 2, "exponent": sum(r.stored_bytes["exponent"] for r in rows)}


@pytest.mark.parametrize("architecture", ["dense", "moe"])
@pytest.mark.parametrize("laid_out", [False, True])
def test_a_checkpoint_and_back(tmp_path, architecture, laid_out, request):
    if laid_out:
        request.getfixturevalue("with_kernel")
    model, tokenizer, _ = quantized(architecture)
    expected = model(IDS).logits
    if laid_out:
        assert all(module.lay_out() for module in model.modules() if isinstance(module, PackedWeight))
    checkpoint.save(model, tokenizer, tmp_path / "packed")
    described = next(iter(read(tmp_path / "packed")["layers"].values()))["weights"]
    assert {weight["format"] for weight in described.values()} == {"test-block-float"}
    loaded = checkpoint.load(tmp_path / "packed", builders=BUILDERS)
    assert torch.equal(loaded(IDS).logits, expected)
    for before, after in zip(quantized_weights(model), quantized_weights(loaded), strict=True):
        assert isinstance(after, BlockFloat)
        assert before.describe() == after.describe()
    with pytest.raises(RequestError, match=r"stored as test-block-float|no place for these stacks"):
        autogptq.expressible(loaded)


def test_a_format_that_is_not_installed_is_named(tmp_path, monkeypatch):
    model, tokenizer, _ = quantized("dense")
    checkpoint.save(model, tokenizer, tmp_path / "packed")
    monkeypatch.setattr(registry, "entry_points", entry_points)
    with pytest.raises(
        RequestError,
        match=r"qbench\.json: model\.layers\S+: unknown format 'test-block-float'; choose from: .*dual-scale",
    ):
        checkpoint.load(tmp_path / "packed")
    with pytest.raises(RequestError) as error:
        checkpoint.save(model, tokenizer, tmp_path / "again")
    refused(error.value, "format", ["dual-scale"])
    assert not (tmp_path / "again").exists()


def test_a_description_without_a_format_is_of_dual_scale(tmp_path):
    model, tokenizer = tiny.build("dense", 0)
    model.eval().requires_grad_(False)
    quantize_model(model, registry.make_quantizer({"name": "sinq"}))
    checkpoint.save(model, tokenizer, tmp_path / "packed")
    manifest = read(tmp_path / "packed")
    for layer in manifest["layers"].values():
        assert layer["weights"][""].pop("format") == "dual-scale"
    (tmp_path / "packed" / MANIFEST).write_text(json.dumps(seal(manifest)))
    assert torch.equal(checkpoint.load(tmp_path / "packed")(IDS).logits, model(IDS).logits)


@pytest.mark.usefixtures("with_kernel")
@pytest.mark.parametrize("tokens", [1, 20])  # of which one or more than a grouped launch takes
def test_experts_through_its_kernel(tokens):
    model, _, _ = quantized("moe")
    expected = model(IDS[:1, :tokens]).logits
    packed = weight_bytes(model)
    assert all(module.lay_out() for module in model.modules() if isinstance(module, PackedWeight))
    torch.testing.assert_close(model(IDS[:1, :tokens]).logits, expected, rtol=1e-4, atol=1e-4)
    held = weight_bytes(model)
    assert held == replace(packed, quantized={**packed.quantized, "codes": 2 * packed.codes})


def test_a_weight_without_a_kernel_is_dequantized(monkeypatch, with_kernel):
    monkeypatch.setattr("qbench.layers.linear._have_kernels", lambda device: True)
    whole, ragged = (ToBlockFloat().quantize_one(torch.ones(4, columns)) for columns in (64, 40))
    assert backend(whole, torch.float32) == "a byte per code"
    assert backend(ragged, torch.float32) == "dequantize + matmul (no fused kernel for 40 input channels)"
    kernel._kernels.pop(BlockFloat)
    assert backend(whole, torch.float32) == "dequantize + matmul (no fused kernel for the format test-block-float)"
    assert not PackedWeight(whole).lay_out()


class Overflowing(ToBlockFloat):
    def quantize_one(self, weight, stats=None):
        made = super().quantize_one(weight)
        return replace(made, exponent=torch.full_like(made.exponent, 255))


class Undecided(Quantizer):
    """A format of its own for every other expert."""

    def quantize(self, weights, stats):
        chosen = float(weights[0][0, 0]) > 0
        return [
            ToBlockFloat().quantize_one(weight) if chosen else round_to_nearest(weight, nbits=4, group_size=32)
            for weight in weights
        ]


def test_what_breaks_the_contract_is_refused_by_name():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PointError, match="layer a: Overflowing produced NaN or Inf"):
        quantize_group(["a"], [weight], Overflowing())

    class Tensors(Quantizer):
        def quantize(self, weights, stats):
            return list(weights)

    with pytest.raises(PointError, match="must return one Format per weight"):
        quantize_group(["a"], [weight], Tensors())
    model, _ = tiny.build("moe", 0)
    model.eval().requires_grad_(False)
    with pytest.raises(
        PointError, match=r"experts: weights of one stack must share their format, got .*test-block-float"
    ):
        quantize_model(model, Undecided())
