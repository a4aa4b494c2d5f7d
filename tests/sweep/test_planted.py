"""A pass of six with a variant that raises, exhausts memory, or takes its process along: five results, one failure."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qbench.record.result import Result
from qbench.sources.tiny import build
from tests.conftest import ROOT
from tests.kill_sweep import Attack, passes_of

PLANTED = '''
import os, signal, sys
from dataclasses import dataclass
from qbench.plugins.rtn import RTN
from qbench.quant.quantizer import Quantizer

@dataclass(frozen=True)
class Planted(Quantizer):
    """Round to nearest, but for the words below."""
    word: str = ""

    def quantize_one(self, weight, stats=None):
        if self.word == "raise":
            raise ArithmeticError("planted")
        if self.word == "memory":
            raise MemoryError("planted")
        if self.word == "exit":
            sys.exit(3)
        if self.word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return RTN().quantize_one(weight)
'''


@pytest.fixture
def planted(tmp_path) -> dict[str, str]:
    """The environment of a process that finds a quantizer of a package of its own."""
    package = tmp_path / "package"
    files = {
        "planted.py": PLANTED,
        "planted_conf/__init__.py": "",
        "planted_conf/quantizer/planted.yaml": "name: planted\nword: ''\n",
        "planted-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: planted\nVersion: 1\n",
        "planted-1.dist-info/entry_points.txt": (
            "[qbench.quantizers]\nplanted = planted:Planted\n[qbench.conf]\nplanted = planted_conf\n"
        ),
    }
    for name, content in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(content)
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(package), str(ROOT)))}


def sweep(words: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "qbench", "-m", "model=tiny-dense", "task.max_windows=2", "quantizer=planted"]
    return subprocess.Popen(
        [*command, f"quantizer.word={words}"],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def results(folder: Path) -> dict[str, Result]:
    found = [Result.from_json(p.read_bytes()) for p in folder.glob("outputs/results/*/result.json")]
    return {result.config["quantizer"]["word"]: result for result in found}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "error", "processes"),
    [
        ("raise", "ArithmeticError: planted", 1),
        ("memory", "MemoryError: planted", 1),
        ("exit", "exit status 3", 4),
        ("kill", "SIGKILL", 4),
    ],
)
def test_five_results_and_one_failed_point(tmp_path, planted, word, error, processes):
    """A process that dies is tried again in halves: of 6 at most 3 and 3, then 2 and 1, then each of the 2."""
    process = sweep(f"a,b,c,{word},d,e", tmp_path, planted)
    stdout, stderr = process.communicate()
    assert process.returncode == 1, stderr
    summary = json.loads(stdout.splitlines()[-1])
    assert (summary["points"], summary["ok"], summary["failed"]) == (6, 5, 1)
    found = results(tmp_path)
    assert {name: result.status for name, result in found.items()} == dict.fromkeys("abcde", "ok") | {word: "failed"}
    assert error in found[word].error
    assert len({result.evaluation[0].ppl for result in found.values() if result.status == "ok"}) == 1
    assert 1 <= stderr.count(": started, log in ") <= (1 if processes == 1 else 7)
    assert not list(tmp_path.glob("outputs/locks/*"))

    again = sweep("a,b,c,d,e", tmp_path, planted)
    stdout, stderr = again.communicate()
    assert json.loads(stdout.splitlines()[-1])["skipped"] == 5


@pytest.mark.slow
def test_a_request_that_is_wrong_once_the_model_is_here_costs_its_own_point(tmp_path):
    """The model's configuration says how long a calibration sequence may be; all of it happens in one process."""
    model, tokenizer = build("dense", 0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    swept = ("model=local", "model.path=model", "quantizer=rtn,gptq", "calibration.window=512,4096")
    command = [sys.executable, "-m", "qbench", "-m", *swept, "task.max_windows=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, summary["ok"], summary["failed"]) == (1, 2, 1), done.stderr
    (failed,) = (result for result in summary["results"] if result["status"] == "failed")
    assert failed["error"].startswith("calibration.window=4096, but this model takes 2048 positions")
    assert done.stderr.count(": started, log in ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_no_points_failure(tmp_path, planted, number):
    process = sweep("a,b,c,d,e,f", tmp_path, planted)
    while not (running := passes_of(process.pid)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    while not list(tmp_path.glob("outputs/locks/*")) and process.poll() is None:
        time.sleep(0.05)  # the pass is at work
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted; finished points are kept" in stderr
    assert not any(p.is_running() and p.status() != "zombie" for p in running)
    assert all(result.status == "ok" for result in results(tmp_path).values())
    assert not list(tmp_path.glob("outputs/locks/*"))
    assert not list(tmp_path.glob("outputs/**/.partial-*"))
    again = sweep("a,b,c,d,e,f", tmp_path, planted)
    stdout, stderr = again.communicate()
    assert again.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["ok"] == 6


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path):
    attack = Attack(tmp_path)
    assert sum(attack.run(4, random.Random(2)).values()) == 4
    assert len(attack.finished) >= 8
