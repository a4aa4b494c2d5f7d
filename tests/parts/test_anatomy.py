"""An anatomy end to end on the tiny models: planned, measured in one pass, shown, and what mixed makes of it."""

from __future__ import annotations

import json

import pytest

from qbench.leaderboard import main
from qbench.parts.mixed import Mixed
from qbench.record.parts import part_of
from qbench.record.store import Store
from tests.conftest import refused

FEW = ("task.max_windows=2", "task.window=128")
SWEEP = ("-m", "experiment=anatomy", "model=tiny-dense", *FEW)


def results(tmp_path):
    store = Store(tmp_path / "outputs")
    found = [store.load(path.name) for path in store.results.iterdir()]
    return {(r.identity.quantizer["name"], r.identity.quantizer.get("only"), r.identity.quantizer["nbits"]): r
            for r in found if r.identity.quantizer["name"] != "mixed"}  # fmt: skip


def kl(result):
    return result.evaluation[0].divergence.kl.value


@pytest.mark.slow
def test_a_mixture_is_planned_by_kind_and_block(qbench):
    outcome = qbench("-m", "experiment=anatomy", "model=tiny-moe", *FEW, "quantizer.only=kinds,linears", "--dry-run")
    assert outcome.status == 0, outcome.stderr
    only = [row["point"].partition("'")[2].rstrip("'") for row in outcome.summary["plan"]]
    assert "*.mlp.experts.*.gate_proj" in only
    assert "model.layers.1.mlp.experts.*.down_proj" in only
    assert {part_of(pattern).level for pattern in only} == {"kind", "linear"}


def test_mixed_asks_for_an_anatomy_that_is_not_recorded(qbench):
    sentence = refused(qbench("quantizer=mixed", "model=tiny-dense", *FEW))
    assert "python -m qbench -m experiment=anatomy quantizer.method=rtn quantizer.nbits=2,3,4" in sentence


def test_a_pattern_that_names_nothing_fails_with_the_kinds(qbench):
    outcome = qbench("quantizer=partly", "model=tiny-dense", "quantizer.only='*.foo'", *FEW)
    assert outcome.status == 1
    assert "*.mlp.down_proj" in outcome.summary["error"]


@pytest.mark.slow
def test_an_anatomy_and_what_mixed_makes_of_it(qbench, tmp_path, capsys):
    sweep = qbench(*SWEEP, "quantizer.nbits=2,4")
    assert sweep.status == 0, sweep.stderr
    assert sweep.summary["ok"] == 20
    plain = qbench("quantizer=rtn", "quantizer.nbits=4", "model=tiny-dense", *FEW)
    found = results(tmp_path)
    # all linears together are the method itself, to the bit, and a part in a pass is the part alone
    assert kl(found["partly", "*", 4]) == kl(found["rtn", None, 4])
    part = found["partly", "model.layers.1.*", 4]
    assert part.quantization.coverage == pytest.approx(0.5)
    assert {row.name.split(".")[2] for row in part.quantization.layers} == {"1"}
    assert part.quantization.model_bytes > plain.summary["model_bytes"]
    alone = qbench(
        "quantizer=partly", "quantizer.only='model.layers.1.*'", "model=tiny-dense", *FEW, "runtime.rerun=true"
    )
    assert alone.summary["kl"] == kl(part)

    mixed = qbench("quantizer=mixed", "quantizer.budget_bits=3.5", "model=tiny-dense", *FEW)
    assert mixed.status == 0, mixed.stderr
    point = Store(tmp_path / "outputs").load(mixed.summary["run_id"])
    assert 3.3 < point.quantization.bits_per_weight <= 3.5
    assert {row.bits_per_weight for row in point.quantization.layers} == {2.5, 4.5}
    # the assignment is the content: said itself, it is the same point, without an anatomy
    again = qbench("quantizer=mixed", f"quantizer.assignment='{point.identity.quantizer['assignment']}'",
                   "model=tiny-dense", *FEW)  # fmt: skip
    assert again.summary["run_id"] == point.run_id
    assert Mixed(assignment=point.identity.quantizer["assignment"]).bits
    low = qbench("quantizer=mixed", "quantizer.budget_bits=2.2", "model=tiny-dense", *FEW)
    assert "less than the 2.5 bits per weight" in refused(low)

    capsys.readouterr()
    assert main([str(tmp_path / "outputs"), "--format", "json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    levels = [[row.get("level") for row in table["rows"]] for table in tables]
    assert levels.count(["whole"] + ["kind"] * 7 + ["block"] * 2) == 2
    assert main([str(tmp_path / "outputs"), "-o", str(tmp_path / "page.html")]) == 0
    assert 'data-anatomy="1"' in (tmp_path / "page.html").read_text()
