"""What is the same measurement is decided once: run ids, rows, sections, histories and the gate all say the same."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from qbench.config import Config, RuntimeConfig
from qbench.errors import RequestError
from qbench.record.identity import PERMISSIONS, RUNTIME_OUTSIDE, SOURCE_OF_TEXT, Identity, identify
from qbench.report import board, entries, history
from qbench.report.columns import order
from qbench.report.gate.compare import compare
from qbench.report.gate.file import GateFile, Limits
from qbench.request.prepare import Prepared, prepare
from tests.conftest import composed, refused
from tests.report import examples
from tests.track import wandb_stub


@dataclass(frozen=True)
class Case:
    name: str
    first: str
    second: str
    rows: int  # 1: the two requests are one measurement, everywhere
    sections: int = 1


TINY = "model=tiny-dense task.window=64 task.max_windows=2"
TEXT = "task=text task.window=64 task.max_windows=2 task.name=mine model=tiny-dense"
GPTQ = f"{TINY} quantizer=gptq calibration=file calibration.window=64 calibration.path="
SHOWN = f"{GPTQ}a.txt"
NO_KL = f"{TINY} task.divergence=false"
LOCAL = "model=local task.window=64 task.max_windows=2"
CASES = [
    # what cannot change a number
    Case("the default, said", TINY, f"{TINY} quantizer=sinq quantizer.codebook=null quantizer.iterations=16", 1),
    Case("a whole number as a float", f"{TINY} quantizer.step_max=2", f"{TINY} quantizer.step_max=2.0", 1),
    Case("another share to be covered", TINY, f"{TINY} runtime.min_coverage=0.5", 1),
    Case("threads", TINY, f"{TINY} runtime.threads=1", 1),
    Case("another folder of outputs", TINY, f"{TINY} outputs=elsewhere", 1),
    Case("another tracker", TINY, f"{TINY} tracker=wandb tracker.group=mine", 1),
    Case("an export", TINY, f"{TINY} export.dir=exported", 1),
    Case("measured again", TINY, f"{TINY} runtime.rerun=true", 1),
    Case("auto, resolved", f"{TINY} runtime.device=cpu", f"{TINY} runtime.device=cpu runtime.dtype=float32", 1),
    Case("another name of the model", TINY, f"{TINY} model.name=mine", 1),
    Case("a text that moved", f"{TEXT} task.path=a.txt", f"{TEXT} task.path=moved/a.txt", 1),
    Case("a model that moved", f"{LOCAL} model.path=base", f"{LOCAL} model.path=moved/base", 1),
    Case("a calibration that moved", SHOWN, f"{GPTQ}moved/a.txt", 1),
    Case("its name", SHOWN, f"{SHOWN} calibration.name=b", 1),
    Case("a calibration that nobody is shown", f"{TINY} calibration.sequences=2", f"{TINY} calibration.sequences=3", 1),
    Case("the batch that a CPU has", TINY, f"{TINY} runtime.batch_size=1", 1),
    Case("the name of lm-eval's tasks", "task=wikitext_lmeval", "task=lmeval task.names=[wikitext]", 1),
    # another setting of the same original under the same protocol
    Case("null against set", TINY, f"{TINY} quantizer.codebook=nf4", 2),
    Case("another default", TINY, f"{TINY} quantizer.iterations=15", 2),
    Case("another method", TINY, f"{TINY} quantizer=rtn", 2),
    Case("batch size", TINY, f"{TINY} runtime.batch_size=2", 2),
    Case("divergence", TINY, f"{TINY} task.divergence=false", 2),
    Case("speed", TINY, f"{TINY} speed=default", 2),
    Case("speed of other shapes", f"{TINY} speed=default", f"{TINY} speed=default speed.repeats=2", 2),
    Case("speed on other threads", f"{TINY} speed=default", f"{TINY} speed=default runtime.threads=1", 2),
    Case("calibration texts", SHOWN, f"{GPTQ}b.txt", 2),
    Case("calibration sequences", f"{SHOWN} calibration.sequences=2", f"{SHOWN} calibration.sequences=3", 2),
    Case("calibration inputs", SHOWN, f"{SHOWN} calibration.inputs=original", 2),
    # another original or text
    Case("two texts of one name", f"{TEXT} task.path=a.txt", f"{TEXT} task.path=b.txt", 2, 2),
    Case("two names of a text", f"{TEXT} task.path=a.txt", f"{TEXT} task.path=a.txt task.name=yours", 2, 2),
    Case("windows", TINY, f"{TINY} task.max_windows=3", 2, 2),
    Case("two seeds", TINY, f"{TINY} model.seed=1", 2, 2),
    Case("two seeds of one name", f"{TINY} model.name=mine", f"{TINY} model.name=mine model.seed=1", 2, 2),
    Case("two local models", f"{LOCAL} model.path=base", f"{LOCAL} model.path=finetune", 2, 2),
    Case("two local models of one name", f"{LOCAL} model.path=base", f"{LOCAL} model.path=other/base", 2, 2),
    Case("code of its own", f"{LOCAL} model.path=base", f"{LOCAL} model.path=base model.trust_remote_code=true", 2, 2),
    Case("another repository", "model=qwen3-8b", "model=qwen3-8b model.id=example/other", 2, 2),
    Case("another commit", "model=qwen3-8b", f"model=qwen3-8b model.revision={'ab' * 20}", 2, 2),
    Case("precision", TINY, f"{TINY} runtime.dtype=bfloat16", 2, 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two texts and three models, each in two places or under one name."""
    here = tmp_path_factory.mktemp("inputs")
    texts = {"a.txt": "river stone " * 400, "moved/a.txt": "river stone " * 400, "b.txt": "cloud violin " * 400}
    models = {"base": b"weights", "moved/base": b"weights", "finetune": b"tuned", "other/base": b"others"}
    for name, content in texts.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(content)
    for name, content in models.items():
        (here / name).mkdir(parents=True)
        (here / name / "config.json").write_text('{"model_type": "qwen3"}')
        (here / name / "model.safetensors").write_bytes(content)
    return here


@pytest.fixture
def ask(folder, monkeypatch, tmp_path):
    """What a command line asks for, without loading anything."""
    monkeypatch.chdir(folder)

    def call(words: str, **functions) -> Prepared:
        overrides = [f"outputs={tmp_path}", *words.split()]
        if "tracker=wandb" in overrides:
            wandb_stub.install(monkeypatch)
        return prepare(composed(overrides), overrides, **functions)

    return call


def measured(point: Prepared, day: int):
    """The point as it would be recorded."""
    name, windows = (point.identity.protocol.get(key) for key in ("name", "max_windows"))
    result, windows = examples.point(protocol=f"{name}:first{windows}", day=day)
    record = replace(
        result.evaluation[0],
        token_ids_sha256=point.source.sha256,
        window_nll_file=f"windows-{point.run_id}.safetensors",
    )
    model = replace(result.model, name=point.model.name, fingerprint=point.identity.weights)
    changes = dict(run_id=point.run_id, identity=point.identity, model=model, evaluation=[record])
    return replace(result, command=point.command, **changes), windows


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_part_decides_alike(case, ask, tmp_path):
    first, second = (ask(words) for words in (case.first, case.second))
    assert len({first.run_id, second.run_id}) == case.rows

    results = [measured(first, 1), measured(second, 2)]
    found = [entries.Entry(result, ()) for result, _ in results]
    recorded = entries.read(examples.save(tmp_path / "first", results[0]))
    recorded.entries.extend(entries.read(examples.save(tmp_path / "second", results[1])).entries)
    assert len(entries.latest(found)) == case.rows

    sections = board.sections(entries.latest(recorded.entries), *order("quality"))
    assert len({s.title for s in sections}) == len(sections) == case.sections
    assert sum(len(section.rows) for section in sections) == case.rows
    if (case.rows, case.sections) == (2, 1) and not case.name.startswith("another method"):
        assert any(row.options for row in sections[0].rows), "the rows cannot be told apart"

    lines = history.tables(recorded.entries, "quality")
    assert len({line.title for line in lines}) == len(lines) == case.rows

    baseline = GateFile.of(recorded.entries[:1], Limits())
    again = entries.Recorded(recorded.entries[1:], [], [])
    verdicts = {finding.verdict for finding in compare(baseline, again)}
    assert verdicts == ({"pass"} if case.rows == 1 else {"missing", "note"})
    failure = replace(results[1][0], status="failed", error="why", quantization=None)
    verdicts = {finding.verdict for finding in compare(baseline, entries.Recorded([], [failure], []))}
    assert verdicts == ({"failed"} if case.rows == 1 else {"missing"})


def test_another_fingerprint_is_another_measurement(ask):
    """Whatever of the model it saw change: weights, tokenizer, code."""
    one, other = (ask(f"{LOCAL} model.path=base", fingerprint=lambda model, f=f: f) for f in ("local:1", "local:2"))
    assert one.run_id != other.run_id
    assert one.identity.original != other.identity.original


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (f"{LOCAL} model.path=base", "base"),
        (f"{LOCAL} model.path=other/base/", "base"),
        (f"{LOCAL} model.path=other/../finetune/.", "finetune"),
        (f"{LOCAL} model.path=base model.name=mine", "mine"),
        ("model=tiny-dense", "tiny-dense"),
        ("model=tiny-dense model.seed=0", "tiny-dense"),
        ("model=tiny-dense model.seed=3", "tiny-dense-seed3"),
        ("model=tiny-dense model.seed=3 model.name=mine", "mine"),
        ("model=qwen3-8b", "qwen3-8b"),
        ("model=qwen3-8b model.id=example/other", "example/other"),
        (f"model=qwen3-8b model.revision={'ab' * 20}", "qwen3-8b@abababab"),
    ],
)
def test_another_model_than_the_configurations_has_a_name_of_its_own(ask, words, name):
    assert ask(words).model.name == name


def test_what_was_covered_is_checked_although_it_is_no_part_of_the_identity(ask, tmp_path):
    words = f"{TINY} runtime.min_coverage=0.5"
    result, windows = measured(ask(words), 1)
    covered = replace(result, quantization=replace(result.quantization, coverage=0.6))
    examples.save(tmp_path, (covered, windows))
    assert ask(words).recorded() == covered
    with pytest.raises(RequestError) as refusal:
        ask(TINY).recorded()
    refused(refusal.value, key="runtime.min_coverage", names=["60.0%", "95%"])
    assert ask(f"{TINY} runtime.rerun=true").recorded() is None


def test_a_setting_is_inside_unless_it_is_listed_as_outside(ask):
    """So that a new one tells two measurements apart until somebody has decided that it must not."""
    asked = ask(f"{TINY} quantizer=gptq calibration=mini speed=default")
    flat = asked.identity.flat()
    for group, kind, outside in (
        ("task", asked.protocol, (*SOURCE_OF_TEXT, *PERMISSIONS)),
        ("runtime", RuntimeConfig, RUNTIME_OUTSIDE),
    ):
        held = {key.removeprefix(f"{group}.") for key in flat if key.startswith(f"{group}.")}
        held -= {"text_sha256", "protocol"}
        assert held == {field.name for field in fields(kind)} - set(outside), group
    assert {"calibration.window", "calibration.sequences", "calibration.inputs", "calibration.text_sha256"} == {
        key for key in flat if key.startswith("calibration.")
    }


WINDOWS = {"add_bos_token": None, "divergence": True, "max_windows": None}
TASKS = {"add_bos_token": None, "limit": None, "num_fewshot": None, "protocol": "lmeval", "window": 2048}
PROTOCOLS = [
    ("model=tiny-dense", WINDOWS | {"name": "mini", "protocol": "windows", "window": 512}),
    (NO_KL, WINDOWS | {"name": "mini", "protocol": "windows", "window": 64, "max_windows": 2, "divergence": False}),
    ("task=c4_gptq task.path=pages.jsonl", WINDOWS | {"name": "c4_gptq", "protocol": "crops", "window": 2048,
                                                      "max_windows": 256}),
    ("task=c4_new task.path=pages.jsonl task.pages=9", WINDOWS | {"name": "c4_new", "protocol": "pages", "pages": 9,
                                                                  "window": 2048, "max_windows": 256}),
    ("task=wikitext_lmeval", TASKS | {"names": ["wikitext"]}),
    ("task=lmeval task.names=[piqa,arc_easy] task.limit=3", TASKS | {"names": ["piqa", "arc_easy"], "limit": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), PROTOCOLS, ids=[words for words, _ in PROTOCOLS])
def test_the_protocol_of_a_request(ask, folder, words, expected):
    """As recorded: a field that is added, dropped or renamed makes every result that there is another measurement."""
    (folder / "pages.jsonl").write_text("\n".join(json.dumps({"text": "river stone " * 6000}) for _ in range(9)))
    assert ask(f"model=tiny-dense {words}").identity.protocol == expected


def test_a_method_of_a_third_party_may_have_any_fields():
    settings = {"name": "mine", "path": Path("a"), "pairs": ((1, 2.0), (3, 0.5)), "more": {"x": None, "y": True}}
    common = dict(weights="w", text_sha256="t", calibration_sha256=None, device="cpu", dtype="float32")
    config = Config()
    config.model["source"] = "random"
    same = identify(config, settings, {"protocol": "windows"}, **common)
    assert same.quantizer == {"name": "mine", "path": "a", "pairs": [[1, 2], [3, 0.5]], "more": {"x": None, "y": True}}
    result = replace(examples.point()[0], identity=same)
    assert type(result).from_json(result.to_json()).identity == same
    assert json.loads(same.key)["quantizer"]["more"]["x"] is None
    assert same == Identity(**json.loads(same.key))


def test_the_fingerprint_is_that_of_the_models_source(ask):
    assert ask(TINY).identity.weights == ask(TINY).model.fingerprint()


def test_a_transform_is_part_of_the_point(ask):
    """And a point without any keeps the run id that it had before there were transforms."""
    plain, chosen = ask(f"{TINY} quantizer=rtn"), ask(f"{TINY} quantizer=rtn transform=presinq transform.repeats=2")
    assert "transform" not in json.loads(plain.identity.key)
    assert plain.run_id != chosen.run_id
    assert chosen.identity.transform == {
        **{"name": "presinq", "iterations": None, "repeats": 2, "group_size": 64, "values": True},
        **{"step_min": 0.7, "step_max": 2},
    }
    assert (plain.identity.method, chosen.identity.method) == ("rtn", "presinq+rtn")
    assert chosen.identity.calibration is not None, "it is chosen by a text"
    assert plain.identity.calibration is None
    assert ask(f"{TINY} quantizer=none transform=presinq").identity.calibration is None
