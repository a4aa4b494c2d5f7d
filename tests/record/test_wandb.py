"""W&B offline: what a run file holds, read back through wandb's own record types."""

import builtins
import json
import struct
import time
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save

from qbench.config import TrackerConfig
from qbench.errors import RequestError
from qbench.record.pareto import front, plots
from qbench.record.store import write_atomically
from qbench.record.wandb_tracker import check, sweep_name, track, track_sweep
from tests.record.test_result import example

wandb = pytest.importorskip("wandb", reason="pip install 'qbench-llm[wandb]'")
wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")

OFFLINE = TrackerConfig(name="wandb", project="p", mode="offline")


def records(path):
    """The messages of a `.wandb` file: wandb's own protobuf records in LevelDB's log framing."""
    content, position, parts = path.read_bytes(), 7, []  # after the file's ident, magic and version
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # too little left in the block for a header: padding
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # full, or the last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def read_back(folder):
    """{run, config, summary, history, files} of the only offline run below `folder`."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = {"config": {}, "summary": {}, "history": {}, "files": path.parent / "files"}
    for record in records(path):
        if record.HasField("run"):
            found["run"] = record.run
            found["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        for update in record.summary.update:
            found["summary"][update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
        if record.HasField("history"):
            for item in record.history.item:
                place = found["history"]
                *path, last = item.nested_key or [item.key]
                for key in path:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
    return found


def read_back_when_written(folder, seconds=60, last="ppl"):
    """wandb's writer is a process of its own, and on a loaded machine it may still be writing after finish()."""
    for _ in range(seconds * 4):
        if last in (found := read_back(folder))["summary"] and "run" in found:
            break
        time.sleep(0.25)
    return found


def table(found, key):
    """A logged table as a list of rows by column."""
    content = json.loads((found["files"] / found["history"][key]["path"]).read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def test_offline_run_holds_config_summary_and_layers(tmp_path, caplog):
    nll = {"quantized": np.array([2.0, 2.5, 2.5, 4.0]), "baseline": np.array([2.0, 2.1, 2.2, 2.3])}
    (tmp_path / "results" / example().run_id).mkdir(parents=True)
    write_atomically(tmp_path / "results" / example().run_id / "w.safetensors", save(nll))
    track(example(), OFFLINE, tmp_path)
    assert "failed" not in caplog.text
    found = read_back_when_written(tmp_path)
    assert found["run"].run_id == example().run_id
    assert found["run"].job_type == "point"
    assert found["config"]["quantizer"]["nbits"] == 4
    assert found["summary"]["ppl"] == 9.0
    assert found["summary"]["bits_per_weight"] == 4.5
    columns = ("model_name", "quantizer_name", "nbits", "group_size", "protocol")
    assert [found["config"][key] for key in columns] == ["tiny", "sinq", 4, 64, "mini:gptq-w512"]
    assert set(found["run"].tags) == {"ok", "tiny", "sinq", "mini:gptq-w512"}
    (layer,) = table(found, "layers")
    assert layer["name"] == "model.layers.0.q"
    assert layer["stored_bytes.input_scale"] == 32
    histogram = found["history"]["window_nll"]
    assert histogram["_type"] == "histogram"
    assert sum(histogram["values"]) == 4
    assert (histogram["bins"][0], histogram["bins"][-1]) == (2.0, 4.0)
    assert found["history"]["baseline_window_nll"]["bins"][-1] == 2.3


def test_a_point_that_is_measured_again_replaces_its_run(tmp_path):
    track(example(), OFFLINE, tmp_path)
    (first,) = tmp_path.glob("wandb/offline-run-*")
    first.rename(first.with_name("offline-run-20260101_000000-0123456789abcdef"))
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


def test_sweep_summary_holds_the_leaderboard_and_the_plot(tmp_path, caplog, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    track_sweep(sweep(), OFFLINE, tmp_path)
    assert "failed" not in caplog.text
    found = read_back_when_written(tmp_path, last="points")
    assert found["run"].run_id == sweep_name(["broken", "point2", "point1", "point0"])
    assert (found["run"].job_type, found["run"].run_group) == ("sweep", found["run"].run_id)
    assert (found["summary"]["points"], found["summary"]["ok"], found["summary"]["failed"]) == (4, 3, 1)
    rows = table(found, "leaderboard")
    assert [row["ppl"] for row in rows] == [12.0, 13.0, 30.0, None]
    assert rows[3]["error"] == "why"
    (key,) = (key for key in found["history"] if key.startswith("pareto"))
    image = (found["files"] / found["history"][key]["path"]).read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000


def test_the_same_sweep_again_is_the_same_run(tmp_path):
    track_sweep(sweep(), OFFLINE, tmp_path)
    (first,) = tmp_path.glob("wandb/offline-run-*")
    first.rename(first.with_name(first.name.replace(first.name.split("-")[2], "20260101_000000")))
    track_sweep(sweep()[::-1], OFFLINE, tmp_path)
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


def test_a_failing_tracker_warns_and_returns(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no route")))
    track(example(), OFFLINE, tmp_path)
    track_sweep(sweep(), OFFLINE, tmp_path)
    assert caplog.text.count("the result is saved, but Weights & Biases failed: no route") == 2


def test_auto_is_offline_without_a_key_and_never_prompts(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("prompted"))
    track(example(), TrackerConfig(name="wandb", project="p", mode="auto"), tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_refusals(monkeypatch):
    with pytest.raises(RequestError, match=r"tracker\.mode must be one of"):
        check(TrackerConfig(name="wandb", mode="sometimes"))
    monkeypatch.setattr("qbench.record.wandb_tracker.importlib.util.find_spec", lambda _: None)
    with pytest.raises(RequestError, match="pip install"):
        check(OFFLINE)
