"""Shared fixtures: tiny models, a fast in-process command line, and the cached reference model."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

from qbench.errors import first_setting

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"

# Processes that tests start run this checkout, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach for the Hub, and fail at once where one would
if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, a core each: threads of many would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # it starts as many processes as there are cores
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU then


_frozen = 0  # modules that were imported when it was done last


def pytest_collection_finish():
    _freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device is here")


def pytest_runtest_logfinish():
    if len(sys.modules) > _frozen + 200:
        _freeze()


def _freeze():
    """What is imported stays: half a million objects of torch, transformers and lm-eval that no collection looks at."""
    global _frozen
    gc.collect()
    gc.freeze()
    _frozen = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def _yaml_once():
    """Hydra reads each YAML of its own and of conf/ once a process, not whenever it composes: they do not change."""
    from hydra.core.plugins import Plugins

    Plugins.instance()  # its search executes modules again, and what they define is then another class
    from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource

    load, known = ImportlibResourcesConfigSource.load_config, {}

    def load_once(self, config_path):
        if self.path not in ("hydra.conf", "qbench.conf"):
            return load(self, config_path)
        if (key := (self.path, self.provider, config_path)) not in known:
            known[key] = pickle.dumps(load(self, config_path))  # what is composed of it is written into
        return pickle.loads(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImportlibResourcesConfigSource, "load_config", load_once)
        yield


def thinned(*axes):
    """Every combination of the axes' values for parametrize: those that are slow are marked so.

    Fast are as many as the longest axis has values, so that each value of each axis is in one at least. Two axes whose
    lengths have a common divisor meet in some of their pairs alone; the slow suite has them all.
    """
    axes = [list(axis) for axis in axes]
    fast = {tuple(k % len(axis) for axis in axes) for k in range(max(map(len, axes)))}
    cases = []
    for places in product(*(range(len(axis)) for axis in axes)):
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        cases.append(pytest.param(*values, marks=[] if places in fast else [pytest.mark.slow]))
    return cases


@cache
def _composer():
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    from qbench.config import register
    from qbench.sweep.compose import Composer

    register()
    with initialize_config_module("qbench.conf", version_base="1.3"):
        composed = compose("config", return_hydra_config=True)
        return Composer(composed, GlobalHydra.instance().config_loader())


def composed(words: Iterable[str]):
    """The configuration of a point that these overrides ask for, as a sweep composes it (qbench/sweep/plan.py)."""
    return _composer()(tuple(words))


@dataclass(frozen=True)
class Outcome:
    status: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict:
        return json.loads(self.stdout.strip().splitlines()[-1])


def refused(outcome: Outcome | BaseException, key: str | None = None, names: Iterable[str] = ()) -> str:
    """Asserts a refusal in one sentence that names the key and each of the names, and returns the sentence.

    Of a command: exit status 2, one line of qbench's own on stderr, and the same sentence in the JSON line on stdout,
    with the key, if that is a setting, and the choices that the sentence lists.
    Of an error: its `key`, where it carries one, is the key, and what the names are is among its `choices`, where it
    carries them.
    """
    if isinstance(outcome, Outcome):
        assert outcome.status == 2, outcome.stderr
        assert "Traceback" not in outcome.stderr
        (sentence,) = (line for line in outcome.stderr.splitlines() if line.startswith("qbench: "))
        said = outcome.summary
        assert said == {"status": "refused", "error": sentence.removeprefix("qbench: ")} | {
            part: said[part] for part in ("key", "choices")
        }
        if key is not None and first_setting(f"{key}=") == key:
            assert said["key"] == key
        _, _, listed = sentence.partition("choose from: ")
        assert not listed or sorted(said["choices"]) == listed.split(", ")
        assert all(choice in sentence for choice in said["choices"])
    else:
        sentence = str(outcome)
        if (carried := getattr(outcome, "key", None)) is not None and key is not None:
            assert carried == key
        assert not getattr(outcome, "choices", ()) or set(names) <= set(outcome.choices)
    assert "\n" not in sentence
    if key is not None:
        node, _, field = key.partition(".")  # of a member's own setting, as in `quantizer=rtn: nbits must be ...`
        assert key in sentence or (f"{node}=" in sentence and field in sentence), f"{key} is not named: {sentence}"
    for word in names:
        assert word in sentence, f"{word!r} is not named: {sentence}"
    return sentence


@pytest.fixture
def qbench(tmp_path, monkeypatch):
    """Runs `python -m qbench ARGS` in this process, with its own outputs folder; returns the Outcome.

    Hydra composes once, and not a first time to see whether some YAML sets `hydra.mode`, which none does.
    """
    from hydra._internal.hydra import Hydra

    from qbench.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)

    def call(*args: str) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "argv", ["qbench", *args])
        with redirect_stdout(out), redirect_stderr(err):
            try:
                status = main()
            except SystemExit as leaving:
                status = leaving.code
        return Outcome(status, out.getvalue(), err.getvalue())

    return call


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """The point that settings, each a word or several, ask for; its results lie in the folder `outputs`."""
    from qbench.request.prepare import prepare

    monkeypatch.chdir(tmp_path)

    def point(*settings, outputs="together"):
        words = [word for setting in settings for word in setting.split()]
        return prepare(replace(composed(words), outputs=str(tmp_path / outputs)), words)

    return point


@pytest.fixture(scope="session")
def tiny():
    """A fresh random dense model and its byte tokenizer, for tests that do not change it."""
    from qbench.sources.tiny import build

    model, tokenizer = build("dense", 0)
    return model.eval().requires_grad_(False), tokenizer


@pytest.fixture(scope="session")
def smollm2_folder():
    """The converted reference model, shared between runs in outputs/models."""
    from qbench.sources import smollm2

    return smollm2.prepare(Path(os.environ.get("QBENCH_TEST_CACHE", ROOT / "outputs" / "models")), 0)


@pytest.fixture(params=["packed", "laid out"])
def layout(request, monkeypatch):
    """Runs a test twice: with the weights packed, and laid out for the kernels, whose ops have a CPU implementation."""
    if request.param == "laid out":
        monkeypatch.setattr("qbench.layers.linear._have_kernels", lambda device: True)
    return request.param


@pytest.fixture
def data():
    if not DATA.is_dir():
        pytest.skip("the measuring texts (../shared/data) are not on this machine")
    return DATA


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1234)
