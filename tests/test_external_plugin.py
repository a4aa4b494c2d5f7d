"""A third party's package with one member of every kind, installed beside a wheel of ours in a fresh environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.installs import copy, environment, install, run

pytestmark = pytest.mark.slow

ONE_POINT = ("quantizer=pow2", "model=tiny-dense", "task.max_windows=2")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(the environment's python, an empty folder, the example's copy)"""
    base = tmp_path_factory.mktemp("third_party")
    python = environment(base)
    example = copy(ROOT / "tests" / "external_plugin", base / "example")
    install(python, copy(ROOT, base / "ours"), example)
    empty = base / "empty"
    empty.mkdir()
    return python, empty, example


def test_runs_from_the_wheel(installed):
    python, empty, _ = installed
    where = run(
        python,
        "-c",
        "import qbench, qbench.plugins, qbench_example as p; print(qbench.__file__, p.__file__)",
        cwd=empty,
    )
    assert where.returncode == 0, where.stderr
    for path in where.stdout.split():
        assert Path(path).is_relative_to(python.parents[1]), f"{path} is not the installed wheel"


def test_one_point_through_all_kinds(installed):
    """Quantizer, transform, format, source, protocol, tracker and exporter are theirs; the harness is not edited."""
    python, empty, _ = installed
    made = run(python, "-m", "qbench_example.raw", "weights", cwd=empty)
    assert made.returncode == 0, made.stderr
    theirs = ("quantizer=pow2", "transform=gains", "model=raw", "model.path=weights", "task=late", "tracker=json_lines")
    export = ("export.format=plain", "export.dir=plain")
    done = run(python, "-m", "qbench", *theirs, *export, "task.max_windows=2", cwd=empty)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["status"], summary["quantizer"], summary["nbits"]) == ("ok", "pow2", 4)
    assert (summary["model"], summary["protocol"]) == ("weights", "mini:late-w512-first2")
    assert summary["bits_per_weight"] == 4 + 8 / 64, "the block float's own bytes"
    result = json.loads((empty / "outputs" / "results" / summary["run_id"] / "result.json").read_text())
    assert result["quantization"]["transform"]["coverage"] > 0.5
    assert {layer["backend"] for layer in result["quantization"]["layers"]} == {"dequantize + matmul"}
    (line,) = (empty / "outputs" / "runs.jsonl").read_text().splitlines()
    assert json.loads(line)["ppl"] == summary["ppl"]
    loads = "import transformers as t; print(t.AutoModelForCausalLM.from_pretrained('plain').num_parameters())"
    assert run(python, "-c", loads, cwd=empty).stdout.strip() == str(result["model"]["parameters"])
    again = run(python, "-m", "qbench", *theirs, "task.max_windows=2", cwd=empty)
    assert "already recorded" in again.stderr, "their settings make an identity as ours do"


def test_a_packed_checkpoint_holds_their_format(installed):
    python, empty, _ = installed
    first = run(python, "-m", "qbench", *ONE_POINT, "export.dir=packed", cwd=empty)
    assert first.returncode == 0, first.stderr
    again = run(python, "-m", "qbench", "model=packed", "model.path=packed", "task.max_windows=2", cwd=empty)
    assert again.returncode == 0, again.stderr
    ppl = [json.loads(done.stdout.splitlines()[-1])["ppl"] for done in (first, again)]
    assert ppl[0] == ppl[1]


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ("task.windw=1", "task.window"),
        ("tracker.fil=x", "tracker.file"),
        ("model.pth=x", "model.path"),
        ("task.window=many", "task.window"),
        ("model.path=nowhere", "model.path"),
    ],
)
def test_their_settings_are_checked_as_ours_are(installed, wrong, key):
    python, empty, _ = installed
    done = run(python, "-m", "qbench", "model=raw", "task=late", "tracker=json_lines", wrong, cwd=empty)
    assert done.returncode == 2
    assert key in done.stderr
    assert sum(line.startswith("qbench: ") for line in done.stderr.splitlines()) == 1


def test_its_fields_are_command_line_keys(installed):
    python, empty, _ = installed
    done = run(python, "-m", "qbench", *ONE_POINT, "quantizer.nbitz=3", cwd=empty)
    assert done.returncode == 2
    assert "quantizer.nbits" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_typo_is_told_about_it(installed):
    python, empty, _ = installed
    done = run(python, "-m", "qbench", "quantizer=pow3", cwd=empty)
    assert done.returncode == 2
    assert "did you mean 'pow2'?" in done.stderr
    assert "rtn" in done.stderr, "ours are still listed"
    assert "Traceback" not in done.stderr


def test_the_catalog_lists_it(installed):
    python, empty, _ = installed
    done = run(python, "-m", "qbench.catalog", cwd=empty)
    assert done.returncode == 0, done.stderr
    assert "pow2" in done.stdout


def test_its_own_tests_pass(installed):
    python, empty, example = installed
    done = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", example, cwd=empty)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
