"""The official packages behind quantizer=upstream/...: listed, never imported unasked, refused when missing.

What they compute is in test_upstream_oracle.py; nothing here needs them to be installed.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from qbench.registry import quantizer_class
from qbench.request.options import options

ROOT = Path(__file__).resolve().parents[2]
# quantizer -> the package on PyPI and the module that is imported from it
PACKAGES = {
    "upstream/hqq": ("hqq", "hqq.core.quantize"),
    "upstream/nf4": ("bitsandbytes", "bitsandbytes.functional"),
    "upstream/sinq": ("sinq", "sinq.optimize"),
}


def pinned(name: str) -> str:
    (version,) = (field.default for field in fields(quantizer_class(name)) if field.name == "version")
    return version


def refused(outcome) -> str:
    """The one sentence of a request that was refused before anything was measured."""
    assert outcome.status == 2
    assert outcome.summary["status"] == "refused"
    (sentence,) = outcome.stderr.splitlines()
    assert not list(Path().rglob("result.json"))
    return sentence


@pytest.mark.parametrize("name", PACKAGES)
def test_without_the_package_the_request_is_refused(name, qbench, monkeypatch):
    package, _ = PACKAGES[name]
    usual = importlib.metadata.version

    def version(distribution: str) -> str:
        if distribution == package:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return usual(distribution)

    monkeypatch.setattr(importlib.metadata, "version", version)
    sentence = refused(qbench("model=tiny-dense", f"quantizer={name}"))
    assert sentence.startswith(f"qbench: quantizer={name}: needs the official package {package} {pinned(name)}")
    assert f"pip install --no-deps {package}=={pinned(name)}" in sentence


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_cannot_be_imported_is_refused(name, qbench, monkeypatch):
    package, module = PACKAGES[name]
    monkeypatch.setattr(importlib.metadata, "version", lambda distribution: pinned(name))
    for part in (package, module):
        monkeypatch.setitem(sys.modules, part, None)
    sentence = refused(qbench("model=tiny-dense", f"quantizer={name}"))
    assert f"import of {module} halted" in sentence
    assert f"pip install --no-deps {package}=={pinned(name)}" in sentence


@pytest.mark.parametrize("name", PACKAGES)
def test_another_version_is_refused(name, qbench, monkeypatch):
    package, _ = PACKAGES[name]
    monkeypatch.setattr(importlib.metadata, "version", lambda distribution: "9.9")
    sentence = refused(qbench("model=tiny-dense", f"quantizer={name}"))
    assert (
        f"version={pinned(name)} is asked for, but {package} 9.9 is installed: set it to that, or pip install"
        in sentence
    )


def test_group_sizes_that_the_packages_lack(qbench):
    assert "32, 64, 128" in refused(qbench("model=tiny-dense", "quantizer=upstream/nf4", "quantizer.group_size=48"))
    sentence = refused(qbench("model=tiny-dense", "quantizer=upstream/sinq", "quantizer.group_size=8"))
    assert "group_size must be at least 16" in sentence


def test_the_catalog_and_typos_know_them_by_their_full_name(qbench):
    assert set(PACKAGES) <= options("quantizer").keys()
    assert all(f"Needs the package {package}." in options("quantizer")[name] for name, (package, _) in PACKAGES.items())
    sentence = refused(qbench("quantizer=upstream/hq"))
    assert sentence.startswith("qbench: unknown quantizer 'upstream/hq'; did you mean 'upstream/hqq'? choose from: ")
    assert "sinq, upstream/hqq, upstream/nf4, upstream/sinq" in sentence
    assert "did you mean 'quantizer.nbits'?" in refused(qbench("quantizer=upstream/sinq", "quantizer.nbit=3"))


@pytest.mark.slow
def test_qbench_never_imports_them_unasked(tmp_path):
    """Packages of these names lie on the path, so that an import would succeed and be seen."""
    for package, _ in PACKAGES.values():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    code = (
        "import sys, qbench.__main__, qbench.catalog, qbench.registry as r;"
        "[r.quantizer_class(name) for name in r.quantizer_names()];"
        f"print([p for p in {[package for package, _ in PACKAGES.values()]} if p in sys.modules])"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", PACKAGES)
def test_make_oracle_installs_the_version_that_is_asked_for(name):
    package, _ = PACKAGES[name]
    assert f" {package}=={pinned(name)}" in (ROOT / "Makefile").read_text()
