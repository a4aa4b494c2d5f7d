"""A packed checkpoint of qbench's own is a file like any other."""

from dataclasses import replace
from pathlib import Path

import pytest

from qbench.checkpoint import packed
from qbench.passes.quantize import quantize_model
from qbench.readers.packed import PackedFile
from qbench.registry import make_quantizer
from qbench.run import run_pass
from qbench.sources.tiny import build, byte_tokenizer
from qbench.testing import ReaderConformance


class OfPacked(ReaderConformance):
    def make(self):
        return PackedFile()

    def write(self, model, folder):
        copy, _ = build(self.kind, 0)
        quantize_model(copy, make_quantizer({"name": "sinq", "nbits": 3}))
        packed.save(copy, byte_tokenizer(), folder / "checkpoint")
        decoded = {}
        for name, module in copy.named_modules():
            for prefix, weight in (module.packed() if hasattr(module, "packed") else {}).items():
                if len(weight.shape) == 2:
                    decoded[f"{name}.weight"] = weight.dequantize()
                else:
                    part = prefix.rstrip(".")
                    experts = range(weight.shape[0])
                    decoded |= {f"{name}.{i}.{part}.weight": weight.select(i).dequantize() for i in experts}
        decoded["model.norm.weight"] = copy.model.norm.weight.detach()
        return folder / "checkpoint", decoded


class TestDense(OfPacked):
    pass


class TestExperts(OfPacked):
    kind = "moe"


@pytest.mark.parametrize("model", ["tiny-dense", pytest.param("tiny-moe", marks=pytest.mark.slow)])
def test_files_in_one_pass_are_the_points_that_exported_them(prepared, tmp_path: Path, model):
    where, methods = [f"model={model}", "task.max_windows=2"], ("rtn", "nf4")
    exporting = [prepared(*where, f"quantizer={q} export.dir={tmp_path / q}") for q in methods]
    made = [result for point in exporting for _, result in run_pass([point])]
    reading = [prepared(*where, "quantizer=file", f"quantizer.path={tmp_path / q}") for q in methods]
    read = dict((point.run_id, result) for point, result in run_pass(reading))
    for point, one in zip(reading, made, strict=True):
        other = read[point.run_id]
        assert (one.status, other.status, other.pass_points) == ("ok", "ok", 2)
        assert other.evaluation == [replace(record, baseline_cached=True) for record in one.evaluation]
        for key in ("bits_per_weight", "packed_bytes", "model_bytes", "coverage", "weight_error"):
            assert getattr(other.quantization, key) == getattr(one.quantization, key), key


def test_changed_bytes_are_refused(qbench, tmp_path: Path):
    where = ["model=tiny-dense", "task.max_windows=2"]
    assert qbench("quantizer=rtn", f"export.dir={tmp_path / 'x'}", *where).status == 0
    [shard] = (tmp_path / "x").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    outcome = qbench("quantizer=file", f"quantizer.path={tmp_path / 'x'}", *where)
    assert outcome.status == 1
    assert "is damaged: its sha256 is not the one in" in outcome.summary["error"]
