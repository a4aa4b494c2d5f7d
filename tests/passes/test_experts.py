"""Fused experts are quantized a chunk at a time, and the chunks leave no trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qbench.errors import PointError
from qbench.parts.partly import Partly
from qbench.passes import experts
from qbench.passes.experts import chunks, quantize_experts
from qbench.plugins.gptq import GPTQ
from qbench.plugins.rtn import RTN
from qbench.plugins.sinq import SINQ
from qbench.quant.quantizer import Quantizer
from qbench.testing import same
from tests.model.test_experts import made, mixtral

NAME = "model.layers.0.mlp.experts"


def block():
    return made(mixtral).model.layers[0].mlp.experts


def rows_of(quantizer: Quantizer, monkeypatch, chunk_bytes: int):
    monkeypatch.setitem(experts.CHUNK_BYTES, "cpu", chunk_bytes)
    packed, rows = quantize_experts(NAME, block(), quantizer)
    return packed, [replace(row, seconds=0) for row in rows]


@pytest.mark.parametrize(
    "quantizer", [RTN(), SINQ(inner="hqq"), Partly(only="*.2.up_proj"), Partly(only="*.down_proj")]
)
def test_chunks_make_no_difference(quantizer, monkeypatch):
    packed, rows = rows_of(quantizer, monkeypatch, 1 << 30)
    for chunk_bytes in (1, 3 * 4 * 64 * 96 * 3):  # one expert, three
        other, its_rows = rows_of(quantizer, monkeypatch, chunk_bytes)
        assert its_rows == rows
        for projection in packed.projections:
            assert same(getattr(packed, projection).quantized, getattr(other, projection).quantized)


def test_rows_come_expert_by_expert_and_share_the_seconds():
    _, rows = quantize_experts(NAME, block(), SINQ())
    assert [r.name for r in rows] == [f"{NAME}.{e}.{p}_proj" for e in range(4) for p in ("gate", "up", "down")]
    assert all(row.seconds > 0 for row in rows)
    assert {type(row.relative_error) for row in rows} == {float}


def test_chunks_cover_the_experts_evenly_within_the_bytes(monkeypatch):
    monkeypatch.setitem(experts.CHUNK_BYTES, "cpu", 3 * 4 * 64 * 96 * 3)
    assert [list(part) for part in chunks(block(), RTN(), "cpu")] == [[0, 1], [2, 3]]
    assert len(chunks(block(), GPTQ(), "cpu")) == 4  # each with two Hessians
    monkeypatch.setitem(experts.CHUNK_BYTES, "cpu", 1)
    assert [list(part) for part in chunks(block(), RTN(), "cpu")] == [[0], [1], [2], [3]]


def test_the_expert_that_cannot_be_quantized_is_named(monkeypatch):
    module = block()
    module.gate_up_proj[2] *= 1e30
    monkeypatch.setitem(experts.CHUNK_BYTES, "cpu", 1 << 30)
    expected = (
        rf"^layer {NAME}\.2\.gate_proj, {NAME}\.2\.up_proj: a scale or zero point is not a finite number below 65504$"
    )
    with pytest.raises(PointError, match=expected):
        quantize_experts(NAME, module, RTN())


def test_a_quantizer_that_breaks_its_contract_is_named():
    class Tensors(Quantizer):
        def quantize(self, weights, stats):
            return [torch.zeros(1)] * len(weights)

    with pytest.raises(PointError, match=rf"^layer {NAME}\.0\.gate_proj, .*: Tensors.quantize must return one Format"):
        quantize_experts(NAME, block(), Tensors())
