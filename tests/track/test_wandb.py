"""W&B: what its runs are told (to a stand-in for the module), and once what the real one keeps offline."""

import builtins
import socket
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save

from qbench.errors import RequestError
from qbench.record.store import write_atomically
from qbench.registry import TRACKER, make
from qbench.track.pareto import front, plots
from qbench.track.tracker import harmless, sweep_name
from qbench.track.wandb import WandB
from tests.record.test_result import example
from tests.report import examples
from tests.track import wandb_stub

OFFLINE = WandB(project="p", mode="offline")
AUTO = replace(OFFLINE, mode="auto")
NAME = sweep_name(["broken", "point2", "point1", "point0"])


@pytest.fixture
def runs(monkeypatch):
    return wandb_stub.install(monkeypatch)


def test_a_run_holds_config_summary_and_layers(tmp_path, caplog, runs):
    nll = {"quantized": np.array([2.0, 2.5, 2.5, 4.0]), "baseline": np.array([2.0, 2.1, 2.2, 2.3])}
    (tmp_path / "results" / example().run_id).mkdir(parents=True)
    write_atomically(tmp_path / "results" / example().run_id / "w.safetensors", save(nll))
    OFFLINE.point(example(), tmp_path, None)
    assert "failed" not in caplog.text
    (run,) = runs
    assert (run.about["id"], run.about["job_type"], run.about["mode"]) == (example().run_id, "point", "offline")
    assert run.about["config"]["quantizer"]["nbits"] == 4
    assert (run.summary["ppl"], run.summary["bits_per_weight"], run.exit_code) == (9.0, 4.5, 0)
    columns = ("model_name", "quantizer_name", "nbits", "group_size", "protocol")
    assert [run.about["config"][key] for key in columns] == ["tiny", "sinq", 4, 64, "mini:gptq-w512"]
    assert set(run.about["tags"]) == {"ok", "tiny", "sinq", "mini:gptq-w512"}
    (layer,) = run.logged["layers"].rows
    assert layer["name"] == "model.layers.0.q"
    assert layer["stored_bytes.input_scale"] == 32
    assert run.logged["window_nll"] == [2.0, 2.5, 2.5, 4.0]
    assert run.logged["baseline_window_nll"] == [2.0, 2.1, 2.2, 2.3]


@pytest.mark.slow
def test_the_real_one_keeps_a_point_and_a_sweep_offline(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "the-host-of-this-machine")
    pytest.importorskip("wandb", reason="pip install 'qbench-llm[wandb]'")
    pytest.importorskip("matplotlib", reason="pip install 'qbench-llm[wandb]'")
    OFFLINE.point(example(), tmp_path, None)
    OFFLINE.sweep(sweep(), tmp_path, NAME)
    assert "failed" not in caplog.text
    kept = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    names = {path.parent.name.partition("_")[2].partition("-")[2] for path in kept}
    assert names == {example().run_id, NAME}
    for path in kept:
        assert b"the-host-of-this-machine" not in path.read_bytes()


@pytest.mark.parametrize(
    ("environment", "key", "modes"),
    [(None, False, ["offline"]), (None, True, ["online"]), ("disabled", True, []), ("offline", True, ["offline"]),
     ("online", False, ["online"])],
)  # fmt: skip
def test_auto_is_what_the_environment_says(tmp_path, monkeypatch, environment, key, modes):
    runs = wandb_stub.install(monkeypatch, key)
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("prompted"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    AUTO.point(example(), tmp_path, None)
    assert [run.about["mode"] for run in runs] == modes
    OFFLINE.point(example(), tmp_path, None)  # what is asked for comes before the environment
    assert runs[-1].about["mode"] == "offline"


def test_a_point_that_is_measured_again_replaces_its_run(tmp_path, runs):
    OFFLINE.point(example(), tmp_path, None)
    OFFLINE.point(example(run_id="fedcba9876543210"), tmp_path, None)
    OFFLINE.point(example(), tmp_path, None)
    names = sorted(path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*"))
    assert names == ["0123456789abcdef", "fedcba9876543210"]


def sweep():
    """Three points of one model, and one that failed."""
    points = []
    for number, (nbits, bits, ppl) in enumerate([(2, 2.5, 30.0), (3, 3.5, 12.0), (4, 4.5, 13.0)]):
        point = example(run_id=f"point{number}")
        config = point.config | {"quantizer": {"name": "sinq", "nbits": nbits, "group_size": 64}}
        evaluation = [replace(point.evaluation[0], ppl=ppl)]
        quantization = replace(point.quantization, bits_per_weight=bits)
        points.append(replace(point, config=config, evaluation=evaluation, quantization=quantization))
    return [*points, example(run_id="broken", status="failed", error="why", evaluation=[], quantization=None)]


def test_sweep_summary_holds_the_leaderboard_and_the_plot(tmp_path, caplog, monkeypatch, runs):
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    OFFLINE.sweep(sweep(), tmp_path, NAME)
    assert "failed" not in caplog.text
    (run,) = runs
    assert run.about["id"] == run.about["group"] == NAME
    assert run.about["job_type"] == "sweep"
    assert run.summary == {"points": 4, "ok": 3, "failed": 1}
    assert run.exit_code == 1
    rows = run.logged["leaderboard"].rows
    assert [row["ppl"] for row in rows] == [12.0, 13.0, 30.0, None]
    assert rows[3]["error"] == "why"
    (key,) = (key for key in run.logged if key.startswith("pareto"))
    assert run.logged[key].image.format == "PNG"


@pytest.mark.parametrize(
    ("own", "environment", "sweep", "group"),
    [(None, None, None, None), (None, None, "s", "s"), (None, "env", "s", "env"), ("mine", "env", "s", "mine")],
)
def test_the_group_of_a_run(tmp_path, monkeypatch, runs, own, environment, sweep, group):
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    if environment is not None:
        monkeypatch.setenv("WANDB_RUN_GROUP", environment)
    replace(OFFLINE, group=own).point(example(), tmp_path, sweep)
    assert runs[0].about["group"] == group


def test_the_same_sweep_again_is_the_same_run(tmp_path, runs):
    OFFLINE.sweep(sweep(), tmp_path, NAME)
    OFFLINE.sweep(sweep()[::-1], tmp_path, NAME)
    assert runs[0].about["id"] == runs[1].about["id"]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


@pytest.mark.slow
def test_front_and_plots():
    assert front([(4.5, 13.0), (2.5, 30.0), (3.5, 12.0), (3.5, 14.0)]) == [(2.5, 30.0), (3.5, 12.0)]
    pytest.importorskip("matplotlib")
    name = "tiny, mini:gptq-w512, perplexity"
    drawn = plots(sweep())
    assert list(drawn) == [name]
    image = np.asarray(drawn[name].convert("RGB"))
    blue = (np.abs(image.astype(int) - [0x1F, 0x77, 0xB4]).sum(-1) < 30).sum()
    assert blue > 100  # the points
    finite = sweep()[:3]
    assert plots([replace(r, evaluation=[replace(r.evaluation[0], ppl=float("nan"))]) for r in finite]) == {}
    others = [replace(r, identity=replace(r.identity, weights="random:2")) for r in finite]  # of the same name
    assert list(plots(finite + others)) == [f"{name} (1)", f"{name} (2)"]
    others = [replace(r, evaluation=[replace(r.evaluation[0], text_sha256="cd" * 32)]) for r in finite]
    assert list(plots(finite + others)) == [f"{name} (text=ab)", f"{name} (text=cdcdcdcd)"]


def test_a_task_has_its_plots_and_its_order_as_a_perplexity_has(tmp_path, runs):
    pytest.importorskip("matplotlib")
    results = [examples.tasked("rtn", np.ones(4), nbits=nbits)[0] for nbits in (3, 4)]
    task = results[0].tasks[0]
    low = replace(task, metrics=[replace(task.metrics[0], value=0.5), *task.metrics[1:]])
    OFFLINE.sweep([replace(results[0], tasks=[low]), results[1]], tmp_path, NAME)
    (run,) = runs
    assert [row["run_id"] for row in run.logged["leaderboard"].rows] == [results[1].run_id, results[0].run_id]
    model = results[0].config["model"]["name"]
    titles = {key for key in run.logged if key.startswith("pareto")}
    assert titles == {f"pareto/{model}, {task.protocol}, {metric.called}" for metric in task.metrics}


def test_a_failing_tracker_warns_and_returns(tmp_path, monkeypatch, caplog, runs):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no route")))
    with harmless(OFFLINE):
        OFFLINE.point(example(), tmp_path, None)
    with harmless(OFFLINE):
        OFFLINE.sweep(sweep(), tmp_path, NAME)
    assert caplog.text.count("the result is saved, but the tracker WandB failed: no route") == 2


def test_refusals(monkeypatch):
    with pytest.raises(RequestError, match="tracker=wandb: mode must be one of auto, online, offline, disabled"):
        make(TRACKER, {"name": "wandb", "mode": "sometimes"})
    monkeypatch.setattr("qbench.track.wandb.importlib.util.find_spec", lambda _: None)
    with pytest.raises(RequestError, match="pip install"):
        OFFLINE.check()
