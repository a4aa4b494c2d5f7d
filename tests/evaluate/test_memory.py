"""Bytes by component against sums that a reader can check, and peaks against allocations of a known size."""

import pytest
import torch

from qbench.evaluate.memory import Peak, weight_bytes
from qbench.layers.linear import PackedWeight, use_kernels
from qbench.model.linears import quantized_weights
from qbench.passes.quantize import quantize_model
from qbench.registry import make_quantizer
from qbench.sources import tiny
from tests.conftest import thinned

HEAD_FREE = 258 * 64 * 4  # the tied embedding, fp32
LINEARS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)  # q, o; k, v; gate, up, down of two layers


@pytest.fixture
def model():
    built, _ = tiny.build("dense", 0)
    return built.eval().requires_grad_(False)


def test_baseline_by_component(model):
    counted = weight_bytes(model)
    assert (counted.linears, counted.embeddings, counted.head) == (4 * LINEARS, HEAD_FREE, 0)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert counted.total == 4 * sum(p.numel() for p in model.parameters()) + buffers
    assert counted.quantized == {}
    assert counted.aux == counted.codes == 0


def test_an_untied_head_counts_apart(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert weight_bytes(model).head == HEAD_FREE


def test_quantized_by_component(model):
    before = weight_bytes(model)
    rows, _ = quantize_model(model, make_quantizer({"name": "sinq", "nbits": 4, "group_size": 64}))
    counted = weight_bytes(model)
    assert counted.codes == LINEARS // 2
    assert counted.quantized["scale"] == counted.quantized["zero"] == 2 * LINEARS // 64
    assert counted.quantized["input_scale"] == 2 * 2 * (
        6 * 64 + 192
    )  # fp16; q, k, v, o, gate, up read 64 channels and down 192
    assert counted.linears == 0
    assert (counted.embeddings, counted.rest) == (before.embeddings, before.rest)
    assert counted.codes + counted.aux == sum(row.packed_bytes for row in rows)
    for row in rows:
        assert sum(row.stored_bytes.values()) == row.packed_bytes
        assert row.stored_bytes["input_scale"] == 2 * row.shape[-1]


def test_what_each_method_stores(model):
    layer = {"l": model.model.layers[0].mlp.down_proj}
    from qbench.passes.quantize import quantize_linears

    def stored(**settings):
        (_, row), *_ = quantize_linears(layer, make_quantizer({"group_size": 64, **settings})).values()
        return row.stored_bytes

    assert set(stored(name="rtn", nbits=4)) == {"codes", "scale", "zero"}
    assert set(stored(name="nf4")) == {"codes", "scale", "codebook"}
    assert set(stored(name="rtn", rotation="hadamard")) == {"codes", "scale", "zero", "signs"}
    wide, narrow = stored(name="rtn", nbits=4), stored(name="rtn", nbits=4, aux_dtype="int8")
    assert narrow["codes"] == wide["codes"]
    assert 0 < narrow["scale"] < wide["scale"]  # with the step and the offset of its own codes


def test_routers_stay_linears():
    built, _ = tiny.build("moe", 0)
    built.eval().requires_grad_(False)
    whole = weight_bytes(built)
    quantize_model(built, make_quantizer({"name": "rtn", "nbits": 8, "group_size": 64}))
    counted = weight_bytes(built)
    assert counted.linears == 2 * 4 * 64 * 4  # two routers of four experts
    assert counted.codes == (whole.linears - counted.linears) // 4


@pytest.mark.parametrize(
    ("settings", "architecture"),
    thinned(
        [
            {"name": "sinq", "aux_dtype": "fp16"},
            {"name": "sinq", "aux_dtype": "int8"},
            {"name": "rtn", "symmetric": True, "aux_dtype": "int8"},
            {"name": "rtn", "nbits": 3, "group_size": 32},
            {"name": "nf4"},
            {"name": "rtn", "rotation": "hadamard"},
            {"name": "higgs", "grid_dim": 1},
        ],
        ["dense", "moe"],
    ),
)
def test_what_is_counted_is_what_is_held(layout, settings, architecture):
    built, _ = tiny.build(architecture, 0)
    built.eval().requires_grad_(False)
    quantize_model(built, make_quantizer({"group_size": 64, **settings}))
    stored = sum(weight.nbytes for weight in quantized_weights(built))
    use_kernels(built)
    held = [m for m in built.modules() if isinstance(m, PackedWeight)]
    assert all((module.layout is not None) == (layout == "laid out") for module in held)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*built.parameters(), *built.buffers())}
    counted = weight_bytes(built)
    assert counted.total == sum(storage.nbytes() for storage in storages.values())
    assert sum(weight.nbytes for weight in quantized_weights(built)) == stored  # the stored form, in either layout
    if layout == "packed":
        assert counted.codes + counted.aux == stored
    elif settings.get("aux_dtype") == "int8":  # the tiles' fp16 beside the tables
        groups = sum(module.format.scale.stored.numel() for module in held)
        assert counted.quantized["scale"] > 3 * groups


def test_peak_of_resident_memory_starts_anew():
    size = 200 * 2**20
    held = torch.ones(size // 4)
    del held
    peak = Peak(torch.device("cpu"))
    if peak.rss_bytes is None:
        pytest.skip("the kernel's high-water mark cannot be reset here")
    before = peak.rss_bytes
    held = torch.ones(size // 4)
    del held
    assert 0.9 * size < peak.rss_bytes - before < 1.2 * size  # also after it is freed
    assert Peak(torch.device("cpu")).rss_bytes < peak.rss_bytes + 0.5 * size
    assert peak.alloc_bytes is None
