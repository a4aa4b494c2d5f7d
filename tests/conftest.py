"""Shared fixtures: tiny models, a fast in-process command line, and the cached reference model."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"

# Processes that tests start run this checkout, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach for the Hub, and fail at once where one would
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU then


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

    Of a command: exit status 2, one line of qbench's own on stderr, and the same sentence in the JSON line on stdout.
    Of an error: its `key`, where it carries one, is the key, and what the names are is among its `choices`, where it
    carries them.
    """
    if isinstance(outcome, Outcome):
        assert outcome.status == 2, outcome.stderr
        assert "Traceback" not in outcome.stderr
        (sentence,) = (line for line in outcome.stderr.splitlines() if line.startswith("qbench: "))
        assert outcome.summary == {"status": "refused", "error": sentence.removeprefix("qbench: ")}
    else:
        sentence = str(outcome)
        if (carried := getattr(outcome, "key", None)) is not None and key is not None:
            assert carried == key
        assert not getattr(outcome, "choices", ()) or set(names) <= set(outcome.choices)
    assert "\n" not in sentence
    for word in (*([key] if key else []), *names):
        assert word in sentence, f"{word!r} is not named: {sentence}"
    return sentence


@pytest.fixture
def qbench(tmp_path, monkeypatch):
    """Runs `python -m qbench ARGS` in this process, with its own outputs folder; returns the Outcome."""
    from qbench.__main__ import main

    monkeypatch.chdir(tmp_path)

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
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from qbench.config import register
    from qbench.request.prepare import prepare

    monkeypatch.chdir(tmp_path)
    register()

    def point(*settings, outputs="together"):
        words = [word for setting in settings for word in setting.split()]
        with initialize_config_module("qbench.conf", version_base="1.3"):
            config = OmegaConf.to_object(compose("config", words))
        return prepare(replace(config, outputs=str(tmp_path / outputs)), words)

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
