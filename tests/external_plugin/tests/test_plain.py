"""A plain checkpoint keeps qbench's contracts and computes what the quantized model computes, in transformers alone."""

import torch
from qbench_example.plain import Plain
from qbench_example.pow2 import Pow2
from transformers import AutoModelForCausalLM

from qbench.sources.tiny import build
from qbench.testing import ExporterConformance


class TestPlain(ExporterConformance):
    tolerance = 1e-6

    def make(self):
        return Plain()

    def read(self, folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_fused_experts_are_refused_before_they_are_quantized():
    assert "experts" in Plain().refuse_model(build("moe", 0)[0], Pow2())
