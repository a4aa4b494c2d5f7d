"""Linear groups without a text: what reads the same tensor is quantized as one by the methods that ask for it."""

from __future__ import annotations

import pytest
import torch

from qbench.errors import PointError
from qbench.layers.linear import QuantLinear
from qbench.passes.groups import groups_of
from qbench.passes.quantize import quantize_model
from qbench.plugins.sinq import SINQ
from qbench.record.result import Result
from qbench.sources import tiny

GROUPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def built(architecture="dense"):
    model, _ = tiny.build(architecture, 0)
    return model.eval().requires_grad_(False)


def test_the_groups_of_a_model():
    found = groups_of(built())
    assert [[name.rpartition(".")[2] for name in group] for group in found] == GROUPS * 2
    assert found[0][0] == "model.layers.0.self_attn.q_proj"
    moe = groups_of(built("moe"))  # its experts are fused
    assert [[name.rpartition(".")[2] for name in group] for group in moe] == GROUPS[:2] * 2
    with pytest.raises(PointError, match=r"weights are in host memory .*; quantize them one by one"):
        groups_of(built(), offloaded=True)


@pytest.mark.parametrize("architecture", ["dense", "moe"])
def test_a_model_that_is_there_as_a_whole(architecture):
    model, weights = built(architecture), dict(built(architecture).named_parameters())
    rows, _ = quantize_model(model, SINQ(shared_t=True))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(rows) >= len(layers) > 0
    for group in groups_of(built(architecture)):
        together = SINQ(shared_t=True).quantize([weights[f"{name}.weight"] for name in group], None)
        for name, expected in zip(group, together, strict=True):
            assert torch.equal(layers[name].quantized.input_scale, expected.input_scale)
            assert torch.equal(layers[name].quantized.dequantize(), expected.dequantize())


@pytest.mark.parametrize("model", ["tiny-dense", "tiny-moe"])
def test_a_pass_over_the_blocks(qbench, tmp_path, model):
    """The pass, which observes the groups block by block, gives the weights of the model quantized as a whole."""
    short = ("task.window=64", "task.max_windows=1")
    outcome = qbench(f"model={model}", "quantizer=sinq", "quantizer.shared_t=true", *short)
    assert outcome.status == 0, outcome.stderr
    [record] = tmp_path.rglob("result.json")
    result = Result.from_json(record.read_bytes())
    whole = built(model.removeprefix("tiny-"))
    rows, _ = quantize_model(whole, SINQ(shared_t=True))
    measured = {row.name: row.relative_error for row in result.quantization.layers}
    assert measured == {row.name: pytest.approx(row.relative_error, rel=1e-6) for row in rows}
    alone, _ = quantize_model(built(model.removeprefix("tiny-")), SINQ())
    assert measured != {row.name: pytest.approx(row.relative_error, rel=1e-6) for row in alone}
