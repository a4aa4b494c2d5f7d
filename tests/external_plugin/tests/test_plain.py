"""A plain checkpoint computes what the quantized model computes, in transformers alone."""

import pytest
import torch
from qbench_example.plain import Plain
from qbench_example.pow2 import Pow2
from transformers import AutoModelForCausalLM

from qbench.errors import RequestError
from qbench.passes.quantize import quantize_model
from qbench.sources.tiny import build


def test_it_computes_the_same(tmp_path):
    model, tokenizer = build("dense", 0)
    model.eval().requires_grad_(False)
    quantize_model(model, Pow2())
    Plain().save(model, tokenizer, tmp_path / "out", {"run_id": "a"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(40)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RequestError):
        Plain().check_target(tmp_path)
    assert Plain().refuse_model(build("moe", 0)[0], Pow2())
