"""The reference model end to end: known baselines, SINQ before RTN, and what a kill leaves behind."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from qbench.record.result import Result

pytestmark = pytest.mark.slow


@pytest.fixture
def point(qbench, smollm2_folder, tmp_path):
    """Runs a point on SmolLM2 without converting it again."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "models").symlink_to(smollm2_folder.parent)

    def call(*arguments):
        outcome = qbench(*arguments)
        assert outcome.status == 0, outcome.stderr
        return outcome.summary

    return call


def test_published_baseline_and_sinq_before_rtn(point, data):
    wikitext = ("task=wikitext2", f"task.path={data / 'wiki.test.raw'}", "task.window=1024", "task.max_windows=4")
    ppl = {}
    for nbits in (3, 4):
        for quantizer in ("rtn", "sinq"):
            summary = point(f"quantizer={quantizer}", f"quantizer.nbits={nbits}", *wikitext)
            assert summary["protocol"] == "wikitext2:gptq-w1024-first4"
            assert summary["baseline_ppl"] == pytest.approx(23.083, abs=0.02)
            ppl[quantizer, nbits] = summary["ppl"]
    assert 23.083 < ppl["sinq", 4] < ppl["rtn", 4] < ppl["sinq", 3] < ppl["rtn", 3]
    assert ppl["sinq", 3] < 0.75 * ppl["rtn", 3]


def test_published_baseline_at_2048(point, data):
    wikitext = ("task=wikitext2", f"task.path={data / 'wiki.test.raw'}", "task.max_windows=2")
    assert point("quantizer=rtn", *wikitext)["baseline_ppl"] == pytest.approx(18.837, abs=0.02)


def test_mini_separates_sinq_from_rtn(point):
    """The embedded text is long enough to tell them apart at 3 bits: the intervals do not touch."""
    mini = ("quantizer.nbits=3", "task.max_windows=8")
    sinq, rtn = point("quantizer=sinq", *mini), point("quantizer=rtn", *mini)
    assert sinq["bits_per_weight"] < 3.55
    assert sinq["ppl_delta_high"] < rtn["ppl_delta_low"]


def test_help_answers_at_once():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "qbench", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.5


def test_killed_points_leave_no_half_result(tmp_path):
    command = [sys.executable, "-m", "qbench", "model=tiny-dense", "task.max_windows=40", "runtime.rerun=true"]
    draw = random.Random(0)
    for _ in range(8):
        running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(3, 8))
        running.send_signal(signal.SIGKILL)
        running.wait()
        for path in tmp_path.rglob("result.json"):
            assert Result.from_json(path.read_bytes()).status == "ok"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "ok"
