"""For the comparisons with official implementations: real layers with real inputs, and where the packages are."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

ORACLES = Path(sys.prefix) / "oracle"  # kept off sys.path: these packages are frozen, and heed no one else's versions
BLOCKS = (0, 8)
LINEAR_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
SEQUENCES, WINDOW = 8, 256


@dataclass(frozen=True)
class RealGroup:
    """One linear group of the reference model: weights `[out, in]` and the inputs `[tokens, in]` they read."""

    name: str
    weights: list[Tensor]
    inputs: Tensor


@pytest.fixture(scope="session")
def oracle_package():
    """Gives the folder of a package that `make oracle` put aside, and lets its modules be imported for this session."""
    added = str(ORACLES)

    def find(name: str) -> Path:
        if not (ORACLES / name).is_dir():
            pytest.skip(f"{name} is not installed; run `make test-oracle`")
        if added not in sys.path:
            sys.path.append(added)
        return ORACLES / name

    yield find
    if added in sys.path:
        sys.path.remove(added)


@pytest.fixture(scope="session")
def auto_gptq(oracle_package) -> ModuleType:
    """auto_gptq.quantization.gptq alone: the package around it does not import with transformers 5."""
    alone = ModuleType("auto_gptq_quantization")
    alone.__path__ = [str(oracle_package("auto_gptq") / "quantization")]
    sys.modules[alone.__name__] = alone
    return importlib.import_module(f"{alone.__name__}.gptq")


@pytest.fixture(scope="session")
@torch.no_grad()
def real_groups(smollm2_folder) -> list[RealGroup]:
    """Every linear group of some blocks of the reference model, with the inputs that a text gives them."""
    from importlib.resources import files

    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (files("qbench.texts") / "mini-calibration.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: SEQUENCES * WINDOW]).view(SEQUENCES, WINDOW)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).model
    model.layers = model.layers[: BLOCKS[-1] + 1]
    groups = []
    for block in BLOCKS:
        for names in LINEAR_GROUPS:
            linears = [model.layers[block].get_submodule(name) for name in names]
            rows: list[Tensor] = []
            linears[0].register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].flatten(0, 1)))
            groups.append((f"block {block} {', '.join(names)}", [linear.weight.detach() for linear in linears], rows))
    for sequence in ids:
        model(sequence[None], use_cache=False)
    return [RealGroup(name, weights, torch.cat(rows)) for name, weights, rows in groups]
