"""Published numbers: what they name exists, and a few of them are what the paper prints."""

import pytest

from qbench.registry import PROTOCOL, make
from qbench.report import published
from qbench.report.columns import PUBLISHED_BESIDES
from qbench.request.options import options
from tests.conftest import ROOT

NOT_SCORED = published.QUANTIZING
TASKS = ("hellaswag:lmeval", "piqa:lmeval", "mmlu:lmeval")
METRIC_OF = dict.fromkeys(TASKS, "flip_percent")
OTHERS = {"wikitext2:llama.cpp-w512"}  # llama.cpp's, which no task of ours scores
RTN_AT_3 = {"model": "qwen3-32b", "quantizer": "rtn", "nbits": 3, "protocol": "c4_gptq:crops256-w2048"}


@pytest.fixture(scope="module")
def sinq():
    return published.read("sinq_v4")


def protocols():
    """The protocol names of the tasks that ship, at their defaults; those of many texts go by what was read."""
    import yaml

    names = set()
    for path in (ROOT / "conf" / "task").glob("*.yaml"):
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        if task["protocol"] not in ("lmeval", "domains"):
            names.add(make(PROTOCOL, task).protocol_name(task["name"]))
    return names


@pytest.mark.parametrize("name", sorted(published.available()))
def test_what_it_names_exists(name):
    models, quantizers, known = options("model"), options("quantizer"), protocols() | {NOT_SCORED} | OTHERS
    for number in published.read(name):
        assert number.model in models, number
        assert number.quantizer == "none" or number.quantizer in quantizers, number
        assert number.protocol in known or number.protocol.partition("-v")[0] in TASKS, number
        assert number.metric == METRIC_OF.get(number.protocol.partition("-v")[0], "ppl") or (
            number.protocol == NOT_SCORED and number.metric in PUBLISHED_BESIDES
        ), number
        assert number.settings.get("transform") in (None, *options("transform")), number
        assert number.source
        assert number.where
        assert number.value > 0


def test_no_number_is_given_twice(sinq):
    keys = [tuple(sorted((k, str(v)) for k, v in vars(n).items() if k not in ("value", "where"))) for n in sinq]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("wanted", "value"),
    [
        ({"model": "qwen3-1.7b", "quantizer": "none", "protocol": "wikitext2:gptq-w2048"}, 16.67),
        ({"model": "qwen3-14b", "quantizer": "sinq", "nbits": 3, "protocol": "wikitext2:gptq-w2048"}, 9.33),
        (RTN_AT_3 | {"settings": {"rotation": None}}, 35.83),
        (RTN_AT_3 | {"settings": {"rotation": "hadamard"}}, 14.83),
        ({"model": "qwen3-14b", "quantizer": "higgs", "protocol": "wikitext2:gptq-w2048"}, 9.13),
        ({"model": "qwen3-1.7b", "quantizer": "awq", "nbits": 4, "protocol": "c4_gptq:crops256-w2048"}, 19.95),
        ({"model": "qwen3-32b", "quantizer": "gptq", "metric": "quant_seconds"}, 3064.62),
        ({"model": "qwen3-30b-a3b", "quantizer": "hqq", "nbits": 3, "metric": "model_gigabytes"}, 15.10),
    ],
)
def test_spot_checks(sinq, wanted, value):
    found = [n for n in sinq if all(getattr(n, key) == v for key, v in ({"metric": "ppl"} | wanted).items())]
    assert [n.value for n in found] == [value]
