"""The reference file and the experiments of the SINQ paper hold together: no published row without a point."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import yaml

from qbench.registry import PROTOCOL, make
from qbench.report import published
from tests.conftest import ROOT

TABLES = {1: 48, 2: 34, 3: 30, 4: 42, 8: 18, 9: 12, 10: 30, 13: 24, 19: 24}  # experiment -> its points
TABLE_18 = "Table 18"  # is measured by sinq_table3
OTHER_PROTOCOL = {"wikitext2:llama.cpp-w512": "wikitext2:gptq-w512"}  # llama.cpp's own, of which ours is the nearest


@cache
def points(table):
    """Every point of an experiment, flat: `quantizer.nbits` -> 4, every setting of the method that its YAML names."""
    config = yaml.safe_load((ROOT / "conf" / "experiment" / f"sinq_table{table}.yaml").read_text(encoding="utf-8"))
    task = {key: value for key, value in config.get("task", {}).items()}
    defaults = {k.removeprefix("override /"): v for default in config["defaults"] for k, v in default.items()}
    found = []
    sweeper = config["hydra"]["sweeper"]
    for one in [sweeper["params"], *sweeper.get("also", [])]:
        for values in product(*(str(value).split(",") for value in one.values())):
            chosen = dict(zip(one, map(yaml.safe_load, values), strict=True))
            method = _group("quantizer", chosen["quantizer"])
            point = {f"quantizer.{key}": value for key, value in method.items()} | chosen
            settings = _group("task", chosen.get("task", defaults["task"])) | task
            transform = point.get("transform")
            point["transform"] = None if transform == "none" else transform
            found.append(point | {"protocols": _protocols(settings)})
    return found


@cache
def _group(group, name):
    return yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text(encoding="utf-8"))


def _protocols(task):
    if task["protocol"] == "lmeval":
        return [f"{name}:lmeval" for name in task["names"]]
    return [make(PROTOCOL, task).protocol_name(task["name"])]


def measures(point, number):
    wanted = {"model": number.model, "quantizer": number.quantizer}
    wanted |= {"quantizer.nbits": number.nbits} if number.nbits is not None else {}
    wanted |= {"quantizer.group_size": number.group_size} if number.group_size is not None else {}
    settings = dict(number.settings)
    wanted |= {"transform": settings.pop("transform", None)}
    wanted |= {f"quantizer.{key}": value for key, value in settings.items()}
    protocol = OTHER_PROTOCOL.get(number.protocol, number.protocol)
    protocol = protocol.partition("-")[0] if ":lmeval" in protocol else protocol
    protocol_fits = protocol == published.QUANTIZING or protocol in point["protocols"]
    return protocol_fits and all(point.get(key) == value for key, value in wanted.items())


@pytest.mark.parametrize("table", TABLES)
def test_every_published_row_is_a_point(table):
    where = (f"Table {table}", TABLE_18) if table == 3 else (f"Table {table}",)
    numbers = [n for n in published.read("sinq_v4") if n.where in where and n.quantizer != "none"]
    assert numbers
    assert [n for n in numbers if not any(measures(point, n) for point in points(table))] == []


@pytest.mark.parametrize("table", TABLES)
def test_each_experiment_has_no_more_than_its_rows(table):
    assert len(points(table)) == TABLES[table]


def test_every_table_of_the_reference_has_an_experiment():
    tables = {n.where for n in published.read("sinq_v4")} - {TABLE_18}
    assert tables == {f"Table {table}" for table in TABLES}
