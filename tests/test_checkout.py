"""Where the code may lie: a checkout that nobody installed, one with another qbench installed beside it, and tests
that are run against an installed wheel from a folder without the code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.installs import copy, environment, install, run

pytestmark = pytest.mark.slow

TESTS = ("tests/__init__.py", "tests/conftest.py", "tests/random_requests.py", "tests/test_cli.py")
POINT = "tests/test_cli.py::test_a_point_ends_in_one_json_line_and_a_valid_result"
CHILD = "tests/test_cli.py::test_help_and_catalog_name_every_choice"  # in a process of its own
WHERE = """
import json, os, qbench, qbench.conf, qbench.plugins.rtn as rtn
from qbench.registry import quantizer_names
print(json.dumps([[os.path.dirname(m.__file__) for m in (qbench, qbench.conf, rtn)], quantizer_names()]))
"""


def new_method(checkout: Path) -> Path:
    """Names a quantizer that no installed metadata can know yet."""
    project = checkout / "pyproject.toml"
    group = '[project.entry-points."qbench.quantizers"]\n'
    project.write_text(project.read_text().replace(group, f'{group}newer = "qbench.plugins.rtn:RTN"\n'))
    return checkout


def passes(python: Path, folder: Path, *tests: str) -> None:
    done = run(python, "-m", "pytest", "-p", "no:cacheprovider", *tests, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(tests)} passed" in done.stdout


@pytest.mark.parametrize("beside", ["nothing installed", "a wheel installed", "stale metadata"])
def test_a_checkout_runs_its_own_code(tmp_path, beside):
    python = environment(tmp_path)
    checkout = new_method(copy(ROOT, tmp_path / "checkout", *TESTS))
    if beside == "a wheel installed":
        install(python, copy(ROOT, tmp_path / "older"))
    if beside == "stale metadata":
        stale = checkout / "qbench_llm.egg-info"
        stale.mkdir()
        (stale / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: qbench-llm\nVersion: 0.0.1\n")
        (stale / "entry_points.txt").write_text("[qbench.quantizers]\nolder = qbench.plugins.gone:Gone\n")
    where = run(python, "-c", WHERE, cwd=checkout)
    assert where.returncode == 0, where.stderr
    for folder in ("qbench", "conf", "plugins"):
        assert f'"{checkout / folder}"' in where.stdout
    assert '"newer"' in where.stdout
    assert '"rtn"' in where.stdout
    assert '"older"' not in where.stdout
    passes(python, checkout, POINT, CHILD)


def test_tests_run_against_an_installed_wheel(tmp_path):
    python = environment(tmp_path)
    install(python, copy(ROOT, tmp_path / "ours"))
    elsewhere = tmp_path / "elsewhere"
    for name in TESTS:
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, elsewhere / name)
    shutil.copy(ROOT / "pyproject.toml", elsewhere)  # the markers; without qbench/ beside it, it names no members
    where = run(python, "-c", WHERE, cwd=elsewhere)
    assert where.stdout.count(str(python.parents[1])) == 3, where.stderr
    passes(python, elsewhere, POINT, CHILD)
