"""export.dir: a point that succeeded leaves a packed checkpoint, and nothing else does."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from qbench.checkpoint import packed as checkpoint
from qbench.checkpoint.manifest import read
from qbench.record.result import Result
from qbench.sources.tiny import build
from tests.conftest import thinned

TINY = ("model=tiny-dense", "task.max_windows=2", "quantizer=rtn")


@pytest.mark.usefixtures("layout")
def test_export_writes_a_checkpoint_and_is_not_part_of_the_point(qbench):
    first = qbench(*TINY)
    exported = qbench(*TINY, "export.dir=exports/a")
    assert exported.status == 0
    assert "measured again" in exported.stderr
    assert exported.summary["run_id"] == first.summary["run_id"]
    assert exported.summary["ppl"] == first.summary["ppl"]
    origin = read(Path("exports/a"))["origin"]
    assert origin["run_id"] == first.summary["run_id"]
    assert origin["quantizer"]["name"] == "rtn"
    assert str(Path.cwd()) not in Path("exports/a/qbench.json").read_text()
    checkpoint.load(Path("exports/a"))
    assert [p.name for p in Path("exports").iterdir()] == ["a"]


def test_the_checkpoint_of_another_point_is_not_overwritten(qbench):
    assert qbench(*TINY, "quantizer.nbits=3", "export.dir=same").status == 0
    outcome = qbench(*TINY, "quantizer.nbits=4", "export.dir=same")
    assert outcome.status == 2
    assert "checkpoint of another point" in outcome.stderr
    assert next(iter(read(Path("same"))["layers"].values()))["weights"][""]["nbits"] == 3
    again = qbench(*TINY, "quantizer.nbits=3", "export.dir=same")  # result and checkpoint are there
    assert "already recorded" in again.stderr


@pytest.mark.slow
def test_a_sweep_exports_each_point_and_skips_what_is_exported(qbench):
    sweep = ("-m", *TINY, "quantizer.nbits=3,4", "export.dir='exports/${quantizer.name}-${quantizer.nbits}'")
    assert qbench(*sweep).status == 0
    assert sorted(p.name for p in Path("exports").iterdir()) == ["rtn-3", "rtn-4"]
    assert qbench(*sweep).summary["skipped"] == 2


@pytest.mark.parametrize("place", ["occupied", "file", "file/below"])
def test_a_bad_export_dir_is_refused_before_anything_is_measured(qbench, place):
    Path("occupied").mkdir()
    Path("occupied/notes.txt").write_text("mine")
    Path("file").write_text("mine")
    outcome = qbench(*TINY, f"export.dir={place}")
    assert outcome.status == 2
    assert outcome.stderr.count("qbench: ") == 1
    assert place.split("/")[0] in outcome.stderr
    assert not list(Path("outputs").rglob("*.json"))
    assert not list(Path("outputs").glob("baselines/*"))


def test_a_failed_point_exports_nothing(qbench):
    outcome = qbench(*TINY, "model=tiny-moe", "runtime.min_coverage=1", "export.dir=exports/a")
    assert outcome.status == 1
    assert not Path("exports").exists()


def test_a_failed_export_keeps_the_result(qbench, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    outcome = qbench(*TINY, "export.dir=exports/a")
    assert outcome.status == 1
    assert outcome.summary["status"] == "ok"
    assert "the result is recorded, but" in outcome.stderr
    assert "No space left" in outcome.stderr
    assert not list(Path("exports").iterdir())
    assert "already recorded" in qbench(*TINY).stderr


AUTOGPTQ = ("export.format=autogptq", "quantizer.group_size=32", "export.dir=exports/a")


@pytest.mark.usefixtures("layout")
def test_export_as_autogptq(qbench):
    exported = qbench(*TINY, *AUTOGPTQ)
    assert exported.status == 0
    assert "autogptq checkpoint written to exports/a" in exported.stderr
    described = json.loads(Path("exports/a/quantize_config.json").read_text())
    assert (described["bits"], described["group_size"], described["sym"]) == (4, 32, False)
    origin = described["meta"]["origin"]
    assert origin["run_id"] == exported.summary["run_id"]
    assert origin["quantizer"]["name"] == "rtn"
    assert str(Path.cwd()) not in Path("exports/a/config.json").read_text()
    tensors = load_file("exports/a/model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.qweight"].dtype == "int32"
    assert sum(name.endswith(".qweight") for name in tensors) == 14
    assert len(tensors) == 66  # four per linear; embedding and norms
    assert qbench(*TINY, *AUTOGPTQ, "quantizer.nbits=8").status == 2  # another point's place


def test_a_group_as_wide_as_some_layers_is_said_as_asked(qbench):
    """Of tiny-dense's layers, which read 64 or 192 channels, groups of 64 are whole rows in some."""
    assert qbench(*TINY, *AUTOGPTQ, "quantizer.group_size=64", "quantizer.symmetric=true").status == 0
    assert json.loads(Path("exports/a/quantize_config.json").read_text())["group_size"] == 64


@pytest.mark.parametrize("format", ["packed", "autogptq"])
def test_an_export_generates_as_the_model_did(qbench, tiny, format):
    from transformers import AutoTokenizer, GenerationConfig

    model, tokenizer = build("dense", 0)
    asked = dict(eos_token_id=[257, 3, 5], do_sample=False, temperature=0.6, repetition_penalty=1.3)  # as published
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    model.save_pretrained("m")
    tokenizer.save_pretrained("m")
    Path("m/generation_config.json").write_text(json.dumps(asked))
    export = (f"export.format={format}", "export.dir=exports/a", "quantizer.symmetric=true", "quantizer.group_size=32")
    assert qbench("model=local", "model.path=m", *TINY[1:], *export).status == 0
    written = GenerationConfig.from_pretrained("exports/a")
    assert {key: getattr(written, key) for key in asked} == asked
    assert AutoTokenizer.from_pretrained("exports/a").chat_template == tokenizer.chat_template
    if format == "packed":
        reloaded = checkpoint.load(Path("exports/a")).generation_config
        assert reloaded.to_dict() == GenerationConfig.from_pretrained("m").to_dict()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("quantizer=sinq",), "cannot express SINQ: it stores an input scale t"),
        (("quantizer=awq",), "cannot express AWQ: it stores an input scale t"),
        (("quantizer=nf4",), "cannot express NF4: its codes index a codebook"),
        (
            ("quantizer=rtn", "quantizer.rotation=hadamard"),
            "it is quantized in a rotated basis, which AutoGPTQ's format",
        ),
        (("quantizer=hqq",), "cannot express HQQ: its zero points are not integers"),
        (("quantizer.aux_dtype=int8",), "use quantizer.aux_dtype=fp16"),
        (("quantizer.group_size=48",), "no multiple of quantizer.group_size=48"),
        (("model=tiny-moe",), "no place for fused experts (model.layers.0.mlp.experts)"),
        (("export.format=onnx",), "unknown export.format 'onnx'"),
    ],
)
def test_what_autogptq_cannot_hold_is_refused_before_anything_is_measured(qbench, arguments, sentence):
    outcome = qbench(*TINY, *AUTOGPTQ, *arguments)
    assert outcome.status == 2
    assert sentence in outcome.stderr
    assert outcome.stderr.count("qbench: ") == 1
    assert not list(Path("outputs").rglob("*.json"))
    assert not list(Path("outputs").glob("baselines/*"))
    assert not list(Path("exports").rglob("*"))


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize(
    ("layout", "model"), thinned(["packed", "laid out"], ["tiny-dense", "tiny-moe"]), indirect=["layout"]
)
def test_a_packed_checkpoint_is_evaluated_without_its_original(qbench, model):
    exported = qbench(*TINY, f"model={model}", "quantizer.nbits=3", "export.dir=exports/a")
    packed = ("model=packed", "model.path=exports/a", "task.max_windows=2")
    outcome = qbench(*packed)
    assert outcome.status == 0
    assert outcome.summary["ppl"] == exported.summary["ppl"]
    assert outcome.summary["baseline_ppl"] is outcome.summary["ppl_delta"] is None
    same = ("quantizer", "nbits", "group_size", "bits_per_weight", "packed_bytes", "model_bytes", "baseline_bytes")
    assert {k: outcome.summary[k] for k in (*same, "coverage")} == {k: exported.summary[k] for k in (*same, "coverage")}
    assert outcome.summary["model"] == f"{model}-packed"
    assert outcome.summary["quant_seconds"] == 0
    assert "no original" in outcome.stderr
    path = Path("outputs/results") / outcome.summary["run_id"] / "result.json"
    result = Result.from_json(path.read_bytes())
    assert set(load_file(path.parent / result.evaluation[0].window_nll_file)) == {"quantized"}
    assert set(result.seconds) == {"load", "evaluate"}
    assert "already recorded" in qbench(*packed).stderr


def test_wrong_uses_of_a_checkpoint(qbench):
    qbench(*TINY, "export.dir=exports/a")
    for arguments, sentence in (
        (["model=packed"], "needs model.path=DIR"),
        (["model=packed", "model.path=nowhere"], "nowhere is no packed checkpoint"),
        (["model=packed", "model.path=exports/a", "quantizer=rtn"], "leave out quantizer=rtn"),
        (["model=packed", "model.path=exports/a", "export.dir=b"], "leave out export.dir"),
        (["model=local", "model.path=exports/a"], "use model=packed"),
    ):
        outcome = qbench(*arguments)
        assert outcome.status == 2, arguments
        assert sentence in outcome.stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "model-00001-of-00001.safetensors"])
def test_a_damaged_checkpoint_is_refused_by_file(qbench, name):
    qbench(*TINY, "export.dir=exports/a")
    path = Path("exports/a") / name
    path.write_bytes(path.read_bytes()[:-9])
    outcome = qbench("model=packed", "model.path=exports/a")
    assert outcome.status == 2
    assert f"{name} is damaged" in outcome.stderr
