"""Which points share a pass, how passes are divided and dealt out, and what a process of a pass says of its points."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qbench.config import Config, SpeedConfig
from qbench.errors import PointError, RequestError, WriteError
from qbench.sweep import serve
from qbench.sweep.dry_run import misfits
from qbench.sweep.passes import CALIBRATED_COST, alone, cost, deal, fitting, group
from tests.report import examples


@pytest.fixture
def planned(qbench, monkeypatch):
    """The points that a sweep of these arguments plans, with the passes that they would run in."""

    def call(*arguments: str) -> tuple[list[Any], list[list[str]]]:
        seen = []
        monkeypatch.setattr("qbench.sweep.dry_run.show", lambda plan, passes, where: seen.append((plan, passes)) or {})
        assert qbench("-m", "model=tiny-dense", "task.max_windows=2", *arguments, "--dry-run").status == 0
        plan, passes = seen.pop()
        return plan, [[p.label for p in each] for each in passes]

    return call


@pytest.mark.parametrize(
    ("arguments", "passes"),
    [
        (["quantizer=rtn,sinq", "quantizer.nbits=3,4"], [4]),
        (["quantizer=gptq", "calibration.sequences=1,2"], [2]),
        (["quantizer=rtn,sinq", "model.seed=0,1"], [2, 2]),
        (["quantizer=rtn,sinq", "task.window=256,512"], [2, 2]),
        (["quantizer=rtn,sinq", "runtime.batch_size=1,2"], [2, 2]),
        (["quantizer=rtn,sinq", "runtime.dtype=float32,bfloat16"], [2, 2]),
        (["quantizer=rtn,sinq", "outputs=a,b"], [2, 2]),
        (["quantizer=rtn,sinq", "speed=none,default"], [2, 1, 1]),
        (["quantizer=rtn,sinq", "export.dir='${quantizer.name}'"], [2]),
    ],
)
def test_points_that_share_model_text_precision_and_device_share_a_pass(planned, arguments, passes):
    assert sorted(map(len, planned(*arguments)[1])) == sorted(passes)


def test_a_run_id_is_in_a_pass_once(planned):
    """A pass locks its points: one that is tracked in two ways would wait for itself."""
    plan, passes = planned("quantizer=rtn,sinq", "tracker=none,wandb")
    assert len({p.point.run_id for p in plan}) == 2
    assert [len(each) for each in passes] == [2, 2]
    assert all(label.startswith("quantizer=rtn") != label.startswith("quantizer=sinq") for label in passes[0])


def test_what_cannot_share_says_why(planned):
    (point,) = (p.point for p in planned("quantizer=rtn")[0])
    assert alone(point) is None
    offloaded = replace(point.config, runtime=replace(point.config.runtime, offload=True))
    assert alone(replace(point, config=offloaded)) == "runtime.offload=true"
    timed = replace(point.config, speed=SpeedConfig("default"))
    assert alone(replace(point, config=timed)) == "speed=default"
    assert alone(replace(point, model=SimpleNamespace(original=False))) == "a model that is quantized already"
    assert alone(replace(point, export=Path("x"))) is None
    assert alone(replace(point, export=Path("x"), device=SimpleNamespace(type="cuda"))) == "export.dir"


@dataclass
class P:
    """A planned point: its own point as well."""

    name: str
    needs: bool = False
    config: Config = field(default_factory=Config)
    draws: int = 1
    export: str | None = None

    @property
    def point(self):
        return self

    @property
    def quantizer(self):
        return SimpleNamespace(needs={"inputs"} if self.needs else set())

    def __repr__(self):
        return self.name


def named(text: str) -> list[P]:
    """`ab Cd`: two passes; a capital is calibrated."""
    return [[P(name, name.isupper()) for name in part] for part in text.split()]


@pytest.mark.parametrize(
    ("passes", "state_bytes", "free_bytes", "parts"),
    [
        ("abcdef", 10, 1000, "abcdef"),
        ("abcdef", 10, 140, "abcdef"),  # six and the original's: 70 of 70
        ("abcdef", 10, 138, "abc def"),
        ("abcdef", 10, 80, "abc def"),
        ("abcdef", 10, 60, "ab cd ef"),
        ("abcdefg", 10, 120, "abcd efg"),  # as equal as can be
        ("abc", 10, 1, "a b c"),  # none fits, and each may still be tried
        ("abc de", None, 1, "abc de"),
        ("abc de", 10, float("inf"), "abc de"),  # on machines whose memory is not known
    ],
)
def test_variants_whose_states_do_not_fit_together_are_divided(passes, state_bytes, free_bytes, parts):
    found = fitting(named(passes), lambda point: state_bytes, free_bytes)
    assert " ".join("".join(p.name for p in each) for each in found) == parts
    if state_bytes and free_bytes > 4 * state_bytes:
        assert all((len(each) + 1) * state_bytes <= free_bytes / 2 for each in found)


def test_what_is_kept_for_an_export_is_counted_and_an_unknown_size_is_alone():
    """States take 10, and a kept variant 30 besides."""
    points = [P(name, export=name if name in "xyz" else None) for name in "axbyz"]
    sizes = {"a": 10, "b": 10, "x": 40, "y": None, "z": 40}
    for free, parts in ((1000, "y axbz"), (400, "y axbz"), (320, "y ax bz"), (100, "y a x b z")):
        found = fitting([points], lambda point: sizes[point.name], free)
        assert " ".join("".join(p.name for p in each) for each in found) == parts


def test_exports_share_a_pass_where_memory_allows(planned, monkeypatch):
    """Of tiny-dense, two windows of 512 tokens have states of 0.5 MB, and RTN's packed weights take less than that."""
    import psutil

    free = psutil.virtual_memory()
    exports = ("quantizer=rtn,hqq,sinq", "export.dir='${quantizer.name}'")
    for available, passes in ((1e9, [3]), (2e6, [1, 1, 1])):
        monkeypatch.setattr(psutil, "virtual_memory", lambda size=available: free._replace(available=int(size)))
        assert [len(each) for each in planned(*exports)[1]] == passes


@pytest.mark.parametrize(
    ("passes", "jobs", "parts"),
    [
        ("abcd", 1, "abcd"),
        ("abcd", 2, "ac bd"),
        ("abcdE", 2, "abcd E"),  # calibrated: as much as four others
        ("abcdEF", 2, "acE bdF"),
        ("ab", 8, "a b"),
        ("abc def", 2, "abc def"),  # as many passes as processes: none is read twice
        ("abcdef g", 2, "ace bdf g"),
    ],
)
def test_variants_are_dealt_out_by_cost(passes, jobs, parts):
    dealt = deal(named(passes), jobs, lambda point: 5)
    assert sorted("".join(p.name for p in each) for each in dealt) == sorted(parts.split())
    costs = [sum(cost(p, lambda point: 5) for p in each) for each in dealt]
    assert jobs == 1 or costs == sorted(costs, reverse=True)


def test_draws_are_variants():
    three = P("A", needs=True, draws=3)
    assert cost(three, lambda point: 7) == 3 * cost(P("B", needs=True), lambda point: 7)
    [both] = fitting([[three, P("b")]], lambda point: 10, 140)  # at most three each, and the original's: 70 of 70
    assert len(both) == 2
    assert len(fitting([[three, P("b")]], lambda point: 10, 138)) == 2


def test_a_larger_model_costs_more_and_a_calibrated_method_too():
    plain, calibrated = P("a"), P("B", needs=True)
    assert cost(calibrated, lambda point: 7) == CALIBRATED_COST * cost(plain, lambda point: 7) == CALIBRATED_COST * 7
    assert cost(plain, lambda point: None) == 1


KNOWN = SimpleNamespace(parameters=10_000, hidden=4, vocabulary=100)


def asked(device: str = "cuda", batch_size: int = 1) -> Any:
    config = Config()
    config.runtime.batch_size = batch_size
    kinds = SimpleNamespace(itemsize=2)
    protocol = SimpleNamespace(window=10)
    return SimpleNamespace(config=config, device=SimpleNamespace(type=device), dtype=kinds, protocol=protocol)


@pytest.mark.parametrize(
    ("point", "change", "device_bytes", "host_bytes", "names"),
    [
        (asked(), {}, 100_000, 100_000, []),
        (asked(), {}, 2_000, 100_000, ["a block, the next one", "the GPU"]),
        (asked(), {"alone": "export.dir"}, 15_000, 100_000, ["the whole model", "leave out export.dir"]),
        (asked(batch_size=8), {}, 10_000, 100_000, ["lower runtime.batch_size"]),
        (asked(), {}, 10_000, 100_000, ["lower task.window"]),
        (asked(), {"state_bytes": 60_000}, 100_000, 100_000, ["task.max_windows", "its 3 variants"]),
        (asked("cpu"), {}, None, 2_000, ["this host"]),
        (asked(), {}, None, None, []),
    ],
)
def test_a_plan_says_what_would_not_fit_and_which_setting_helps(point, change, device_bytes, host_bytes, names):
    sizes = {"pass": 2, "variants": 3, "alone": None, "model": "m", "block_bytes": 1000, "rest_bytes": 500}
    sentences = misfits(point, KNOWN, sizes | {"state_bytes": 100} | change, device_bytes, host_bytes)
    assert bool(sentences) == bool(names)
    for name in names:
        assert name in sentences[-1]


class Passes:
    """Stands in for run.run_pass: records nothing, and fails as each point's name says."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, points, group) -> Iterator[Any]:
        self.calls.append("".join(point.run_id for point in points))
        result, _ = examples.point()
        for point in points:
            if point.run_id == "R":
                raise RequestError("no room for such windows")
            if point.run_id == "W":
                raise WriteError(replace(result, run_id="W"), "measured, but not recorded")
            if point.run_id == "X":
                raise ZeroDivisionError
            if point.run_id == "-":
                return
            yield point, replace(result, run_id=point.run_id)


@pytest.mark.parametrize(
    ("points", "calls", "said"),
    [
        ("abc", ["abc"], {"a": "ok", "b": "ok", "c": "ok"}),
        ("aRb", ["aRb", "R", "b"], {"a": "ok", "R": "refused", "b": "ok"}),
        ("Rabc", ["Rabc", "Ra", "R", "a", "bc"], {"R": "refused", "a": "ok", "b": "ok", "c": "ok"}),
        ("aWbc", ["aWbc", "bc"], {"a": "ok", "W": "unwritten", "b": "ok", "c": "ok"}),
        ("aX", ["aX", "X"], {"a": "ok", "X": "refused"}),
        ("a-", ["a-", "-"], {"a": "ok", "-": "refused"}),
    ],
)
def test_what_ends_a_pass_costs_its_own_point(points, calls, said, capsys):
    run_pass = Passes()
    lines = list(serve._run([SimpleNamespace(run_id=name) for name in points], run_pass, "group"))
    assert run_pass.calls == calls
    assert {line["run_id"]: line["status"] for line in lines} == said
    sentences = {line["run_id"]: line["error"] for line in lines if line["status"] != "ok"}
    assert sentences.get("R", "no room for such windows") == "no room for such windows"
    assert "unexpected ZeroDivisionError" in sentences.get("X", "unexpected ZeroDivisionError")
    assert json.dumps(lines)


def test_the_points_of_a_pass_read_their_text_once(qbench, monkeypatch):
    """And each is fingerprinted by the sweep alone."""
    from qbench.evaluate.protocols.windows import TextWindows
    from qbench.sources.tiny import Tiny

    monkeypatch.setattr("qbench.sweep.worker.COMMAND", ("false",))
    qbench("-m", "model=tiny-dense", "task.max_windows=1", "quantizer=rtn,sinq")
    file = next(file for file in Path("outputs/sweeps").glob("*/1-*.json"))
    reads = []
    read = TextWindows.read
    monkeypatch.setattr(TextWindows, "read", lambda self: reads.append(self) or read(self))
    monkeypatch.setattr(Tiny, "fingerprint", lambda self: pytest.fail("hashed again"))

    def run_pass(points, group):
        for point in points:
            raise PointError(point.run_id)
        yield

    lines = list(serve.serve(file, run_pass))
    assert len(reads) == 1
    assert [line["error"] for line in lines] == [p["run_id"] for p in json.loads(file.read_text())["points"]]


def test_a_group_keeps_the_order_of_its_points(monkeypatch):
    points = [P(name) for name in "abcd"]
    for point in points:
        point.run_id = point.name
    monkeypatch.setattr("qbench.sweep.passes.alone", lambda point: None)
    monkeypatch.setattr("qbench.sweep.passes.shared", lambda point: "first" if point.name in "ac" else "second")
    assert [[p.name for p in each] for each in group(points)] == [["a", "c"], ["b", "d"]]
