"""The conformance suite that any tracker, ours or a third party's, must pass.

    from qbench.testing import TrackerConformance

    class TestMine(TrackerConformance):            # pytest finds it by its name
        def make(self):
            return Mine(project="p")

        def runs(self, folder):
            return [...]                           # what Mine keeps of its runs, by id

        def break_service(self, monkeypatch):
            monkeypatch.setattr(...)               # whatever Mine sends to must fail now

No test reaches for a network: `make` gives a tracker that writes to a stand-in, or below the folder of the store.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from qbench.record.identity import Identity
from qbench.record.result import Result
from qbench.record.store import Store
from qbench.registry import TRACKER, make, names
from qbench.track.tracker import Tracker, harmless, sweep_name

SECRET = "s3cr3t" * 7


def point(run_id: str = "0123456789abcdef", **changes: Any) -> Result:
    """A result without measurements, of a model in a folder of this machine."""
    identity = Identity(
        weights="local:abc", remote_code=False, quantizer={"name": "rtn", "nbits": 4}, text_sha256="ab" * 32,
        protocol={"name": "mini", "protocol": "windows", "window": 512}, calibration=None, device="cpu",
        dtype="float32", runtime={"batch_size": 1, "offload": False}, speed=None,
    )  # fmt: skip
    home = Path.home() / "somewhere"
    config = {
        "model": {"name": "mine", "source": "local", "path": str(home / "mine")},
        "quantizer": {"name": "rtn", "nbits": 4},
        "task": {"name": "mini", "path": "~/texts/mini.txt"},
        "outputs": str(Path.cwd() / "outputs"),
    }
    failure = f"cannot read {home}/mine/config.json: no room"
    result = Result(
        run_id=run_id, status="failed", error=failure, created_utc="2026-01-01T00:00:00+00:00", qbench_version="0",
        command=[f"model.path={home}/mine"], config=config, identity=identity, environment={"device": "cpu"},
    )  # fmt: skip
    return replace(result, **changes)


class TrackerConformance:
    """Subclass it under a name that starts with `Test` and define `make`, `runs` and `break_service`."""

    sends_nothing = False  # True for a tracker that tells nobody: it has no runs, and nothing of it can break

    def make(self) -> Tracker:
        raise NotImplementedError(f"{type(self).__name__} must define make(), which returns the tracker to test")

    def runs(self, folder: Path) -> Mapping[str, Any]:
        """What the tracker has sent or kept so far, by the id of its run; of a run that was updated, the last state."""
        raise NotImplementedError(f"{type(self).__name__} must define runs(folder)")

    def break_service(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes whatever the tracker sends to raise an error."""
        raise NotImplementedError(f"{type(self).__name__} must define break_service(monkeypatch)")

    def test_is_a_frozen_dataclass_that_is_registered(self) -> None:
        tracker = self.make()
        cls = type(tracker)
        assert is_dataclass(cls), f"{cls.__name__} must be a dataclass: its fields are its settings"
        assert vars(cls)["__dataclass_params__"].frozen, f"{cls.__name__} must be a frozen dataclass"
        assert replace(tracker) == tracker == self.make(), f"equal settings must make equal {cls.__name__}s"
        settings = {field.name: getattr(tracker, field.name) for field in fields(tracker) if field.init}
        made = [make(TRACKER, {"name": name}) for name in names(TRACKER)]
        name = {type(each): name for name, each in zip(names(TRACKER), made, strict=True)}.get(cls)
        assert name, f"{cls.__name__} must be registered under the entry-point group {TRACKER.group}"
        assert make(TRACKER, settings | {"name": name}) == tracker

    def test_a_point_is_told_once_however_often_it_is_measured(self, tmp_path: Path) -> None:
        tracker = self.make()
        tracker.check()
        for _ in range(2):
            tracker.point(point(), tmp_path, None)
        tracker.point(point("fedcba9876543210"), tmp_path, "sweep-1")
        runs = self.runs(tmp_path)
        expected = 0 if self.sends_nothing else 2
        assert len(runs) == expected, f"two points, one of them told twice, must be {expected} runs, not {list(runs)}"

    def test_a_sweep_is_told_once_however_often_it_is_resumed(self, tmp_path: Path) -> None:
        tracker, results = self.make(), [point("a" * 16), point("b" * 16)]
        name = sweep_name([result.run_id for result in results])
        tracker.sweep(results, tmp_path, name)
        tracker.sweep(results[::-1], tmp_path, name)
        runs = self.runs(tmp_path)
        assert len(runs) == (0 if self.sends_nothing else 1), f"one sweep must be one run, not {list(runs)}"

    def test_a_failure_is_a_warning_and_loses_no_result(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        tracker, store = self.make(), Store(tmp_path)
        store.save(point())
        self.break_service(monkeypatch)
        caplog.set_level(logging.WARNING)
        with harmless(tracker):
            tracker.point(point(), tmp_path, "sweep-1")
        with harmless(tracker):
            tracker.sweep([point()], tmp_path, "sweep-1")
        assert store.load(point().run_id) == point(), "the result must stay as it was"
        warned = [record for record in caplog.records if record.levelno == logging.WARNING]
        if not self.sends_nothing:
            assert len(warned) >= 2, "a failure of the tracker must reach its caller, who warns"

    def test_nothing_secret_leaves_the_machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("WANDB_API_KEY", "HF_TOKEN", "QBENCH_TEST_SECRET"):
            monkeypatch.setenv(name, SECRET)
        for name in ("USER", "LOGNAME", "USERNAME"):
            monkeypatch.setenv(name, "the-user-of-this-machine")
        monkeypatch.setattr(socket, "gethostname", lambda: "the-host-of-this-machine")
        tracker = self.make()
        tracker.point(point(), tmp_path, None)
        tracker.sweep([point()], tmp_path, "sweep-1")
        sent = json.dumps({key: value for key, value in self.runs(tmp_path).items()}, default=repr)
        assert SECRET not in sent, "the values of environment variables must stay here"
        for what, secret in (("home", str(Path.home())), ("folder", os.getcwd())):
            assert len(secret) < 2 or secret not in sent, f"the name of this {what} must stay here: {secret}"
        assert "of-this-machine" not in sent, "the names of the user and of the host must stay here"
        assert "somewhere" not in sent, "of a path only the last name may be sent"
