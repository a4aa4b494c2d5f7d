"""A third party's quantizer, installed from its own package beside a built wheel of ours, in a fresh environment."""

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
        python, "-c", "import qbench, qbench.plugins, qbench_pow2 as p; print(qbench.__file__, p.__file__)", cwd=empty
    )
    assert where.returncode == 0, where.stderr
    for path in where.stdout.split():
        assert Path(path).is_relative_to(python.parents[1]), f"{path} is not the installed wheel"


def test_one_point(installed):
    python, empty, _ = installed
    done = run(python, "-m", "qbench", *ONE_POINT, cwd=empty)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["status"], summary["quantizer"], summary["nbits"]) == ("ok", "pow2", 4)
    assert 4 < summary["bits_per_weight"] < 6


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
