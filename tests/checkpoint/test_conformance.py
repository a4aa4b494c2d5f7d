"""The built-in formats of checkpoints pass the suite that a third party's must pass, and the suite can fail."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from qbench.checkpoint import packed
from qbench.checkpoint.autogptq import AutoGPTQ
from qbench.checkpoint.compressed import CompressedTensors
from qbench.checkpoint.gguf import GGUF
from qbench.checkpoint.packed import Packed
from qbench.registry import EXPORTER, find, make_quantizer, names
from qbench.sources.file import File
from qbench.testing import ExporterConformance


class TestPacked(ExporterConformance):
    def make(self):
        return Packed()

    def read(self, folder):
        return packed.load(folder)


class TestAutoGPTQ(ExporterConformance):
    def make(self):
        return AutoGPTQ()

    def refused(self):
        settings = [
            {"name": "sinq"},
            {"name": "nf4"},
            {"name": "rtn", "aux_dtype": "int8", "group_size": 32},
            {"name": "rtn", "group_size": 48, "symmetric": True},
        ]
        return [make_quantizer(one) for one in settings]


class TestCompressedTensors(TestAutoGPTQ):
    def make(self):
        return CompressedTensors()

    def read(self, folder):
        try:
            import compressed_tensors  # noqa: F401
        except ImportError:
            return None
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class TestGGUF(ExporterConformance):
    def make(self):
        return GGUF()

    def refused(self):
        settings = [
            {"name": "sinq"},
            {"name": "nf4"},
            {"name": "rtn"},
            {"name": "rtn", "nbits": 3, "symmetric": True},
            {"name": "rtn", "aux_dtype": "int8", "group_size": 32, "symmetric": True},
            {"name": "rtn", "group_size": 48, "symmetric": True},
        ]
        return [make_quantizer(one) for one in settings]

    def read(self, folder):
        return File(path=str(folder)).load(torch.float32, torch.device("cpu"), folder).model


def test_every_registered_format_is_tested_here():
    ours = {find(EXPORTER, name) for name in names(EXPORTER)}
    assert {cls for cls in ours if cls.__module__.startswith("qbench.")} == {Packed, AutoGPTQ, CompressedTensors, GGUF}


@dataclass(frozen=True)
class Careless(Packed):
    """Writes its files where they belong one after the other, over whatever is there."""

    def check_target(self, folder, run_id=None):
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, model, tokenizer, folder, origin):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"at": str(folder)}))
        tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    "contract",
    [
        "test_the_checkpoint_is_complete_and_alone",
        "test_a_failing_write_leaves_what_was_there",
        "test_its_own_checkpoint_is_replaced",
        "test_anything_else_is_not_overwritten",
        "test_the_checkpoint_of_another_point_is_occupied",
    ],
)
def test_the_suite_finds_what_a_careless_exporter_does(contract, tmp_path):
    class Suite(ExporterConformance):
        def make(self):
            return Careless()

    with pytest.raises((AssertionError, pytest.fail.Exception, OSError)):
        getattr(Suite(), contract)(tmp_path)
