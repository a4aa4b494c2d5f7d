"""`quantizer=file` in a pass: what else a file holds is used and reported, and a file of another model is refused."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qbench import registry
from qbench.checkout import entry_points
from qbench.format.format import Format
from qbench.model.linears import find_linears
from qbench.plugins.rtn import RTN
from qbench.readers.file import File
from qbench.readers.reader import Entry, ReadError
from qbench.record.store import Store
from qbench.sources.tiny import build, byte_tokenizer
from tests.conftest import ROOT, refused

SUFFIX = ".rtn.safetensors"


@dataclass(frozen=True)
class Rounding:
    """Reads plain safetensors whose linears are on RTN's grid of 8 bits; those in `keep` of its metadata stay plain."""

    def recognizes(self, path: Path) -> bool:
        return path.name.endswith(SUFFIX) and path.is_file()

    def open(self, path: Path, model: Any) -> "OpenRounding":
        with safe_open(path, "pt") as file:
            keep = json.loads(file.metadata()["keep"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        entries = {
            name: Entry(tuple(t.shape), "RTN8", t.numel(), t.dim() == 2 and name not in keep)
            for name, t in tensors.items()
        }
        return OpenRounding(tensors, entries, path.stat().st_size)


@dataclass(frozen=True)
class OpenRounding:
    tensors: dict[str, torch.Tensor]
    entries: dict[str, Entry]
    file_bytes: int
    made_by: str = "RTN8 <b>by a test</b>"
    ignored: dict[str, str] = field(default_factory=lambda: {"mtp.0": "no place"})

    def read(self, name: str) -> Format | torch.Tensor:
        stored = self.tensors[name]
        return RTN(nbits=8, group_size=64).quantize_one(stored) if self.entries[name].quantized else stored


@pytest.fixture(autouse=True)
def reader(monkeypatch):
    @dataclass(frozen=True)
    class Entered:
        name: str = "rounding"
        value: str = "tests:Rounding"

        def load(self):
            return Rounding

    def with_ours(group):
        return [*entry_points(group=group), *([Entered()] if group == registry.READER.group else [])]

    monkeypatch.setattr(registry, "entry_points", with_ours)


def written(path: Path, change=lambda tensors: None, keep=(), kind="dense", seed=0) -> Path:
    model = build(kind, seed)[0]
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    change(tensors)
    path = path / f"model{SUFFIX}"
    save_file(tensors, path, metadata={"keep": json.dumps(list(keep))})
    return path


@pytest.fixture
def point(qbench):
    def run(path, *more):
        return qbench("model=tiny-dense", "quantizer=file", f"quantizer.path={path}", "task.max_windows=2", *more)

    return run


def result(outcome, tmp_path):
    return Store(str(tmp_path / "outputs")).load(outcome.summary["run_id"])


def test_the_original_in_a_file_is_the_original(point, tmp_path):
    everything = [name for name, p in build("dense", 0)[0].named_parameters() if p.dim() == 2]
    outcome = point(written(tmp_path, keep=everything))
    summary = outcome.summary
    assert (summary["ppl_delta"], summary["kl"], summary["top1_agreement"]) == (0, 0, 1)
    assert (summary["coverage"], summary["bits_per_weight"]) == (0, 32)  # fp32 in this file
    assert result(outcome, tmp_path).quantization.others == []


def test_norms_embedding_and_tied_head_are_the_files(point, tmp_path):
    def change(tensors):
        tensors["model.norm.weight"] *= 1.5
        tensors["model.layers.1.input_layernorm.weight"] *= 0.5

    outcome = point(written(tmp_path, change))
    quantization = result(outcome, tmp_path).quantization
    others = {row.name: row for row in quantization.others}
    assert set(others) == {"model.norm.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"}
    assert others["model.norm.weight"].relative_error == pytest.approx(0.5)
    assert (others["model.norm.weight"].place, others["model.embed_tokens.weight"].place) == ("rest", "embedding")
    assert quantization.embedding_bits == quantization.head_bits == pytest.approx(8.5)  # 8, and 32 of 64: scale, zero
    model = build("dense", 0)[0]
    embedding = model.model.embed_tokens.weight.numel()
    parameters = sum(p.numel() for p in model.parameters())
    linears = find_linears(model).quantizable
    assert quantization.model_bytes == quantization.packed_bytes + 2 * (parameters - linears - embedding) + int(
        embedding * 8.5 / 8
    )
    assert (quantization.file.reader, quantization.file.ignored) == ("rounding", {"mtp.0": "no place"})
    # the numbers are those of transformers' own forward pass over what the file stands for
    opened = Rounding().open(tmp_path / f"model{SUFFIX}", model)
    for name, parameter in model.named_parameters():
        held = opened.read(name)
        parameter.data = held.dequantize() if isinstance(held, Format) else held
    assert outcome.summary["ppl"] == pytest.approx(_perplexity(model), rel=1e-6)


def _perplexity(model):
    text = (ROOT / "qbench" / "texts" / "mini.txt").read_text(encoding="utf-8")
    ids = torch.tensor(byte_tokenizer()(text)["input_ids"][: 2 * 512]).view(2, 512)
    with torch.no_grad():
        logits = model.eval()(ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()


def test_a_head_of_its_own_unties_the_model(point, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.25

    outcome = point(written(tmp_path, change, keep=["lm_head.weight", "model.embed_tokens.weight"]))
    quantization = result(outcome, tmp_path).quantization
    assert [(row.name, row.place) for row in quantization.others] == [("lm_head.weight", "head")]
    assert (quantization.embedding_bits, quantization.head_bits) == (16, 16)


def test_linears_in_16_bit_are_listed_and_not_covered(point, tmp_path):
    """Whatever runtime.min_coverage asks of a method."""
    outcome = point(written(tmp_path, keep=["model.layers.0.mlp.down_proj.weight"]))
    assert outcome.summary["coverage"] == 0.875
    rows = {row.name: row for row in result(outcome, tmp_path).quantization.layers}
    down = rows["model.layers.0.mlp.down_proj"]
    assert (down.bits_per_weight, down.relative_error, down.method) == (32, 0, "RTN8")
    assert outcome.summary["bits_per_weight"] == pytest.approx(0.875 * 8.5 + 0.125 * 32)


def test_the_content_is_the_identity(point, tmp_path):
    first = point(written(tmp_path)).summary
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / f"model{SUFFIX}").rename(tmp_path / "elsewhere" / f"named{SUFFIX}")
    assert point(moved).summary["run_id"] == first["run_id"]
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other", lambda tensors: tensors["model.norm.weight"].mul_(2))
    assert point(other).summary["run_id"] != first["run_id"]


def _swapped(path, tmp_path):
    """Another file of the same model in its place, as a download renames one."""
    (tmp_path / "new").mkdir(exist_ok=True)
    written(tmp_path / "new", lambda tensors: tensors["model.norm.weight"].mul_(2)).replace(path)


def _touched(path, tmp_path):
    os.utime(path, (1, 1))


@pytest.mark.parametrize("change", [_swapped, _touched, lambda path, _: path.unlink()])
def test_a_file_that_changes_while_it_is_read_gives_no_row(point, tmp_path, monkeypatch, change):
    path, read = written(tmp_path), OpenRounding.read

    def changing(self, name):
        if name == "model.layers.1.mlp.up_proj.weight":
            change(path, tmp_path)
        return read(self, name)

    monkeypatch.setattr(OpenRounding, "read", changing)
    outcome = point(path)
    assert outcome.status == 1
    assert "was changed or replaced while it was read" in outcome.summary["error"]
    assert "ppl" not in outcome.summary


def test_a_file_that_changed_before_it_was_opened_gives_no_row(point, tmp_path, monkeypatch):
    path, opened = written(tmp_path), Rounding.open

    def late(self, place, model):
        _swapped(path, tmp_path)
        return opened(self, place, model)

    monkeypatch.setattr(Rounding, "open", late)
    monkeypatch.setattr("qbench.readers.file.Opened.check_unchanged", lambda self: None)  # it is not, since then
    outcome = point(path)
    assert outcome.status == 1
    assert "was changed or replaced after the point was prepared" in outcome.summary["error"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "holds no model.layers.1.mlp.up_proj.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            "holds model.norm.weight as [3], the model has [64]",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.randn(192, 64)}),
            "does not resemble the original's weight",
        ),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight: what the variant has in its place"),
    ],
)
def test_another_models_file_is_refused(point, tmp_path, change, said):
    outcome = point(written(tmp_path, change))
    assert outcome.status == 1
    assert said in outcome.summary["error"]


def test_no_file_and_no_reader(point, tmp_path):
    refused(point(tmp_path / "absent.gguf"), "quantizer.path", ["absent.gguf"])
    (tmp_path / "text.txt").write_text("nothing")
    assert "is in no format that is known here" in refused(point(tmp_path / "text.txt"))


def test_a_folder_of_several_asks_which_when_it_is_asked_for(point, tmp_path):
    (tmp_path / "models").mkdir()
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / "models" / name).write_bytes(b"GGUF")
    sentence = refused(point(tmp_path / "models"), "quantizer.path", ["holds 2 GGUF models"])
    assert sentence.endswith("as " + str(tmp_path / "models" / "a.gguf") + ": a.gguf, b.gguf")


def test_a_pipe_is_not_waited_for(point, tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "is neither a file nor a folder" in refused(point(tmp_path / "pipe.gguf"), "quantizer.path")


def test_a_pattern_is_for_a_sweep(point, tmp_path):
    assert "takes a sweep: -m" in refused(point(tmp_path / "*"), "quantizer.path")


def test_an_experiment_or_its_files_alone_measure_nothing_else(qbench):
    assert "takes -m" in refused(qbench("experiment=files", "files=x"))
    assert "which is not asked for" in refused(qbench("files=x"), "files")
    assert "which is not asked for" in refused(qbench("-m", "files=x", "quantizer=rtn,sinq"), "files")


def test_one_of_path_and_id(qbench):
    assert "say quantizer.path=FILE_OR_DIR" in refused(qbench("quantizer=file", "quantizer.path=''"))
    assert "say quantizer.path=FILE_OR_DIR" in refused(qbench("quantizer=file"))
    assert "need quantizer.id" in refused(qbench("quantizer=file", "quantizer.path=x", "quantizer.file=y"))


def test_unbound_it_quantizes_nothing():
    with pytest.raises(TypeError, match="bound to a model"):
        File(path="x").quantize([], None)
    with pytest.raises(ReadError, match="no format"):
        File(path=__file__).for_model(None)
