"""lm-eval's own tasks: its numbers to the last digit, and ours beside them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qbench.config import RuntimeConfig
from qbench.errors import PointError, RequestError
from qbench.evaluate import lmeval
from qbench.evaluate.hflm import wrap
from qbench.evaluate.protocols.lmeval import LmEval
from qbench.record.result import Result
from qbench.sources.tiny import build

ARTICLES = " = One = \n \n It rained @-@ a lot . \n = = Part = = \n And more . \n = Two = \n \n The sun 's out . \n"

CHOICE = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""

CONTINUATION = """
task: ends
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
metadata:
  version: 1.0
"""


@pytest.fixture(autouse=True)
def _no_inventory(monkeypatch):
    """simple_evaluate lists every installed package in its result, which takes longer than all the rest."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def wikitext(tmp_path):
    (tmp_path / "wiki.raw").write_text(ARTICLES)
    return LmEval(name="w", names=["wikitext"], path=str(tmp_path / "wiki.raw"), window=40)


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """A folder with two tasks over the same 12 questions, in lm-eval's format."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    draw = np.random.default_rng(0)
    rows = [
        {"question": f"Is {a} more than {b}?", "choices": ["yes", "nay", "hmm"], "answer": int(a <= b)}
        for a, b in draw.integers(0, 99, (12, 2)).tolist()
    ]
    data = folder / "questions.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "colours.yaml").write_text(CHOICE.format(data=data))
    (folder / "ends.yaml").write_text(CONTINUATION.format(data=data))
    (folder / "both.yaml").write_text(
        "group: both\ntask: [colours, ends]\n"
        "aggregate_metric_list:\n  - {metric: acc, aggregation: mean, weight_by_size: true}\n"
        "metadata: {version: 1.0}\n"
    )
    return folder


def prepare(task, tokenizer, **runtime):
    return task.prepare(task.read(), tokenizer, RuntimeConfig(**runtime))


def test_wikitext_is_lm_evals_own_number(tiny, wikitext):
    """The same task object through simple_evaluate with a plain HFLM gives the same digits."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = tiny
    evaluation = prepare(wikitext, tokenizer)
    scores = evaluation.score(model, None)
    [record], [], _ = evaluation.records(scores, None, False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=40, batch_size=1, softmax_dtype="float32")
    [task] = lmeval.load(wikitext.read())
    asked = {"tasks": list(task.leaves.values()), "task_manager": TaskManager(include_defaults=False)}
    theirs = simple_evaluate(lm, **asked, bootstrap_iters=0)["results"]["wikitext"]
    assert {m.name: m.value for m in record.metrics} == {
        name: theirs[f"{name},none"] for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
    }
    assert record.protocol == "wikitext:lmeval-v2.0-w40"
    assert record.windows == 2
    assert record.text_source == "wiki.raw"
    # one number in four units: nats per document over tokens, words and bytes
    nats = math.log(record.ppl) * record.scored_tokens
    values = {m.name: m.value for m in record.metrics}
    raw = [page.encode() for page in ARTICLES.split("\n = Two")]
    total_bytes = sum(map(len, raw)) + len(b" = Two")
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / total_bytes)
    assert values["byte_perplexity"] == pytest.approx(2 ** values["bits_per_byte"])


def test_windows_that_hold_a_document_equal_one_forward_pass(wikitext):
    model, tokenizer = build("dense", 0)
    model = model.double().eval()
    evaluation = prepare(replace(wikitext, window=2048), tokenizer)
    scores = evaluation.score(model, None)
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    pages = ARTICLES.split("\n = Two")
    for index, page in enumerate((pages[0], " = Two" + pages[1])):
        ids = tokenizer(wikitext_detokenizer({"page": page}))["input_ids"]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([[tokenizer.bos_token_id, *ids[:-1]]])).logits[0].log_softmax(-1)
        expected = log_probabilities.gather(1, torch.tensor(ids)[:, None]).sum().item()
        assert scores["wikitext|wikitext|log_likelihood"][index] == pytest.approx(expected, rel=1e-9)
        assert scores["wikitext|wikitext|tokens"][index] == len(ids)


def test_a_limit_is_in_the_name_and_pages_may_be_json(tiny, tmp_path):
    path = tmp_path / "pages.json"
    path.write_text("".join(json.dumps({"text": f"Page number {i} , as it is ."}) + "\n" for i in range(5)))
    task = LmEval(name="c4", names=["c4"], path=str(path), limit=3, add_bos_token=False)
    evaluation = prepare(task, tiny[1])
    [record], _, _ = evaluation.records(evaluation.score(tiny[0], None), None, False)
    assert record.protocol == "c4:lmeval-v0.0-w2048-limit3-nobos"
    assert record.windows == 3
    assert "before a text: none" in record.bos_policy


def test_accuracy_differences_and_flips_are_counted_by_document(own_tasks):
    """A task of our own through a group: lm-eval's accuracies, and flips counted by hand from its predictions."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (base, tokenizer), (other, _) = build("dense", 0), build("dense", 1)
    task = LmEval(name="t", names=["colours", "both"], include_path=str(own_tasks), window=256)
    evaluation = prepare(task, tokenizer, batch_size=18)
    baseline = evaluation.score_baseline(base.eval())
    scores = evaluation.score(other.eval(), baseline)
    [], records, files = evaluation.records(scores, baseline, True)
    colours, both = records
    assert colours.protocol == "colours:lmeval-v3.0-0shot-w256"
    assert (colours.documents, both.documents) == (12, 24)
    results = [
        simple_evaluate(
            wrap(model, tokenizer, task, RuntimeConfig(batch_size=18)),
            tasks=[*evaluation.tasks[0].leaves.values()],
            task_manager=TaskManager(include_defaults=False),  # indexing lm-eval's own takes longer than all the rest
            bootstrap_iters=0,
        )
        for model in (base, other)
    ]
    for name in ("acc", "acc_norm"):
        (metric,) = [m for m in colours.metrics if m.name == name]
        theirs = [r["results"]["colours"][f"{name},none"] for r in results]
        assert (metric.baseline, metric.value) == tuple(theirs)
        right = [[s[name] for s in r["samples"]["colours"]] for r in results]
        flips = sum(a != b for a, b in zip(*right, strict=True)) / 12
        assert metric.flip_rate == flips > 0
        assert metric.delta == pytest.approx(theirs[1] - theirs[0])
        assert metric.delta_low <= metric.delta <= metric.delta_high
        assert metric.flip_rate_low <= flips <= metric.flip_rate_high
    (acc,) = [m for m in both.metrics if m.name == "acc"]
    pooled = files[both.scores_file]["quantized/both/acc,none"]
    ends = files[both.scores_file]["quantized/ends/acc,none"]
    assert pooled.tolist() == [*(s["acc"] for s in results[1]["samples"]["colours"]), *ends]
    assert acc.value == pytest.approx(pooled.mean())
    assert set(files[colours.scores_file]) == {
        f"{w}/colours/{m},none" for w in ("quantized", "baseline") for m in ("acc", "acc_norm")
    }


@pytest.mark.slow
def test_a_point_with_a_task_of_ones_own(qbench, own_tasks):
    request = ("model=tiny-dense", "runtime.batch_size=18", "task=lmeval", "task.names=[colours]")
    request += (f"task.include_path={own_tasks}",)
    outcome = qbench(*request, "quantizer.nbits=2")
    assert outcome.status == 0, outcome.stderr
    summary = outcome.summary
    assert 0 <= summary["colours:lmeval-v3.0-0shot-w2048/acc"] <= 1
    assert 0 <= summary["colours:lmeval-v3.0-0shot-w2048/acc_flip_rate"] <= 1
    assert "flipped" in outcome.stderr
    path = Path("outputs/results") / summary["run_id"] / "result.json"
    result = Result.from_json(path.read_bytes())
    assert (path.parent / result.tasks[0].scores_file).is_file()
    assert result.evaluation == []
    again = qbench(*request, "quantizer=rtn")
    assert again.status == 0, again.stderr
    assert (
        Result.from_json((Path("outputs/results") / again.summary["run_id"] / "result.json").read_bytes())
        .tasks[0]
        .baseline_cached
    )


def test_unknown_tasks_get_the_closest_names(own_tasks, monkeypatch):
    from lm_eval.tasks import TaskManager

    usual = TaskManager.__init__  # indexing everything takes half a minute
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **k: usual(self, **k | {"include_defaults": False}))
    task = LmEval(name="t", names=["colors"], include_path=str(own_tasks))
    with pytest.raises(RequestError, match="lm-eval knows no task 'colors'; the closest names are colours"):
        lmeval.load(task.read())


def test_a_task_without_network_says_what_would_do():
    with pytest.raises(RequestError, match=r"lm-eval cannot load piqa .*task\.path=FILE"):
        lmeval.load(LmEval(names=["piqa"]).read())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"names": []}, r"task\.names must name lm-eval tasks"),
        ({"names": ["a", "a"]}, "a name twice"),
        ({"names": ["a", "b"], "path": "x.json"}, "documents of one task"),
        ({"limit": 0}, r"task\.limit must be at least 1"),
        ({"num_fewshot": -1}, r"task\.num_fewshot must be at least 0"),
        ({"include_path": "nowhere"}, r"task\.include_path=nowhere is not a folder"),
        ({"path": "pages.txt"}, "must be .json or .jsonl"),
    ],
)
def test_wrong_settings(changes, sentence):
    def ask(task):
        task.check(RuntimeConfig())
        task.read()

    with pytest.raises(RequestError, match=sentence):
        ask(LmEval(**{"names": ["piqa"]} | changes))


def test_nan_names_task_document_and_layer(wikitext):
    model, tokenizer = build("dense", 0)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0] = float("nan")
    with pytest.raises(
        PointError, match=r"wikitext: the model gives NaN or Inf in document 0, first .*0\.self_attn\.o_proj"
    ):
        prepare(wikitext, tokenizer).score(model.eval(), None)


def test_a_baseline_on_other_documents_is_refused(tiny, wikitext):
    evaluation = prepare(wikitext, tiny[1])
    baseline = evaluation.score_baseline(tiny[0])
    baseline["wikitext|prompts"] = np.zeros(32, np.uint8)
    with pytest.raises(PointError, match="kept reference is of other documents"):
        evaluation.score(tiny[0], baseline)
