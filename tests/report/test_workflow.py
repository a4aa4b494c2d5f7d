"""What CI runs: the workflow, the experiment that it measures and the baseline that it compares with fit together."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

from qbench.registry import quantizer_names
from qbench.regress import main
from qbench.report.baseline import Baseline

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / ".github" / "quality-baseline.json"


def listed() -> list[dict[str, str]]:
    """The points of conf/experiment/gate.yaml."""
    sweeper = yaml.safe_load((ROOT / "conf" / "experiment" / "gate.yaml").read_text())["hydra"]["sweeper"]
    products = [sweeper["params"], *sweeper["also"]]
    return [
        dict(zip(product, values, strict=True))
        for product in products
        for values in itertools.product(*(str(v).split(",") for v in product.values()))
    ]


def test_the_baseline_holds_what_the_experiment_measures():
    measured = {(point["model"], point["quantizer"]) for point in listed()}
    assert {quantizer for model, quantizer in measured if model == "tiny-dense"} == {
        name for name in quantizer_names() if "/" not in name
    }
    points = Baseline.read(BASELINE).points
    assert {(p.settings["model.name"], p.settings["quantizer.name"]) for p in points} == measured
    assert len(points) == len(listed())
    for point in points:
        assert point.layers
        assert all(len(score.windows) > 1 for score in point.scores)
        assert not [key for key in point.settings if key.endswith(".path")]


def test_the_workflow_calls_targets_that_exist():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "quality.yml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    targets = [found[1] for step in steps if (found := re.fullmatch(r"make (\S+)", step.get("run", "")))]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert f"BASELINE = {BASELINE.relative_to(ROOT)}" in makefile
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)


@pytest.mark.slow
def test_this_machine_measures_the_committed_baseline_again(qbench):
    for point in listed():
        if point["model"] == "tiny-dense":
            assert qbench(*(f"{key}={value}" for key, value in point.items())).status == 0
    assert main([str(BASELINE), "outputs", "--where", "model=tiny-dense"]) == 0
