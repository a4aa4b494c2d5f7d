"""Every experiment that ships composes, and each of its points could start."""

from functools import cache

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser

from qbench.config import register
from qbench.evaluate import speed
from qbench.registry import PROTOCOL, make, make_quantizer
from qbench.request.options import options
from qbench.request.parts import spelled_out
from qbench.sweep.plan import combinations
from tests.conftest import ROOT, composed

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@cache
def points(experiment):
    """(models, configuration) of every point, as the sweep expands them; models share all the rest of a point.

    Composing takes a tenth of a second, so it is done for the first model, and the others are only looked up.
    """
    register()
    found = []
    with initialize_config_module("qbench.conf", version_base="1.3"):
        sweeper = compose("config", [f"experiment={experiment}"], return_hydra_config=True).hydra.sweeper
    for product in ([sweeper.params] if sweeper.params else []) + list(sweeper.also):
        product = dict(product)
        models = product.get("model", "").split(",")
        if models != [""]:
            product["model"] = models[0]
        parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in product.items()])
        for overrides in spelled_out(list(combinations(parsed)), lambda o: composed([f"experiment={experiment}", *o])):
            config = composed([f"experiment={experiment}", *overrides])
            found.append((models if models != [""] else [config.model["name"]], config))
    return found


@pytest.mark.parametrize(
    "experiment", [pytest.param(e, marks=[pytest.mark.slow] * e.startswith("sinq_table")) for e in EXPERIMENTS]
)
def test_every_point_is_valid(experiment):
    found = points(experiment)
    assert sum(len(models) for models, _ in found) > 1
    for models, config in found:
        assert set(models) <= set(options("model"))
        quantizer = make_quantizer(config.quantizer)
        make(PROTOCOL, config.task).check(config.runtime)
        speed.check(config.speed)
        assert config.model["source"] != "hub" or (config.model["id"] and config.model["revision"])
        assert not quantizer.needs or config.calibration.name
