"""Both transforms on the reference model, whose weights are real: its logits stay, and everything is covered."""

from __future__ import annotations

import pytest
import torch

from qbench.testing.transforms import transformed
from qbench.transforms.hadamard import Hadamard
from qbench.transforms.presinq import PreSINQ
from qbench.transforms.transform import LIMIT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("transform", [PreSINQ(16, 2), Hadamard()], ids=["presinq", "hadamard"])
def test_the_logits_stay(smollm2_folder, transform):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval().requires_grad_(False)
    before, after, record, _ = transformed(model, transform)
    assert float((after - before).norm() / before.norm()) <= LIMIT
    assert record.moved <= LIMIT
    folded = isinstance(transform, PreSINQ)
    assert record.residual is not folded
    assert {row.name.rpartition(".")[2] for row in record.alone} == (set() if folded else {"down_proj"})
    assert record.coverage == pytest.approx(1 if folded else 0.75, abs=1e-3)
