"""The store under kill -9: the old state or the new one, never half of one."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qbench.errors import RequestError
from qbench.record.result import Result
from qbench.record.store import PARTIAL, Store, identity, write_atomically
from tests.conftest import refused
from tests.record.test_result import example

SCORES = {"quantized": np.arange(4.0), "baseline": np.arange(4.0) / 2}
ABOUT = {"model": "hub:a", "protocol": "mini:gptq-w512"}


def test_save_and_load(tmp_path):
    store = Store(tmp_path)
    path = store.save(example(), {"w.safetensors": SCORES})
    assert path == tmp_path / "results" / "0123456789abcdef" / "result.json"
    assert store.load("0123456789abcdef") == example()
    assert {p.name for p in path.parent.iterdir()} == {"result.json", "w.safetensors"}
    assert store.load("absent") is None


def test_saving_again_replaces_and_cleans(tmp_path):
    store = Store(tmp_path)
    folder = store.save(example(), {"w.safetensors": SCORES}).parent
    (folder / f"{PARTIAL}left-by-a-kill").write_bytes(b"half")
    renewed = replace(example(), evaluation=[replace(example().evaluation[0], window_nll_file="new.safetensors")])
    store.save(renewed, {"new.safetensors": SCORES})
    assert {p.name for p in folder.iterdir()} == {"result.json", "new.safetensors"}
    store.save(example(status="failed", error="x", evaluation=[]))
    assert {p.name for p in folder.iterdir()} == {"result.json"}


def test_a_result_without_its_windows_is_not_finished(tmp_path):
    store = Store(tmp_path)
    folder = store.save(example(), {"w.safetensors": SCORES}).parent
    (folder / "w.safetensors").unlink()
    assert store.load(example().run_id) is None


def test_damaged_files_are_measured_again(tmp_path):
    store = Store(tmp_path)
    path = store.save(example(), {"w.safetensors": SCORES})
    path.write_text(path.read_text()[:100])
    assert store.load(example().run_id) is None
    store.save_baseline("key", SCORES, ABOUT)
    assert np.array_equal(store.load_baseline("key", ABOUT)["baseline"], SCORES["baseline"])
    (store.baselines / "key.safetensors").write_bytes(b"1234567")
    assert store.load_baseline("key", ABOUT) is None
    assert store.load_baseline("other", ABOUT) is None


def test_a_baseline_of_another_model_is_refused(tmp_path):
    store = Store(tmp_path)
    store.save_baseline("key", SCORES, ABOUT)
    with pytest.raises(RequestError) as refusal:
        store.load_baseline("key", ABOUT | {"model": "hub:b"})
    refused(refusal.value, key="key.safetensors", names=["hub:a", "hub:b", "remove"])


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "f", b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RequestError, match="cannot write to outputs="):
        Store(tmp_path / "file")


def test_identity_is_stable_and_sensitive():
    assert identity({"b": 1, "a": [2.5, None]}) == identity({"a": [2.5, None], "b": 1})
    assert identity({"a": 1}) != identity({"a": 2})


WRITER = """
import sys, itertools
import numpy as np
from dataclasses import replace
from qbench.record.store import Store
from tests.record.test_result import example
store = Store(sys.argv[1])
example().to_json()  # the first call takes longer than the writer may live
print("ready", flush=True)
for i in itertools.count():
    name = f"w{i}.safetensors"
    evaluation = [replace(example().evaluation[0], window_nll_file=name)]
    result = replace(example(), command=[str(i)] * 2000, evaluation=evaluation)
    store.save(result, {name: {"quantized": np.full(2000, float(i)), "baseline": np.zeros(2000)}})
"""


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_writers_leave_no_half_result(tmp_path, kills):
    from safetensors.numpy import load_file

    seen = 0
    for attempt in range(kills):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(random.Random(attempt).uniform(0.0, 0.05))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        path = tmp_path / "results" / example().run_id / "result.json"
        if path.exists():
            result = Result.from_json(path.read_bytes())
            number = float(result.command[0])
            windows = load_file(path.parent / result.evaluation[0].window_nll_file)
            assert (windows["quantized"] == number).all()
            seen += 1
    assert seen >= kills // 2
