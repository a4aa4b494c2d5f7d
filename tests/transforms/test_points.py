"""Points with a transform, through the command line: what is recorded, what it is called, what it can be had with."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from qbench.record.result import Result
from qbench.report.board import sections
from qbench.report.entries import read
from qbench.report.published import Published, beside
from qbench.sources.tiny import byte_tokenizer
from tests.conftest import refused
from tests.passes.architectures import build

SHORT = ("task.window=64", "task.max_windows=2")
SET = ("transform=presinq", "transform.iterations=8", "transform.repeats=1")


def result(folder) -> Result:
    """The one that was written last."""
    newest = max(folder.rglob("result.json"), key=lambda path: path.stat().st_mtime_ns)
    return Result.from_json(newest.read_bytes())


@pytest.mark.parametrize("transform", ["presinq", "hadamard"])
@pytest.mark.parametrize("model", ["tiny-dense", "tiny-moe"])
def test_the_original_after_a_transform_is_the_original(qbench, tmp_path, model, transform):
    done = qbench(f"model={model}", "quantizer=none", f"transform={transform}", *SHORT)
    assert done.status == 0, done.stderr
    assert done.summary["kl"] < 1e-7
    assert abs(done.summary["ppl_delta"]) < 1e-3
    assert done.summary["transform"] == transform
    assert 0 < done.summary["transform_moved"] <= 1e-5
    made = result(tmp_path)
    assert made.identity.transform["name"] == made.quantization.transform.name == transform
    assert made.quantization.bits_per_weight == 16
    assert made.quantization.coverage == 0
    own = {row.name for row in made.quantization.others}
    around = {"model.embed_tokens.weight", "lm_head.weight"}
    assert own >= (around if transform == "hadamard" else {"model.layers.0.input_layernorm.weight"})


METHODS = {
    "rtn": (),
    "hqq": (),
    "sinq": (),
    "nf4": (),
    "gptq": ("calibration.window=64", "calibration.sequences=2"),
    "awq": ("calibration.window=64", "calibration.sequences=2", "calibration.inputs=original"),
    "nvfp4": (),
    "partly": ("quantizer.only='*.down_proj'",),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_method_takes_what_a_transform_made(qbench, tmp_path, method):
    """Of other weights, so other numbers: the point is not that without the transform."""
    words = ("model=tiny-moe", f"quantizer={method}", *METHODS[method], *SHORT)
    plain, done = qbench(*words), qbench(*words, *SET)
    assert done.status == 0, done.stderr
    assert done.summary["bits_per_weight"] == plain.summary["bits_per_weight"]
    assert done.summary["run_id"] != plain.summary["run_id"]
    assert done.summary["kl"] != plain.summary["kl"]
    assert done.summary["kl"] < 0.3
    assert result(tmp_path).quantization.transform.coverage == pytest.approx(0.997, abs=1e-3)


def test_the_calibration_text_chooses(qbench, tmp_path):
    words = ("model=tiny-dense", "quantizer=rtn", "quantizer.nbits=3", "calibration.window=64", *SHORT)
    done = qbench(*words, "transform=presinq")
    assert done.status == 0, done.stderr
    made = result(tmp_path)
    searched = made.quantization.transform.searched
    assert set(searched) == {f"iterations={i} repeats={r}" for i in (2, 8, 16) for r in (1, 2)}
    best = min(searched, key=searched.get)
    chosen = made.quantization.transform.settings
    assert best == f"iterations={chosen['iterations']} repeats={chosen['repeats']}"
    assert made.identity.transform["iterations"] is None, "the point is the one that searches"
    assert made.identity.calibration["text_sha256"], "by a text that belongs to it"
    assert made.quantization.calibration.tokens > 0
    fixed = [f"transform.{key}={chosen[key]}" for key in ("iterations", "repeats")]
    alone = qbench(*words, "transform=presinq", *fixed)
    assert alone.summary["kl"] == done.summary["kl"]
    assert result(tmp_path).identity.calibration is None, "a point that searches nothing is shown no text"


def test_a_board_names_the_transform(qbench, tmp_path):
    for words in (SET, ("transform=hadamard",), ()):
        for method in ("rtn", "none"):
            assert qbench("model=tiny-dense", f"quantizer={method}", *words, *SHORT).status == 0
    [section] = sections(read(tmp_path / "outputs").entries, lambda row: row.score.loss)
    rows = {row.entry.quantizer: row for row in section.rows}
    assert set(rows) == {"rtn", "none", "presinq+rtn", "presinq+none", "hadamard+rtn", "hadamard+none"}
    assert rows["presinq+rtn"].options == {}
    common = {"model": "tiny-dense", "quantizer": "rtn", "protocol": section.protocol, "where": "Table 8", "nbits": 4}
    numbers = [Published(**common, value=1.0, settings={"transform": "presinq"}), Published(**common, value=2.0)]
    beside_ours = {name: beside(numbers, section, row) for name, row in rows.items()}
    assert {name: one.value for name, one in beside_ours.items() if one} == {"presinq+rtn": 1.0, "rtn": 2.0}


@pytest.mark.parametrize("format", ["gguf", "compressed-tensors", "autogptq"])
def test_what_other_programs_load_is_the_point(qbench, format):
    """The norms are in the file as the variant has them: read back, it is the same model, in fp16 for autogptq."""
    symmetric = ("quantizer=rtn", "quantizer.symmetric=true", "quantizer.group_size=32")
    done = qbench("model=tiny-dense", *symmetric, *SET, *SHORT, f"export.format={format}", "export.dir=there")
    assert done.status == 0, done.stderr
    file = "there/model.gguf" if format == "gguf" else "there"
    again = qbench("model=tiny-dense", "quantizer=file", f"quantizer.path={file}", *SHORT)
    assert again.status == 0, again.stderr
    assert again.summary["ppl"] == pytest.approx(done.summary["ppl"], rel=5e-4 if format == "autogptq" else 1e-6)


def test_a_packed_checkpoint_carries_the_changed_norms(qbench, tmp_path):
    words = ("model=tiny-dense", "quantizer=rtn", "quantizer.nbits=4", *SHORT)
    done = qbench(*words, *SET, "export.dir=packed")
    assert done.status == 0, done.stderr
    again = qbench("model=packed", "model.path=packed", *SHORT)
    assert again.status == 0, again.stderr
    assert again.summary["ppl"] == pytest.approx(done.summary["ppl"], rel=1e-6)
    assert result(tmp_path).identity.method == "presinq+rtn"
    tensors = {k: v for file in (tmp_path / "packed").glob("*.safetensors") for k, v in load_file(file).items()}
    assert not torch.equal(tensors["model.layers.0.input_layernorm.weight"], torch.ones(64)), "no fresh model's gains"
    assert not torch.equal(tensors["model.layers.1.post_attention_layernorm.weight"], torch.ones(64))
    origin = json.loads((tmp_path / "packed" / "qbench.json").read_text())["origin"]
    assert origin["transform"]["name"] == "presinq"


def test_a_rotated_model_is_exported_with_its_own_embedding_and_head(qbench, tmp_path):
    words = ("model=tiny-dense", "quantizer=rtn", "quantizer.nbits=4", "transform=hadamard", *SHORT)
    done = qbench(*words, "export.dir=rotated")
    assert done.status == 0, done.stderr
    again = qbench("model=packed", "model.path=rotated", *SHORT)
    assert again.status == 0, again.stderr
    assert again.summary["ppl"] == pytest.approx(done.summary["ppl"], rel=1e-6)
    config = json.loads((tmp_path / "rotated" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False, "whoever loads it would put the embedding in the head's place"
    symmetric = ("quantizer.symmetric=true", "export.format=compressed-tensors", "export.dir=served")
    assert qbench(*words, *symmetric).status == 0
    tensors = load_file(tmp_path / "served" / "model.safetensors")
    assert "lm_head.weight" in tensors
    assert json.loads((tmp_path / "served" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("words", "key", "names"),
    [
        (["transform=presink"], "transform", ["presinq"]),
        (["transform=presinq", "transform.iteration=3"], "transform.iteration", ["transform.iterations"]),
        (["transform=presinq", "transform.repeats=0"], "transform.repeats", ["at least 1"]),
        (
            ["transform=hadamard", "transform.residual=false", "transform.values=false"],
            "transform.residual",
            ["leave one"],
        ),
        (["transform=presinq", "quantizer=noise"], "quantizer", ["transform=presinq"]),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(qbench, words, key, names):
    refused(qbench("model=tiny-dense", *words, *SHORT), key, names)


def test_a_model_that_is_no_chain_of_blocks_is_refused(qbench, tmp_path):
    build("Gemma3nText").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    done = qbench("model=local", f"model.path={tmp_path / 'model'}", "quantizer=rtn", *SET, *SHORT)
    assert done.status == 1
    expected = "transform=presinq needs a model that is a plain chain of blocks, and model is none"
    assert done.summary["error"] == expected
