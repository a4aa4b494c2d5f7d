"""The wheel, installed in an empty environment, works from an empty folder as the checkout does."""

import json
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

from tests.conftest import ROOT
from tests.installs import environment, install, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that neither the checkout nor its build folder is touched."""
    source = tmp_path_factory.mktemp("source") / "qbench"
    ignored = shutil.ignore_patterns(".git", ".venv*", "outputs", "build", "*.egg-info", "__pycache__", ".whl")
    shutil.copytree(ROOT, source, ignore=ignored)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(target), str(source)]
    subprocess.run(command, check=True)
    (path,) = target.glob("*.whl")
    return path


def test_every_folder_of_code_is_a_package_of_the_wheel():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for base, name in (("qbench", "qbench"), ("plugins", "qbench.plugins"), ("hydra_plugins", "hydra_plugins")):
        folders = {path.parent.relative_to(ROOT / base) for path in (ROOT / base).rglob("*.py")}
        found |= {".".join((name, *folder.parts)) for folder in folders}
    conf = {path.parent.relative_to(ROOT) for path in (ROOT / "conf").rglob("*.yaml")}
    assert found | {".".join(("qbench", *folder.parts)) for folder in conf} == set(project["packages"])


@pytest.mark.slow
def test_everything_lives_under_qbench(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    elsewhere = {name for name in names if ".dist-info" not in name and not name.startswith("qbench/")}
    assert elsewhere == {"hydra_plugins/qbench_sweeper/__init__.py"}  # where Hydra looks for a sweeper
    for name in ("conf/config.yaml", "conf/model/qwen3-8b.yaml", "plugins/sinq.py", "texts/mini.txt"):
        assert f"qbench/{name}" in names
    built = {n.removeprefix("qbench/") for n in names if n.endswith((".yaml", ".txt")) and ".dist-info" not in n}
    assert {f"conf/{p.relative_to(ROOT / 'conf')}" for p in (ROOT / "conf").rglob("*.yaml")} <= built


@pytest.mark.slow
def test_it_runs_from_an_empty_folder(wheel, tmp_path):
    """The environment holds the wheel alone; its dependencies are lent by this one, which saves their download.

    The slow test below installs them for real.
    """
    python = environment(tmp_path)
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    install(python, wheel)
    check(python, site, tmp_path)


@pytest.mark.slow
def test_it_installs_and_runs_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    for package in ("torch", wheel):
        # run() hides PYTHONPATH: on it, pip takes the *.egg-info of an editable install for the wheel's
        done = run(python, "-m", "pip", "install", "-q", *constraints, package, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    assert not (site / "conf").exists()
    assert not (site / "plugins").exists()
    check(python, site, tmp_path)


def check(python, site, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run(
        *(python, "-m", "qbench", "model=tiny-dense", "quantizer=sinq", "task.max_windows=2"), cwd=tmp_path / "empty"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "ok"
    code = "import qbench, qbench.plugins, qbench.conf; print(qbench.plugins.__file__)"
    where = run(python, "-c", code, cwd=tmp_path / "empty")
    assert where.stdout.startswith(str(site)), where.stderr
