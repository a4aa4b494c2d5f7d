"""W&B: what its runs are told (to a stand-in for the module), and once what the real one keeps offline."""

import builtins
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save

from qbench.config import TrackerConfig
from qbench.errors import RequestError
from qbench.record.store import write_atomically
from qbench.track.pareto import front, plots
from qbench.track.wandb import check, sweep_name, track, track_sweep
from tests.record.test_result import example
from tests.track import wandb_stub

OFFLINE = TrackerConfig(name="wandb", project="p", mode="offline")
AUTO = replace(OFFLINE, mode="auto")


@pytest.fixture
def runs(monkeypatch):
    return wandb_stub.install(monkeypatch)


def test_a_run_holds_config_summary_and_layers(tmp_path, caplog, runs):
    nll = {"quantized": np.array([2.0, 2.5, 2.5, 4.0]), "baseline": np.array([2.0, 2.1, 2.2, 2.3])}
    (tmp_path / "results" / example().run_id).mkdir(parents=True)
    write_atomically(tmp_path / "results" / example().run_id / "w.safetensors", save(nll))
    track(example(), OFFLINE, tmp_path)
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
def test_the_real_one_keeps_a_point_and_a_sweep_offline(tmp_path, caplog):
    pytest.importorskip("wandb", reason="pip install 'qbench-llm[wandb]'")
    pytest.importorskip("matplotlib", reason="pip install 'qbench-llm[wandb]'")
    track(example(), OFFLINE, tmp_path)
    track_sweep(sweep(), OFFLINE, tmp_path)
    assert "failed" not in caplog.text
    names = {path.parent.name.partition("_")[2].partition("-")[2] for path in tmp_path.glob("wandb/*/*.wandb")}
    assert names == {example().run_id, sweep_name([point.run_id for point in sweep()])}


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
    track(example(), AUTO, tmp_path)
    assert [run.about["mode"] for run in runs] == modes
    track(example(), OFFLINE, tmp_path)  # what is asked for comes before the environment
    assert runs[-1].about["mode"] == "offline"


def test_a_point_that_is_measured_again_replaces_its_run(tmp_path, runs):
    track(example(), OFFLINE, tmp_path)
    track(example(run_id="fedcba9876543210"), OFFLINE, tmp_path)
    track(example(), OFFLINE, tmp_path)
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
    track_sweep(sweep(), OFFLINE, tmp_path)
    assert "failed" not in caplog.text
    (run,) = runs
    assert run.about["id"] == run.about["group"] == sweep_name(["broken", "point2", "point1", "point0"])
    assert run.about["job_type"] == "sweep"
    assert run.summary == {"points": 4, "ok": 3, "failed": 1}
    assert run.exit_code == 1
    rows = run.logged["leaderboard"].rows
    assert [row["ppl"] for row in rows] == [12.0, 13.0, 30.0, None]
    assert rows[3]["error"] == "why"
    (key,) = (key for key in run.logged if key.startswith("pareto"))
    assert run.logged[key].image.format == "PNG"


def test_the_same_sweep_again_is_the_same_run(tmp_path, runs):
    track_sweep(sweep(), OFFLINE, tmp_path)
    track_sweep(sweep()[::-1], OFFLINE, tmp_path)
    assert runs[0].about["id"] == runs[1].about["id"]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_front_and_plots():
    assert front([(4.5, 13.0), (2.5, 30.0), (3.5, 12.0), (3.5, 14.0)]) == [(2.5, 30.0), (3.5, 12.0)]
    pytest.importorskip("matplotlib")
    summaries = [result.summary() for result in sweep()]
    drawn = plots(summaries)
    assert list(drawn) == ["tiny, mini:gptq-w512"]
    image = np.asarray(drawn["tiny, mini:gptq-w512"].convert("RGB"))
    blue = (np.abs(image.astype(int) - [0x1F, 0x77, 0xB4]).sum(-1) < 30).sum()
    assert blue > 100  # the points
    assert plots([summary | {"ppl": float("nan")} for summary in summaries]) == {}
    others = [summary | {"fingerprint": "random:2"} for summary in summaries]  # of the same name
    assert list(plots(summaries + others)) == ["tiny, mini:gptq-w512 (1)", "tiny, mini:gptq-w512 (2)"]
    others = [summary | {"text_sha256": "cd" * 32} for summary in summaries]
    assert list(plots(summaries + others)) == ["tiny, mini:gptq-w512 (text=ab)", "tiny, mini:gptq-w512 (text=cdcdcdcd)"]


def test_a_failing_tracker_warns_and_returns(tmp_path, monkeypatch, caplog, runs):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no route")))
    track(example(), OFFLINE, tmp_path)
    track_sweep(sweep(), OFFLINE, tmp_path)
    assert caplog.text.count("the result is saved, but Weights & Biases failed: no route") == 2


def test_refusals(monkeypatch):
    with pytest.raises(RequestError, match=r"tracker\.mode must be one of"):
        check(TrackerConfig(name="wandb", mode="sometimes"))
    monkeypatch.setattr("qbench.track.wandb.importlib.util.find_spec", lambda _: None)
    with pytest.raises(RequestError, match="pip install"):
        check(OFFLINE)
