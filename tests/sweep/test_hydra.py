"""What qbench uses of Hydra: its own plugin, and the private names that qbench/sweep/__init__.py lists."""

import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.plugins.sweeper import Sweeper

import qbench.sweep
from qbench.errors import RequestError, SweepFailed
from qbench.sweep.plan import combinations
from tests.conftest import ROOT, refused

READ_AT = {"hydra-core": "1.3.8"}


def test_private_names_are_those_of_the_versions_that_were_read():
    """After an upgrade: look at each name of the table again, then write the new version here."""
    assert version("hydra-core") == READ_AT["hydra-core"]
    parser = import_module("hydra._internal.utils").get_args_parser()
    given = vars(parser.parse_args(["-m", "--config-dir", "x", "a=b"]))
    flags = ("overrides", "multirun", "run", "cfg", "info", "help", "resolve", "config_dir", "experimental_rerun")
    assert given.keys() >= {*flags, "shell_completion"}
    Singleton.set_state(Singleton.get_state())


def test_no_private_module_of_hydra_is_imported_that_the_table_lacks():
    table = qbench.sweep.__doc__
    for path in [*(ROOT / "qbench").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]:
        for line in path.read_text().splitlines():
            if line.startswith(("from hydra._internal", "import hydra._internal")):
                module, _, name = line.removeprefix("from ").partition(" import ")
                assert f"`{module}.{name}` | {path.relative_to(ROOT / 'qbench').as_posix()}" in table


@pytest.mark.slow
def test_the_sweeper_is_a_plugin_that_is_found_outside_of_the_checkout_too(tmp_path):
    """An editable installation is found by Python's import, but not by Hydra's search."""
    code = (
        "from hydra.core.plugins import Plugins; from hydra.plugins.sweeper import Sweeper;"
        "from qbench.request.explain import register_plugins; register_plugins();"
        "print([c.__module__ for c in Plugins.instance().discover(Sweeper)])"
    )
    for folder in (tmp_path, ROOT):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
        assert "'hydra_plugins.qbench_sweeper'" in done.stdout


def test_the_plugin_imports_nothing_of_qbench_until_it_sweeps():
    """Every program of Hydra's in the environment imports it."""
    code = (
        "import sys, hydra_plugins.qbench_sweeper; print([m for m in sys.modules if m.partition('.')[0] == 'qbench'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_sweep_ends_as_python_functions_do(qbench, monkeypatch):
    """No sys.exit: what failed is raised to who asked Hydra, after everything is said."""
    from hydra_plugins.qbench_sweeper import QBenchSweeper

    ends = []

    def sweep(self, arguments):
        try:
            returned = usual(self, arguments)
        except BaseException as error:
            ends.append(error)
            raise
        ends.append(returned)
        return returned

    usual = QBenchSweeper.sweep
    monkeypatch.setattr(QBenchSweeper, "sweep", sweep)
    assert issubclass(QBenchSweeper, Sweeper)
    tiny = ("-m", "model=tiny-dense", "task.max_windows=1")
    plan = qbench(*tiny, "quantizer=rtn,nf4", "--dry-run")
    assert (plan.status, ends.pop()) == (0, plan.summary)
    monkeypatch.setattr("qbench.sweep.worker.COMMAND", ("false",))
    failed = qbench(*tiny, "quantizer=rtn")
    assert (failed.status, failed.summary["failed"]) == (1, 1)
    assert isinstance(ends.pop(), SweepFailed)
    assert qbench(*tiny, "quantizer.nbits=5").status == 2
    assert "nbits must be one of" in str(ends.pop())


@pytest.mark.parametrize(
    ("overrides", "points"),
    [
        (["a=1", "b=x,y"], [("a=1", "b=x"), ("a=1", "b=y")]),
        (["a=1,2", "b=x", "a=3,4"], [("a=3", "b=x"), ("a=4", "b=x")]),
        (["a=1,2", "b=range(0,2)"], [("a=1", "b=0"), ("a=1", "b=1"), ("a=2", "b=0"), ("a=2", "b=1")]),
        (["+a='x y',z"], [("+a='x y'",), ("+a=z",)]),
    ],
)
def test_products_are_those_of_hydras_own_sweeper(overrides, points):
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parsed = OverridesParser.create().parse_overrides(overrides)
    assert list(combinations(parsed)) == points
    assert [list(point) for point in points] == BasicSweeper.split_arguments(parsed, None)[0]


def test_a_quoted_value_of_a_sweep_stays_a_text(qbench):
    """Of choice("64") Hydra's parser takes the quotes off, and its own sweeper would hand on the number."""
    values = 'choice("64","null","1e400","a, b",64,"${x}",rtn)'
    (written,) = zip(*combinations(OverridesParser.create().parse_overrides([f"a={values}"])), strict=True)
    parsed = [override.value() for override in OverridesParser.create().parse_overrides(list(written))]
    assert [getattr(value, "text", value) for value in parsed] == ["64", "null", "1e400", "a, b", 64, "${x}", "rtn"]
    for quoted in ('"64"', '"null"', '"-inf"', '"true"'):
        sentence = refused(qbench("-m", "model=tiny-dense", f"calibration=choice({quoted})", "--dry-run"))
        assert sentence.startswith(f"qbench: unknown calibration {quoted.replace(chr(34), chr(39))}")
    assert qbench("-m", "model=tiny-dense", 'calibration.path="64"', "--dry-run").status == 0


def test_a_prepared_pass_runs_from_its_file_and_composes_nothing(qbench, monkeypatch):
    from qbench.sweep import worker

    tiny = ("model=tiny-dense", "task.max_windows=1", "quantizer=rtn")
    monkeypatch.setattr(worker, "COMMAND", (sys.executable, "-c", "raise SystemExit(9)"))
    sent = qbench("-m", *tiny, "model.seed=3")
    assert sent.status == 1
    (file,) = Path("outputs/sweeps").glob("*/1-*.json")
    monkeypatch.setattr("hydra.main", lambda **_: pytest.fail("composed"))
    outcome = qbench("--pass", str(file))
    assert outcome.status == 0
    assert outcome.summary["run_id"] == sent.summary["results"][0]["run_id"]
    assert outcome.summary["model"] == "tiny-dense-seed3"
    changed = file.read_text().replace('"max_windows": 1', '"max_windows": 2')
    file.write_text(changed.replace('"max_windows": 2', '"max_windows": 1', 1))  # the identity as it was
    other = qbench("--pass", str(file))
    assert (other.status, other.summary["status"]) == (1, "refused")
    assert "differs in protocol: what it reads has changed since the sweep began" in other.summary["error"]
    for wrong in ([], ["nowhere.json"], [str(file), "x"]):
        assert qbench("--pass", *wrong).status == 2
    file.write_text("{}")
    assert "is not what a sweep sends" in qbench("--pass", str(file)).stderr


def _both_ways(points):
    """What our composer and Hydra make of each point, or say of it; and the composer."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    from qbench.config import register
    from qbench.request.explain import register_plugins
    from qbench.sweep.compose import Composer

    class Hydras(Composer):
        def _quickly(self, overrides):
            return None

    register()
    register_plugins()
    with initialize_config_module("qbench.conf", version_base="1.3"):
        composed = compose("config", return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        ours = Composer(composed, loader)
        twice = [_composed_or_refused(ours, point) for point in points * 2]
        hydras = [_composed_or_refused(Hydras(composed, loader), point) for point in points]
    assert twice[: len(points)] == twice[len(points) :]  # one point leaves nothing to the next
    return twice[: len(points)], hydras, ours


def _composed_or_refused(composer, point):
    try:
        return [
            (key, list(value.items()) if isinstance(value, dict) else value)
            for key, value in vars(composer(point)).items()
        ]
    except RequestError as error:
        return str(error)


@pytest.mark.slow
def test_points_that_share_their_composing_are_those_that_hydra_composes():
    points = [
        ("quantizer=rtn", "quantizer.nbits=3", "quantizer.nbits=2", "outputs='a b'"),
        ("quantizer.nbits=3", "quantizer=gptq", "task.names=[]", "model.name='${quantizer.name}'"),
        ("quantizer=gguf/q4_k", "model=tiny-dense", "calibration=wikitext2", "speed=default", "task=wikitext2"),
        ("experiment=demo", "task.window=64", "quantizer=fp4"),
        ("export.dir='x/${quantizer.name}-${quantizer.nbits}'",),
        ("runtime.batch_size=many", "quantizer=rtn"),
        ("quantizer=nf4", "quantizer.nbits=3"),
        ("quantizer=nf4", "++quantizer.nbits=3"),
        ("hydra.job.num=3", "model=tiny-dense"),
    ]
    ours, hydras, composer = _both_ways(points)
    assert ours == hydras
    assert sum(isinstance(said, str) for said in ours) == 3
    assert len(composer.loaded) == 2  # the sweep's own, and that of experiment=demo


@pytest.mark.slow
def test_an_option_that_reaches_into_another_group_is_composed_by_hydra(tmp_path, monkeypatch):
    files = {
        "task/reaching": "# @package _global_\nquantizer: {nbits: 4}\ntask: {name: reaching}\n",
        "task/choosing": "# @package _global_\ndefaults: [override /quantizer: hqq]\ntask: {name: choosing}\n",
        "task/following": "defaults: ['/model@extra: ${quantizer}']\nname: following\n",
        "quantizer/mine": "name: mine\nnbits: 2\n",
        "quantizer/based": "defaults: [rtn]\nname: based\n",
    }
    for name, content in files.items():
        (tmp_path / "their_conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "their_conf" / f"{name}.yaml").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("qbench.request.explain.conf_packages", lambda: ["their_conf"])
    points = [
        ("quantizer=mine", "task=wikitext2"),
        ("quantizer=fp4", "task=reaching"),
        ("quantizer=rtn", "task=choosing"),
        ("task=choosing",),
        ("quantizer=mine", "task=following"),
        ("quantizer=based",),
    ]
    ours, hydras, composer = _both_ways(points)
    assert ours == hydras
    assert ("nbits", 4) in dict(ours[1])["quantizer"]
    assert [dict(said)["quantizer"][0][1] for said in ours[2:4]] == ["rtn", "hqq"]
    own, *others = composer.loaded
    assert own == ("the sweep's own",)
    assert set(others) >= {("quantizer=fp4", "task=reaching"), ("quantizer=based",)}


@pytest.mark.slow
def test_every_option_is_composed_as_hydra_composes_it():
    from qbench.request.options import GROUPS, options

    points = [(f"{group}={option}",) for group in GROUPS for option in options(group)]
    ours, hydras, _ = _both_ways(points)
    assert ours == hydras


@pytest.mark.slow
def test_help_and_typos_import_nothing_heavy():
    heavy = ("torch", "transformers", "lm_eval", "numpy", "rich", "wandb")
    code = (
        "import sys; from qbench.__main__ import main; main();"
        f"print([m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    )
    for arguments in (["--help"], ["quantizer=sink"], ["quantizer.nbit=3"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[-1] == "[]"
