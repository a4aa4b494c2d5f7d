"""Environments of their own for tests: a fresh venv that is lent this one's dependencies, and clean copies to install.

The dependencies come through a .pth line, in which an editable install of qbench stays inert (a .pth file inside such a
folder is not read), so what runs there is what was installed there. Packages are built from copies: a build leaves
build/ and *.egg-info behind, and an old build/ leaks into the wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.conftest import ROOT

SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "qbench", "plugins", "conf", "hydra_plugins")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command without what could lead it back to this checkout."""
    hidden = {"PYTHONPATH", "VIRTUAL_ENV", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def copy(source: Path, target: Path, *more: str) -> Path:
    """A clean copy of what a package is built from; of ours, also the files and folders in `more`."""
    leftovers = shutil.ignore_patterns("__pycache__", "build", "dist", "*.egg-info", ".venv*", ".*_cache")
    names = SHIPPED if source == ROOT else tuple(p.name for p in source.iterdir() if p.name not in ("build", "dist"))
    target.mkdir()
    for part in (source / name for name in (*names, *more) if (source / name).exists()):
        place = target / part.relative_to(source)
        if part.is_dir():
            shutil.copytree(part, place, ignore=leftovers)
        else:
            place.parent.mkdir(exist_ok=True)
            shutil.copy(part, place)
    return target


def environment(base: Path) -> Path:
    """The python of a fresh venv in `base` that sees the dependencies of the running one."""
    # no pip of its own: the one at hand installs into it, and its old setuptools would hide the running one's
    made = run(sys.executable, "-m", "venv", "--without-pip", base / "venv", cwd=base)
    assert made.returncode == 0, made.stderr
    (site,) = (base / "venv").glob("lib/python*/site-packages")
    dependencies = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n", encoding="utf-8")
    return base / "venv" / "bin" / "python"


def install(python: Path, *packages: Path) -> None:
    """Builds the packages from their folders and installs them, without their dependencies."""
    flags = ["--no-deps", "--force-reinstall", "--disable-pip-version-check", "-q"]
    if int(version("setuptools").partition(".")[0]) >= 77:  # what the pyproject files ask for: works offline
        flags.append("--no-build-isolation")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", *flags)
    done = run(*pip, *packages, cwd=python.parents[2])
    assert done.returncode == 0, done.stderr
