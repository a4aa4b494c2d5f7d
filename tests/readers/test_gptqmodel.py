"""Folders that GPTQModel packs: its packer's words, its own way back to the older convention, its decoder's numbers."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qbench.readers.gptq import GPTQ
from tests.readers.cases import skeleton, write
from tests.readers.test_gptq import GROUP, random_parts

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def gptqmodel():
    """Its modules of linears in torch and of conventions, without the package around them, which patches transformers.

    Python's regular expressions stand in for those of pypcre, which it imports and which would have to be compiled.
    """
    place = Path(sys.prefix) / "oracle-gptqmodel"
    if not (place / "gptqmodel").is_dir():
        pytest.skip("gptqmodel is not installed; make oracle does it")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))
        patch.setenv("GPTQMODEL_DISABLE_PACK_EXT", "1")  # its packer in Python, not one that it compiles first
        pcre = ModuleType("pcre")
        pcre.__dict__.update(vars(re), Flag=re.RegexFlag)
        patch.setitem(sys.modules, "pcre", pcre)
        for name in ("gptqmodel", "gptqmodel.models", "gptqmodel.quantization"):
            alone = ModuleType(name)
            alone.__path__ = [str(place.joinpath(*name.split(".")))]
            patch.setitem(sys.modules, name, alone)
        sys.modules["gptqmodel"].DEBUG_ON = False
        config = importlib.import_module("gptqmodel.quantization.config")
        sys.modules["gptqmodel.quantization"].__dict__.update({k: v for k, v in vars(config).items() if k[0] != "_"})
        yield importlib.import_module("gptqmodel.nn_modules.qlinear.torch"), older_convention(place / "gptqmodel")
        for name in [name for name in sys.modules if name.startswith("gptqmodel.")]:
            del sys.modules[name]


def older_convention(package: Path):
    """Its function that subtracts one from zero points, alone: the module around it wants all of the package."""
    dequant = importlib.import_module("gptqmodel.utils.model_dequant")
    tree = ast.parse((package / "utils" / "model.py").read_text(encoding="utf-8"))
    name = "convert_gptq_v2_to_v1_format_module"
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    log = type("Log", (), {"info": type("Info", (), {"once": staticmethod(print)})})
    known = {"torch": torch, "log": log, "BaseQuantLinear": torch.nn.Module}
    known["_revert_gptq_v1_qzeros_correction"] = dequant._revert_gptq_v1_qzeros_correction
    exec(compile(tree, name, "exec"), known)  # with this file's annotations, which are not evaluated
    return known[name]


@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize("order", [True, False])
def test_what_gptqmodel_packs(tmp_path, gptqmodel, nbits, v1, order):
    """A weight on a grid of integers comes out of its packer and our reader as it was, and as its decoder has it."""
    linears, to_v1 = gptqmodel
    expected = {}

    def pack(module, weight):
        rows, columns = weight.shape
        codes, zero, scale = random_parts(module, weight, nbits, columns // GROUP)
        zero = zero.clamp(min=1) if v1 else zero  # a zero point of 0 borrows from its neighbour in that convention
        g_idx = torch.arange(columns) // GROUP
        if order:
            g_idx = g_idx[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
        layer = torch.nn.Linear(columns, rows, bias=False)
        layer.weight.data = scale[:, g_idx].float() * (codes - zero[:, g_idx])
        made = linears.TorchLinear(nbits, GROUP, False, order, columns, rows, format=linears.FORMAT.GPTQ_V2)
        made.pack(layer, scale.float(), zero.float(), g_idx.int())
        decoded = made.dequantize_weight().T
        expected[module] = scale[:, g_idx] * (codes - zero[:, g_idx]).half(), decoded
        if v1:
            to_v1(made, made)
        return {part: getattr(made, part) for part in ("qweight", "qzeros", "scales", "g_idx")}

    config = {"quant_method": "gptq", "bits": nbits, "group_size": GROUP, "desc_act": order}
    path = write(tmp_path / "q", pack, config | {"checkpoint_format": "gptq" if v1 else "gptq_v2"})
    held = GPTQ().open(path, skeleton())
    for module, (weight, decoded) in expected.items():
        assert decoded.dtype == torch.float16
        found = held.read(f"{module}.weight").dequantize(torch.float16)
        assert torch.equal(found, weight), module
        assert torch.equal(found, decoded), module
    assert len(expected) == 14
