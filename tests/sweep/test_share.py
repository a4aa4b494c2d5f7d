"""What points that run at the same time may use of a host."""

import os
import subprocess
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from qbench.sweep import share
from qbench.sweep.share import Gpu, Share, cores, gpu_of, gpus, host_shares, one_of


def test_cores_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(share, "cores", lambda: 16)
    shares, slots = host_shares([], 3, tmp_path)
    assert [s.environment for s in shares] == [{"OMP_NUM_THREADS": "5"}] * 3
    assert slots == ()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert host_shares([], 3, tmp_path)[0][0].environment == {}


def test_fewer_points_than_gpus_are_a_limit(tmp_path, monkeypatch):
    """Two at a time, on whichever of the eight GPUs are free, with half of the cores each."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(share, "cores", lambda: 16)
    monkeypatch.setattr(share, "_common", lambda: tmp_path)
    eight = [Gpu(str(i), f"uuid-{i}") for i in range(8)]
    shares, slots = host_shares(eight, 2, tmp_path)
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in shares] == [str(i) for i in range(8)]
    assert {s.environment["OMP_NUM_THREADS"] for s in shares} == {"8"}
    assert len(slots) == 2
    with one_of(slots, shares) as (descriptors, first), one_of(slots, shares) as (_, second):
        assert len(descriptors) == 2
        assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("0", "1")
        third = threading.Thread(target=lambda: one_of(slots, shares).__enter__(), daemon=True)
        third.start()
        third.join(0.5)
        assert third.is_alive()  # six GPUs are free, but two points run
    shares, slots = host_shares(eight, 99, tmp_path)
    assert (len(shares), slots) == (8, ())


def test_a_gpu_has_one_lock_whatever_it_is_called(monkeypatch, tmp_path):
    answer = SimpleNamespace(returncode=0, stdout="5c-a 5c-b\n", stderr="")
    monkeypatch.setattr(share.subprocess, "run", lambda *_, **__: answer)
    locks = []
    for visible in (None, "0,1", "GPU-5c-a,GPU-5c-b"):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        shares, _ = host_shares(gpus(), 2, tmp_path)
        locks.append([s.lock for s in shares])
        assert ",".join(s.environment["CUDA_VISIBLE_DEVICES"] for s in shares) == (visible or "0,1")
    assert locks[0] == locks[1] == locks[2]
    assert share._gpu_lock("GPU-5c-a") == locks[0][0]


@dataclass
class Device:
    type: str
    index: int | None = None


def test_a_single_point_holds_its_gpu_unless_it_was_given_it(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(share, "_common", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"5c-{index}"))
    monkeypatch.delenv(share.HELD, raising=False)
    caplog.set_level("INFO")
    order = []

    def other():
        with gpu_of(Device("cuda", 0)):
            order.append("other")

    with gpu_of(Device("cpu")):
        assert not list(tmp_path.iterdir())
    with gpu_of(Device("cuda")):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.5)
        order.append("first")
        with gpu_of(Device("cuda", 1)):  # another card is free
            pass
        monkeypatch.setenv(share.HELD, "5c-0")
        with gpu_of(Device("cuda")):  # the sweep that started this process holds it for it
            pass
    thread.join()
    assert order == ["first", "other"]
    assert "GPU 5c-0: another process of qbench uses it, waiting" in caplog.text


def test_a_share_is_taken_by_one_and_outlives_its_taker_as_long_as_the_process(tmp_path):
    shares = (Share(str(tmp_path / "a"), {"X": "a"}), Share(str(tmp_path / "b"), {"X": "b"}))
    seen = []

    def take():
        with one_of(shares) as (_, environment):
            seen.append(environment["X"])
            time.sleep(0.3)

    with one_of(shares) as (descriptors, environment):
        assert environment == {"X": "a"}
        process = subprocess.Popen(["sleep", "30"], pass_fds=descriptors)
    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["b", "b"]  # one after the other: the process still has a
    process.kill()
    process.wait()
    with one_of(shares) as (_, environment):
        assert environment == {"X": "a"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000\n"}, 16),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_cores_by_affinity_and_quota(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(share, "CGROUPS", tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert cores() == expected
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert cores() == expected
