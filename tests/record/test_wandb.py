"""W&B offline: what a run file holds, read back through wandb's own record types."""

import builtins
import json
import struct
import time

import pytest

from qbench.config import TrackerConfig
from qbench.errors import RequestError
from qbench.record.wandb_tracker import check, track
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
    """{run, config, summary, history} of the only offline run below `folder`."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = {"config": {}, "summary": {}, "history": []}
    for record in records(path):
        if record.HasField("run"):
            found["run"] = record.run
            found["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        for update in record.summary.update:
            found["summary"][update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
        if record.HasField("history"):
            found["history"].append({item.key or "/".join(item.nested_key) for item in record.history.item})
    return found


def read_back_when_written(folder, seconds=20):
    """wandb's writer is a process of its own, and on a loaded machine it may still be writing after finish()."""
    for _ in range(seconds * 4):
        if "ppl" in (found := read_back(folder))["summary"] and "run" in found:
            break
        time.sleep(0.25)
    return found


def test_offline_run_holds_config_summary_and_layers(tmp_path, caplog):
    track(example(), OFFLINE, tmp_path)
    assert "failed" not in caplog.text
    found = read_back_when_written(tmp_path)
    assert found["run"].run_id == example().run_id
    assert found["run"].job_type == "point"
    assert found["config"]["quantizer"]["nbits"] == 4
    assert found["summary"]["ppl"] == 9.0
    assert found["summary"]["bits_per_weight"] == 4.5
    assert any("layers" in key for keys in found["history"] for key in keys)


def test_a_failing_tracker_warns_and_returns(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no route")))
    track(example(), OFFLINE, tmp_path)
    assert "the result is saved, but Weights & Biases failed: no route" in caplog.text


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
