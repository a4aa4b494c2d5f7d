"""What CI runs: the workflow, the experiment that it measures and the gate file that it compares with fit together."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

from qbench.registry import quantizer_names
from qbench.regress import main
from qbench.report.gate.file import GateFile

ROOT = Path(__file__).resolve().parents[2]
GATE_FILE = ROOT / ".github" / "quality-gate.json"


def listed() -> list[dict[str, str]]:
    """The points of conf/experiment/gate.yaml."""
    sweeper = yaml.safe_load((ROOT / "conf" / "experiment" / "gate.yaml").read_text())["hydra"]["sweeper"]
    products = [sweeper["params"], *sweeper["also"]]
    return [
        dict(zip(product, values, strict=True))
        for product in products
        for values in itertools.product(*(str(v).split(",") for v in product.values()))
    ]


def test_the_gate_file_holds_what_the_experiment_measures():
    measured = {(point["model"], point["quantizer"]) for point in listed()}
    assert {quantizer for model, quantizer in measured if model == "tiny-dense"} == {
        name
        for name in quantizer_names()
        if "/" not in name and name not in ("none", "noise", "file", "partly", "mixed")
    }
    points = GateFile.read(GATE_FILE).points
    assert {(p.settings["model.name"], p.settings["quantizer.name"]) for p in points} == measured
    assert len(points) == len(listed())
    for point in points:
        assert point.layers
        assert all(len(score.windows) > 1 for score in point.scores)
        assert not [key for key in point.settings if key.endswith(".path")]


def targets(workflow: dict) -> set[str]:
    """The Makefile's targets that a workflow calls, those of a matrix spelled out."""
    found = set()
    for job in workflow["jobs"].values():
        suites = job.get("strategy", {}).get("matrix", {}).get("suite", [])
        for step in job["steps"]:
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])
            if called := re.fullmatch(r"make (.+)", step.get("run", "")):
                found |= set(suites) if called[1] == "${{ matrix.suite }}" else {called[1]}
    return found


def test_the_workflows_call_every_check_of_the_makefile_and_no_other():
    makefile = (ROOT / "Makefile").read_text()
    called = {p.stem: targets(yaml.safe_load(p.read_text())) for p in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert called == {"quality": {"gate"}, "tests": {"test", "test-wheel", "test-slow", "test-oracle"}}
    for target in set().union(*called.values()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert f"GATE_FILE = {GATE_FILE.relative_to(ROOT)}" in makefile


def test_tests_run_on_every_push_and_the_long_ones_every_night():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert {"push", "pull_request", "schedule"} <= set(workflow[True])  # YAML 1.1 reads the key `on` as true
    assert workflow["jobs"]["fast"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert "schedule" in workflow["jobs"]["nightly"]["if"]


@pytest.mark.slow
def test_this_machine_measures_the_committed_gate_file_again(qbench):
    for point in listed():
        if point["model"] == "tiny-dense":
            assert qbench(*(f"{key}={value}" for key, value in point.items())).status == 0
    assert main([str(GATE_FILE), "outputs", "--where", "model=tiny-dense"]) == 0
