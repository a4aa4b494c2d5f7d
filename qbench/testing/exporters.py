"""The conformance suite that any format of checkpoints, ours or a third party's, must pass.

    from qbench.testing import ExporterConformance

    class TestMine(ExporterConformance):           # pytest finds it by its name
        def make(self):
            return Mine()

        def refused(self):                         # methods that the format cannot hold
            return [make_quantizer({"name": "awq"})]

        def read(self, folder):                    # if something can read it: a causal model
            return load_mine(folder)

Every method below tests one contract of qbench.checkpoint.exporter.Exporter and says in its failure which one is
broken. The model is a random one of two layers, quantized to 4 bits in groups of 32 columns with symmetric codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from qbench.checkpoint.exporter import Exporter
from qbench.errors import RequestError
from qbench.passes.quantize import quantize_model
from qbench.quant.quantizer import Quantizer
from qbench.registry import make_quantizer
from qbench.sources.tiny import build

ORIGIN = {
    "run_id": "0123456789ab",
    "qbench_version": "0",
    "model": {"name": "tiny", "fingerprint": "random", "note": ""},
    "quantizer": {"name": "rtn"},
}
OTHER = "ba9876543210"


class ExporterConformance:
    """Subclass it under a name that starts with `Test` and define `make`."""

    tolerance: ClassVar[float] = 0.0  # of logits after a round trip, relative; 0: equal to the bit

    def make(self) -> Exporter:
        raise NotImplementedError

    def quantizer(self) -> Quantizer:
        """A calibration-free method that the format can hold."""
        return make_quantizer({"name": "rtn", "nbits": 4, "group_size": 32, "symmetric": True})

    def refused(self) -> Sequence[Quantizer]:
        """Calibration-free methods that the format cannot hold, none if it holds everything."""
        return ()

    def read(self, folder: Path) -> Any | None:
        """The model of a checkpoint in fp32, None if nothing installed reads the format."""
        return None

    def _save(self, folder: Path, quantizer: Quantizer | None = None, tokenizer: Any = None) -> Any:
        model, byte_tokenizer = _quantized(quantizer or self.quantizer())
        self.make().save(model, tokenizer or byte_tokenizer, folder, ORIGIN)
        return model

    def test_it_is_a_frozen_dataclass(self) -> None:
        exporter = self.make()
        assert is_dataclass(exporter), "an exporter must be a dataclass: its fields are settings of `export`"
        assert exporter.__dataclass_params__.frozen, "an exporter must be frozen"

    def test_it_refuses_what_it_cannot_hold_before_anything_is_spent(self) -> None:
        exporter, model = self.make(), build("dense", 0)[0]
        assert exporter.refuse(self.quantizer()) is None, "the format must hold the quantizer of this suite"
        assert exporter.refuse_model(model, self.quantizer()) is None, "the format must hold a dense model"
        for quantizer in self.refused():
            reason = exporter.refuse(quantizer) or exporter.refuse_model(model, quantizer)
            assert reason, f"{quantizer} must be refused before a point's time is spent"
            assert "\n" not in reason, f"{quantizer}: the reason must be one sentence on one line"

    def test_what_it_refuses_leaves_nothing_behind(self, tmp_path: Path) -> None:
        for quantizer in self.refused():
            with pytest.raises(RequestError):
                self._save(tmp_path / "out", quantizer)
            assert list(tmp_path.iterdir()) == [], f"{quantizer}: a refused model must leave no file"

    def test_the_checkpoint_is_complete_and_alone(self, tmp_path: Path) -> None:
        self._save(tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing may stay beside the checkpoint"
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert any(name.endswith((".safetensors", ".gguf")) for name in names), "weights must be in safetensors or GGUF"
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
        assert not pickled, f"{pickled} would have to be unpickled, which runs the code that it holds"
        for path in (tmp_path / "out").iterdir():
            assert str(tmp_path).encode() not in path.read_bytes(), f"{path.name} names a folder of this machine"

    def test_a_failing_write_leaves_what_was_there(self, tmp_path: Path) -> None:
        class Full:
            def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
                raise OSError(28, "No space left on device")

        folder = tmp_path / "out"
        for stage in ("nothing", "an earlier checkpoint"):
            before = _contents(tmp_path)
            with pytest.raises((OSError, RequestError)):
                self._save(folder, tokenizer=Full())
            assert _contents(tmp_path) == before, f"a write that fails must leave {stage} as it was"
            if stage == "nothing":
                self._save(folder)

    def test_its_own_checkpoint_is_replaced(self, tmp_path: Path) -> None:
        self._save(tmp_path / "out")
        (tmp_path / "out" / "left-over.txt").write_text("of the earlier one")
        self._save(tmp_path / "out")
        assert not (tmp_path / "out" / "left-over.txt").exists(), "a new checkpoint must replace the folder as a whole"
        assert [path.name for path in tmp_path.iterdir()] == ["out"], "the earlier checkpoint must be gone"

    def test_anything_else_is_not_overwritten(self, tmp_path: Path) -> None:
        exporter = self.make()
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "notes.txt").write_text("mine")
        (tmp_path / "file").write_text("mine")
        before = _contents(tmp_path)
        for place in ("notes", "file", "file/below"):
            with pytest.raises(RequestError, match=place.partition("/")[0]):
                exporter.check_target(tmp_path / place, ORIGIN["run_id"])
            with pytest.raises((OSError, RequestError)):
                self._save(tmp_path / place)
        assert _contents(tmp_path) == before, "what is not a checkpoint of this format must stay as it is"

    def test_the_checkpoint_of_another_point_is_occupied(self, tmp_path: Path) -> None:
        exporter, folder = self.make(), tmp_path / "out"
        exporter.check_target(folder, ORIGIN["run_id"])
        assert not folder.exists(), "check_target must create nothing"
        self._save(folder)
        exporter.check_target(folder, ORIGIN["run_id"])
        exporter.check_target(folder)
        with pytest.raises(RequestError, match=ORIGIN["run_id"]):
            exporter.check_target(folder, OTHER)

    def test_a_model_laid_out_for_the_kernels_is_written_as_if_packed(self, tmp_path: Path) -> None:
        self._save(tmp_path / "packed")
        model, tokenizer = _quantized(self.quantizer())
        laid_out = [module.lay_out() for module in model.modules() if hasattr(module, "lay_out")]
        assert any(laid_out), "the model of this suite must be one that the kernels can take"
        self.make().save(model, tokenizer, tmp_path / "laid out", ORIGIN)
        one, other = _tensors(tmp_path / "packed"), _tensors(tmp_path / "laid out")
        assert one.keys() == other.keys(), "the layout in memory must not change which tensors are written"
        different = [name for name in one if not torch.equal(one[name], other[name])]
        assert not different, f"the layout in memory must not change what is written: {different[:1]}"

    def test_what_is_read_back_is_what_was_written(self, tmp_path: Path) -> None:
        written = self._save(tmp_path / "out")
        read = self.read(tmp_path / "out")
        if read is None:
            pytest.skip("nothing here reads this format")
        ids = torch.arange(64)[None]
        with torch.no_grad():
            expected, found = written(ids).logits, read(ids).logits
        error = float((found - expected).norm() / expected.norm())
        assert error <= self.tolerance, f"logits after a round trip differ by {error:.1e}, allowed {self.tolerance:.0e}"


def _quantized(quantizer: Quantizer) -> tuple[Any, Any]:
    model, tokenizer = build("dense", 0)
    model.eval().requires_grad_(False)
    quantize_model(model, quantizer)
    return model, tokenizer


def _contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    whole = {path.name: bytearray(path.read_bytes()) for path in folder.glob("*.gguf")}
    whole = {name: torch.frombuffer(content, dtype=torch.uint8) for name, content in whole.items()}
    return whole | {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
