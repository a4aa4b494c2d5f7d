"""A third party's quantizer, installed from its own package beside a built wheel of ours, in a fresh environment.

Both are built from copies: a build leaves build/ and *.egg-info behind, and an old build/ leaks into the wheel. The
environment sees the dependencies of the running one through a .pth line, in which an editable install of qbench
stays inert (a .pth file inside such a folder is not read), so what runs is the wheel.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "qbench", "plugins", "conf")
ONE_POINT = ("quantizer=pow2", "model=tiny-dense", "task.max_windows=2")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    hidden = {"PYTHONPATH", "VIRTUAL_ENV", "PYTEST_ADDOPTS"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def copy(source: Path, target: Path) -> Path:
    """A clean copy of what a package is built from."""
    leftovers = shutil.ignore_patterns("__pycache__", "build", "dist", "*.egg-info", ".venv*", ".*_cache")
    names = SHIPPED if source == ROOT else tuple(p.name for p in source.iterdir() if p.name not in ("build", "dist"))
    target.mkdir()
    for part in (source / name for name in names if (source / name).exists()):
        if part.is_dir():
            shutil.copytree(part, target / part.name, ignore=leftovers)
        else:
            shutil.copy(part, target / part.name)
    return target


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(the environment's python, an empty folder, the example's copy)"""
    base = tmp_path_factory.mktemp("third_party")
    # no pip of its own: the one at hand installs into it, and its old setuptools would hide the running one's
    made = run(sys.executable, "-m", "venv", "--without-pip", base / "venv", cwd=base)
    assert made.returncode == 0, made.stderr
    python = base / "venv" / "bin" / "python"
    (site,) = (base / "venv").glob("lib/python*/site-packages")
    dependencies = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n", encoding="utf-8")

    ours, example = copy(ROOT, base / "ours"), copy(ROOT / "tests" / "external_plugin", base / "example")
    flags = ["--no-deps", "--force-reinstall", "--disable-pip-version-check", "-q"]
    if int(version("setuptools").partition(".")[0]) >= 77:  # what both pyproject files ask for: works offline
        flags.append("--no-build-isolation")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", *flags)
    done = run(*pip, ours, example, cwd=base)
    assert done.returncode == 0, done.stderr
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
