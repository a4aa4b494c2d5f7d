"""Sweeps: what is refused, run, skipped, recorded after a death, and run side by side."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qbench.record.lock import locked, remove_stale
from qbench.record.result import Result
from qbench.record.store import PARTIAL, Store
from qbench.sweep import worker as child
from qbench.sweep.plan import expand
from qbench.sweep.worker import explain_exit
from qbench.track.tracker import sweep_name
from tests.conftest import ROOT
from tests.report import examples
from tests.track import wandb_stub

TINY = ("model=tiny-dense", "task.max_windows=2")

# A process in place of the real one that ends as its points' settings say; only nbits=8 goes on to the real command.
DYING = """
import json, os, signal, sys
sent = json.load(open(sys.argv[1]))
nbits = {str(point["config"]["quantizer"]["nbits"]): point for point in sent["points"]}
print("at window 1\\rat window 2", file=sys.stderr, flush=True)
if "2" in nbits:
    os.kill(os.getpid(), signal.SIGKILL)
if "3" in nbits:
    sys.exit(7)
if "4" in nbits:
    refused = {"run_id": nbits["4"]["run_id"], "status": "refused", "error": "the text is too short"}
    print(json.dumps(refused), flush=True)
if "8" in nbits:
    json.dump(sent | {"points": [nbits["8"]]}, open(sys.argv[1] + ".8", "w"))
    os.execv(sys.executable, [sys.executable, "-m", "qbench", "--pass", sys.argv[1] + ".8"])
sys.exit(1)
"""


def recorded(folder: Path = Path("outputs")) -> dict[int, Result]:
    results = [Result.from_json(p.read_bytes()) for p in (folder / "results").glob("*/result.json")]
    return {r.config["quantizer"]["nbits"]: r for r in results}


@pytest.mark.slow
def test_a_process_that_dies_costs_the_point_that_kills_it(qbench, monkeypatch):
    """The sweep is an experiment of the user's own, which the processes have to find too."""
    Path("mine/experiment").mkdir(parents=True)
    params = "{hydra: {sweeper: {params: {quantizer.nbits: '2,3,4,8'}}}}"
    Path("mine/experiment/bits.yaml").write_text(f"# @package _global_\n{params}\n")
    monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", DYING))
    sweep = ("-m", "--config-dir", "mine", "experiment=bits", *TINY, "quantizer=rtn")
    outcome = qbench(*sweep)
    assert outcome.status == 1
    assert outcome.stdout.count("\n") == 1
    assert {k: outcome.summary[k] for k in ("points", "ok", "failed", "skipped")} == {
        "points": 4, "ok": 1, "failed": 3, "skipped": 0,
    }  # fmt: skip
    errors = {nbits: result.error for nbits, result in recorded().items()}
    assert errors[2].startswith("the process was killed by SIGKILL (signal 9; often a sign that memory ran out)")
    assert errors[2].endswith("last lines: at window 2")
    assert errors[3] == "the process ended with exit status 7 and no result; last lines: at window 2"
    assert errors[4] == "the text is too short"
    assert errors[8] is None
    assert recorded()[8].command == ["quantizer.nbits=8", "experiment=bits", *TINY, "quantizer=rtn"]
    assert recorded()[2].command == ["quantizer.nbits=2", "experiment=bits", *TINY, "quantizer=rtn"]
    for ends in ("[1/4] quantizer.nbits=2: FAILED", "[3/4] quantizer.nbits=4: FAILED", "[4/4] quantizer.nbits=8: ok"):
        assert outcome.stderr.count(ends) == 1
    assert "pass 1 of 4 points: 4 unfinished, tried again in halves" in outcome.stderr
    assert not list(Path("outputs").rglob("*.lock"))

    # the same command tries the failed points again and leaves the finished one alone
    finished = recorded()[8]
    monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", "raise SystemExit(9)"))
    outcome = qbench(*sweep)
    assert (outcome.summary["skipped"], outcome.summary["failed"]) == (1, 3)
    assert "exit status 9" in recorded()[2].error
    assert recorded()[8] == finished

    # a point that is measured again on request and dies does not take its earlier result along
    outcome = qbench("-m", *TINY, "quantizer=rtn", "quantizer.nbits=8", "runtime.rerun=true")
    assert outcome.status == 1
    assert recorded()[8] == finished


@pytest.mark.slow
def test_the_points_of_a_sweep_share_a_group(qbench, monkeypatch):
    said = "import json, sys; print(json.load(open(sys.argv[1]))['group'], file=sys.stderr); sys.exit(7)"
    monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", said))
    groups = {}
    for nbits in ("2,3", "3,2", "3,4"):
        results = qbench("-m", *TINY, "quantizer=rtn", f"quantizer.nbits={nbits}").summary["results"]
        (group,) = {result["error"].rpartition("last lines: ")[2] for result in results}
        assert group == sweep_name([result["run_id"] for result in results])
        groups[nbits] = group
    assert groups["2,3"] == groups["3,2"] != groups["3,4"]


@pytest.mark.slow
def test_recorded_points_are_tracked_in_the_group_of_the_sweep_that_asks(qbench, monkeypatch):
    """As the single command would; points may name trackers and folders of their own."""
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    runs = wandb_stub.install(monkeypatch)
    for method in ("rtn", "nf4"):
        for place in ("a", "b"):
            assert qbench(*TINY, f"quantizer={method}", f"outputs={place}").status == 0
    first = qbench("-m", *TINY, "quantizer=rtn,nf4", "outputs=a,b", "tracker=wandb").summary
    assert (first["points"], first["skipped"]) == (4, 4)  # the same two measurements, each in both folders
    ids = [result["run_id"] for result in first["results"]]
    assert len(set(ids)) == 2
    assert [run.about["job_type"] for run in runs] == ["point", "point", "sweep"] * 2
    assert [run.about["dir"] for run in runs] == ["a"] * 3 + ["b"] * 3
    assert [run.about["id"] for run in runs if run.about["job_type"] == "point"] == ids[::2] + ids[1::2]
    assert {run.about["group"] for run in runs} == {sweep_name(ids)}
    runs.clear()
    qbench("-m", *TINY, "quantizer=rtn", "outputs=a", "tracker=wandb", "tracker.group=mine")
    assert [run.about["group"] for run in runs] == ["mine", "mine"]
    runs.clear()
    Path("mine/experiment").mkdir(parents=True)
    also = "[{quantizer: nf4, outputs: b, tracker: none}, {quantizer: rtn, outputs: a, tracker: wandb}]"
    Path("mine/experiment/two.yaml").write_text(f"# @package _global_\n{{hydra: {{sweeper: {{also: {also}}}}}}}\n")
    assert qbench("-m", "--config-dir", "mine", "experiment=two", *TINY).summary["skipped"] == 2
    assert [(run.about["job_type"], run.about["dir"]) for run in runs] == [("point", "a"), ("sweep", "a")]
    runs.clear()
    both = qbench("-m", *TINY, "quantizer=rtn", "outputs=a", "tracker=none,wandb", "--dry-run").summary
    assert [(p["point"], p["state"]) for p in both["plan"]] == [
        ("tracker=none", "recorded"), ("tracker=wandb", "recorded"),
    ]  # fmt: skip
    assert qbench("-m", *TINY, "quantizer=rtn", "outputs=a", "runtime.threads=1,2", "--dry-run").summary["points"] == 1


def test_an_earlier_result_with_nan_is_not_what_a_dead_process_wrote(tmp_path, monkeypatch):
    result, scores = examples.point()
    broken = replace(result, evaluation=[replace(result.evaluation[0], ppl=math.nan)])
    examples.save(tmp_path, (broken, scores))
    config = result.config | {"outputs": str(tmp_path)}
    point = child.Point(1, 1, "x", (), result.run_id, result.identity, config, config, "cpu", "float32")
    monkeypatch.setattr(child, "COMMAND", ("false",))
    (outcome,) = child.run(child.Pass("1", (point,), str(tmp_path), "s"))
    assert outcome.result.status == "failed"


def test_a_pass_ends_with_its_process_whatever_that_has_started(tmp_path, monkeypatch):
    """What a process leaves behind (a tracker's service) may hold its stdout open for as long as it likes."""
    result, _ = examples.point()
    config = result.config | {"outputs": str(tmp_path)}
    point = child.Point(1, 1, "x", (), result.run_id, result.identity, config, config, "cpu", "float32")
    leaves = "import subprocess; print('not ours'); print(1); subprocess.Popen(['sleep', '60']); raise SystemExit(5)"
    monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", leaves))
    started = time.perf_counter()
    (outcome,) = child.run(child.Pass("1", (point,), str(tmp_path), "s"))
    assert "exit status 5" in outcome.result.error
    assert time.perf_counter() - started < 30


def test_what_is_said_of_a_result():
    assert child.in_words(examples.point(windows=examples.nll(0.2, 1))[0]).startswith("ok, perplexity 3")
    assert child.in_words(examples.tasked("rtn", np.ones(4))[0]) == "ok, acc 1.0000 (+0.2500), f1 0.5000"
    assert child.in_words(examples.failed([], "why")[0]) == "FAILED: why"


def test_invalid_points_are_refused_all_at_once_before_the_first_starts(qbench, monkeypatch):
    monkeypatch.setattr(child, "COMMAND", ("false",))
    outcome = qbench("-m", *TINY, "quantizer=rtn,nf4", "quantizer.nbits=3,5")
    assert outcome.status == 2
    assert outcome.summary["status"] == "refused"
    assert [line for line in outcome.stderr.splitlines() if line.startswith("qbench: ")] == [
        "qbench: 3 of 4 points cannot run, so none was started:"
    ]
    assert "  quantizer=rtn quantizer.nbits=5: quantizer=rtn: nbits must be one of 2, 3, 4, 8" in outcome.stderr
    for nbits in (3, 5):
        assert f"  quantizer=nf4 quantizer.nbits={nbits}: unknown key 'quantizer.nbits'" in outcome.stderr
    assert "choose from: quantizer.aux_dtype, quantizer.group_size" in outcome.stderr
    assert not Path("outputs").exists()


def test_texts_that_are_too_short_are_refused_before_the_first_point_starts(qbench, monkeypatch):
    monkeypatch.setattr(child, "COMMAND", ("false",))
    windows = ("task.window=512,88888", "calibration.window=512,99999")
    outcome = qbench("-m", "model=tiny-dense", "quantizer=rtn,gptq", *windows)
    assert outcome.status == 2
    assert "qbench: 5 of 8 points cannot run, so none was started:" in outcome.stderr
    evaluated = r"the text qbench.texts/mini.txt has at most \d+ tokens, less than one window of 88888"
    assert len(re.findall(evaluated, outcome.stderr)) == 4
    shown = r"the calibration text \S+ has at most \d+ tokens, less than one sequence of 99999"
    assert len(re.findall(shown, outcome.stderr)) == 1  # RTN needs none
    assert not Path("outputs/sweeps").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["quantizer=rtn,sink"], "unknown quantizer 'sink'; did you mean 'sinq'?"),
        (["quantizer=rtn,gptq", "calibration=file"], "calibration=file names no text: set calibration.path=FILE"),
        (["quantizer.group_size=0,-2"], "group_size must be a positive number"),
        (["quantizer.nbits=3,4", "export.dir=same"], "export.dir=same would hold the checkpoint of another point"),
        (["experiment=demo,demo"], "one experiment at a time"),
        (["experiment=dmeo"], "unknown experiment 'dmeo'; did you mean 'demo'?"),
        (["runtime.devise=cpu"], "did you mean 'runtime.device'?"),
        (["quantizer.nbits=3,"], "an override has the form KEY=VALUE"),
        (["quantizer=glob(*q)", "task.foo=1"], "unknown key 'task.foo'"),
        (["quantizer=glob(zzz*)"], "chooses no point: a glob(...) that matches none"),
        (["quantizer=rtn,3"], "unknown quantizer '3'"),
        (["quantizer=rtn,nf4", "+task.chat=1"], "unknown key for task.protocol=windows: 'task.chat'"),
        (["quantizer.nbits=range(2,3,0)"], "is no range"),
        (["quantizer.nbits=interval(2,4)"], "names no values"),
        (["hydra.sweeper.also=1"], "hydra.sweeper.params must be a mapping"),
    ],
)
def test_wrong_sweeps(qbench, arguments, sentence):
    outcome = qbench("-m", *TINY, *arguments)
    assert outcome.status == 2
    assert sentence in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert sum(line.startswith("qbench: ") for line in outcome.stderr.splitlines()) == 1


def test_dry_run_shows_the_plan_and_runs_nothing(qbench, monkeypatch):
    monkeypatch.setattr(child, "COMMAND", ("false",))
    outcome = qbench("-m", *TINY, "quantizer=rtn,sinq", "--dry-run")
    assert outcome.status == 0
    assert (outcome.summary["points"], outcome.summary["to_run"]) == (2, 2)
    rtn, sinq = outcome.summary["plan"]
    assert rtn["estimated_bits_per_weight"] == 4.5
    assert sinq["estimated_bits_per_weight"] == 4.6875
    assert not Path("outputs").exists()


def test_dry_run_survives_a_quantizer_that_refuses_its_random_matrices(qbench, monkeypatch):
    from qbench.plugins.rtn import RTN

    accept = RTN.quantize_basis

    def refuse(self, weights, stats):
        if weights[0].shape == (128, 128):
            raise ArithmeticError("only 64 rows\nat a time")
        return accept(self, weights, stats)

    monkeypatch.setattr(RTN, "quantize_basis", refuse)
    outcome = qbench("-m", *TINY, "quantizer=rtn,sinq", "quantizer.nbits=3,4", "--dry-run")
    assert outcome.status == 0
    sentence = (
        "quantizer=rtn: its size is not known, since RTN fails on a random matrix [128, 128] with ArithmeticError: "
        "only 64 rows at a time"
    )
    assert outcome.stderr.splitlines().count(sentence) == 1  # for both points
    assert "Traceback" not in outcome.stderr
    assert [point["estimated_bits_per_weight"] for point in outcome.summary["plan"]] == [None, None, 3.6875, 4.6875]
    assert outcome.stderr.count(" to run ") == 4  # every point has its row


@pytest.mark.slow
def test_settings_of_a_swept_group_reach_the_points_alone(qbench):
    outcome = qbench("-m", *TINY, "quantizer=awq,gptq", "quantizer.ratios=10", "--dry-run")
    assert outcome.status == 2  # of GPTQ, which has none, and not of the default quantizer
    assert "1 of 2 points cannot run" in outcome.stderr
    assert "  quantizer=gptq: unknown key 'quantizer.ratios'" in outcome.stderr
    for chosen in ("glob(a*)", "choice(awq,asinq)", "choice(awq)", "sort(awq,asinq)", "tag(x,choice(awq,asinq))"):
        assert qbench("-m", *TINY, f"quantizer={chosen}", "quantizer.ratios=5", "--dry-run").status == 0
    named = "export.dir='x y/${quantizer.name}-${quantizer.nbits}'"
    assert qbench("-m", *TINY, "quantizer=rtn,awq", "quantizer.nbits=3,4", named, "--dry-run").status == 0


def test_estimated_bytes_are_those_that_are_stored(tiny):
    from collections import Counter
    from copy import deepcopy

    from qbench.model.linears import find_linears, quantized_weights
    from qbench.passes.quantize import quantize_model
    from qbench.registry import make_quantizer
    from qbench.request.estimate import model_bytes

    for settings in (
        {"name": "rtn", "nbits": 3},
        {"name": "sinq", "group_size": 32},
        {"name": "nf4", "group_size": -1},
    ):
        model, quantizer = deepcopy(tiny[0]), make_quantizer(settings)
        parameters = sum(p.numel() for p in model.parameters())
        shapes = Counter(tuple(layer.weight.shape) for layer in find_linears(model).layers.values())
        estimated_bits, estimated_bytes = model_bytes(quantizer, parameters, shapes)
        quantize_model(model, quantizer, None)
        stored = sum(weight.nbytes for weight in quantized_weights(model))
        rest = sum(p.numel() for p in model.parameters())
        assert estimated_bytes == stored + 2 * rest
        assert estimated_bits == pytest.approx(8 * stored / (parameters - rest))


def test_the_demo_leaves_out_what_does_not_exist():
    from hydra import compose, initialize_config_module

    from qbench.config import register

    register()
    with initialize_config_module("qbench.conf", version_base="1.3"):
        config = compose("config", overrides=["experiment=demo"], return_hydra_config=True)
    points = {" ".join(p) for p in expand(["experiment=demo", "model=tiny-dense"], config.hydra, None)}
    assert len(points) == 15
    assert "quantizer=nf4 experiment=demo model=tiny-dense" in points
    assert "quantizer=asinq quantizer.nbits=3 experiment=demo model=tiny-dense" in points


HOLDER = """
import sys, time
from pathlib import Path
from qbench.record.lock import locked
with locked(Path(sys.argv[1]), "work"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_holder(tmp_path, caplog):
    path = tmp_path / "locks" / "x.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout.readline() == b"held\n"
    threading.Timer(0.5, holder.kill).start()
    caplog.set_level("INFO")
    with locked(path, "work"):
        assert holder.wait() == -signal.SIGKILL
        assert "work: another process is at it, waiting" in caplog.text
        assert path.exists()
    holder.stdout.close()
    assert not path.exists()


def test_without_locks_the_work_is_done_anyway(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with locked(tmp_path / "file" / "x.lock", "work"):
        pass
    assert "concurrent points may do this twice" in caplog.text


def test_only_old_partial_files_are_removed(tmp_path):
    old, young = tmp_path / f"{PARTIAL}old", tmp_path / f"{PARTIAL}young"
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    remove_stale(tmp_path, PARTIAL)
    assert [p.name for p in tmp_path.iterdir()] == [young.name]


@pytest.mark.parametrize(
    ("status", "said", "sentence"),
    [
        (-11, "", "the process was killed by SIGSEGV (signal 11)"),
        (137, "a\n\nb\n", "was killed by SIGKILL (signal 9; often a sign that memory ran out); last lines: a | b"),
        (1, f"{Path.home()}/x", "the process ended with exit status 1 and no result; last lines: ~/x"),
        (2, "qbench: not so\nlater", "not so"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_dead_process(status, said, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert explain_exit(status, said).endswith(sentence)


def run(*arguments: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "qbench", *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_concurrent_sweeps_share_points_and_baseline(tmp_path):
    sweep = ("-m", *TINY, "quantizer=rtn,sinq", "quantizer.nbits=3,4")
    both = [run(*sweep, folder=tmp_path) for _ in range(2)]
    for process in both:
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr
        assert json.loads(stdout.splitlines()[-1])["ok"] == 4
    results = [Result.from_json(p.read_bytes()) for p in tmp_path.glob("outputs/results/*/result.json")]
    assert len(results) == 4
    assert len({r.pass_id for r in results}) == 1  # one sweep measured all, the other waited
    logs = "".join(p.read_text() for p in set(tmp_path.glob("outputs/sweeps/*/*.log")))
    assert logs.count(", recorded in outputs/results/") == 8
    assert logs.count("already recorded;") == 4
    assert not list(tmp_path.glob("outputs/locks/*"))


def _read(path: Path) -> Result:
    return Result.from_json(path.read_bytes())


def test_a_point_is_locked_while_it_is_measured(tmp_path):
    store = Store(tmp_path)
    with store.lock("point-x", "point x"):
        assert [p.name for p in (tmp_path / "locks").iterdir()] == ["point-x.lock"]
    assert not list((tmp_path / "locks").iterdir())
