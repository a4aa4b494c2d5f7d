"""What a point that fails leaves behind: its reason, and never less than was there."""

import resource
from pathlib import Path

import pytest

from qbench.evaluate.protocols.windows import TextWindows
from qbench.passes.quantize import quantize_linears
from qbench.record.store import Store
from tests.test_cli import recorded
from tests.track import wandb_stub

TINY = ("model=tiny-dense", "quantizer=rtn", "task.max_windows=1")


def broken(*args, **kwargs):
    raise ValueError("the GPU is full")


@pytest.mark.slow
def test_a_failing_rerun_keeps_the_earlier_result_and_its_files(qbench, monkeypatch):
    tracked = []
    wandb_stub.install(monkeypatch)
    monkeypatch.setattr("qbench.track.wandb.WandB.point", lambda self, result, *_: tracked.append(result.status))
    assert qbench(*TINY, "tracker=wandb").status == 0
    [earlier] = recorded()
    files = {path: path.read_bytes() for path in Path("outputs/results").rglob("*") if path.is_file()}
    monkeypatch.setattr("qbench.passes.variant.quantize_linears", broken)
    outcome = qbench(*TINY, "runtime.rerun=true", "tracker=wandb")
    assert outcome.status == 1
    assert tracked == ["ok"]
    assert outcome.summary["error"] == "ValueError: the GPU is full"
    assert "the earlier result" in outcome.stderr
    assert "is kept" in outcome.stderr
    assert {path: path.read_bytes() for path in Path("outputs/results").rglob("*") if path.is_file()} == files
    assert Store("outputs").load(earlier.run_id) == earlier
    monkeypatch.setattr("qbench.passes.variant.quantize_linears", quantize_linears)
    assert qbench(*TINY, "runtime.rerun=true").status == 0


def test_what_fails_before_measuring_leaves_its_reason(qbench, monkeypatch):
    monkeypatch.setattr(TextWindows, "prepare", broken)
    outcome = qbench(*TINY)
    assert outcome.status == 1
    [result] = recorded()
    assert result.status == "failed"
    assert result.error == outcome.summary["error"] == "ValueError: the GPU is full"


def test_the_peak_while_quantizing_is_that_of_the_phase(qbench):
    """Not the maximum since the process began, which a child moreover takes over from a larger parent."""
    block = bytearray(600 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    del block
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert qbench(*TINY).status == 0
    [result] = recorded()
    assert 0 < result.quantization.peak_rss_bytes < most - (200 << 20)
