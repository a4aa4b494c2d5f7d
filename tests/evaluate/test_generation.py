"""Answers that models write: lm-eval's own prompts and texts, flips, samples, and what is refused at once."""

import copy
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from qbench.errors import RequestError
from qbench.evaluate import harness, lmeval
from qbench.evaluate.documents import TaskScores, of_bytes
from qbench.layers.linear import QuantLinear, held_dense
from qbench.model.linears import find_linears
from qbench.passes.quantize import quantize_linears
from qbench.plugins.rtn import RTN
from qbench.record.store import Store
from qbench.report import board, columns, entries, html, table
from qbench.run import run_pass
from qbench.run.whole import whole
from qbench.significance import mcnemar
from qbench.sources.tiny import build
from tests.evaluate.own_tasks import asked, prepare, write
from tests.report.examples import point

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
CHAT = {"apply_chat_template": True, "window": 1024}
SAMPLED = {"gen_kwargs": {"do_sample": True, "temperature": 1.0}, "samples": 4}


def gsm8k_shaped(folder, answers=None):
    """gsm8k's YAML on eight questions of our own, with shots of another split; `answers` are the right ones."""
    folder.mkdir(exist_ok=True)
    shots = [{"question": f"{n} and 1?", "answer": f"So {n + 1}.\n#### {n + 1}"} for n in range(9)]
    documents = [{"question": f"{n} plus {n}?", "answer": f"#### {2 * n}"} for n in range(8)]
    for document, answer in zip(documents, answers or [], strict=False):
        document["answer"] = f"#### {answer}"
    files = {"train": shots, "test": documents}
    for split, rows in files.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "school",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(folder / f"{split}.jsonl") for split in files}},
        "output_type": "generate_until",
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "num_fewshot": 2,
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": ["#### "]}
        ],
        "generation_kwargs": {"until": ["Question:", "\n"], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0},
        "filter_list": [{"name": "first", "filter": [{"function": "regex", "regex_pattern": "([ -~])"}, TAKE]}],
        "metadata": {"version": 3.0},
    }
    (folder / "school.yaml").write_text(yaml.safe_dump(task))


TAKE = {"function": "take_first"}


@pytest.fixture(scope="module")
def models():
    model, tokenizer = build("dense", 0)
    tokenizer.chat_template = TEMPLATE
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.3 * weight.std(correction=0))
    return model.eval(), other.eval(), tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "tasks"


def lm_eval_itself(model, tokenizer, folder, **settings):
    """The samples of lm-eval's own entry point with its own model layer."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=1024),
        tasks=["school"],
        task_manager=TaskManager(include_defaults=False, include_path=str(folder)),
        bootstrap_iters=0,
        **settings,
    )
    return found["results"]["school"], found["samples"]["school"]


@pytest.mark.parametrize("multiturn", [True, False])
def test_prompts_and_answers_are_lm_evals_own(folder, models, multiturn, monkeypatch):
    gsm8k_shaped(folder)
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": multiturn, "system_instruction": "Be short."}
    seen, leaf_scores = [], harness._leaf
    monkeypatch.setattr(harness, "_leaf", lambda *a: seen.append(a[1]) or leaf_scores(*a))
    evaluation = prepare(asked(folder, "school", window=1024, **chat), models[2])
    scores = evaluation.score_baseline(models[0])
    _, [record], files = evaluation.records(scores, None, False)
    theirs, samples = lm_eval_itself(models[0], models[2], folder, **chat)
    [ours] = seen
    assert [s["arguments"][0][0] for s in ours] == [s["arguments"][0][0] for s in samples]
    assert [s["resps"] for s in ours] == [s["resps"] for s in samples]
    prompt = ours[0]["arguments"][0][0]
    assert prompt.startswith("<system>Be short.</s><user>Question:")
    assert prompt.count("<assistant>") == (3 if multiturn else 1)
    assert of_bytes(files[record.scores_file]["quantized/school/answers"]) == [s["resps"] for s in samples]
    assert len({s["resps"][0][0] for s in samples}) > 1
    [metric] = record.metrics
    assert metric.value == theirs["exact_match,first"]
    turn = "chat" if multiturn else "chat-oneturn"
    assert record.protocol == f"school:lmeval-v3.0-2shot-w1024-{turn}-system{_sha('Be short.')}"
    assert record.chat.multiturn is multiturn
    assert record.system_instruction == "Be short."
    assert record.decoding == {
        "batch_size": 8,
        "do_sample": False,
        "max_gen_toks": 6,
        "model": {},
        "seeds": [],
        "temperature": 0.0,
        "until": ["Question:", "\n"],
    }


def _sha(text):
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:8]


def test_flips_and_mcnemar_are_counted_from_the_answers_and_stand_on_the_board(folder, models, tmp_path):
    gsm8k_shaped(folder)
    task = asked(folder, "school", **CHAT)
    first = prepare(task, models[2])
    own = TaskScores.of(first.score_baseline(models[0]), "school", ["school"]).leaves["school"]
    said = [_first(answer[0][0]) for answer in own.answers]
    gsm8k_shaped(folder, answers=[letter if n % 4 else "wrong" for n, letter in enumerate(said)])
    evaluation = prepare(task, models[2])
    baseline = evaluation.score_baseline(models[0])
    scores = evaluation.score(models[1], baseline)
    _, [record], files = evaluation.records(scores, baseline, False)
    metric, same = record.metrics
    kept = files[record.scores_file]
    right, before = (kept[f"{whose}/school/exact_match,first"] for whose in ("quantized", "baseline"))
    targets = [letter if n % 4 else "wrong" for n, letter in enumerate(said)]
    answers = of_bytes(kept["quantized/school/answers"])
    assert right.tolist() == [float(_first(a[0][0]) == t) for a, t in zip(answers, targets, strict=True)]
    gained, lost = int((right > before).sum()), int((right < before).sum())
    assert metric.baseline == before.mean() == 0.75
    assert (metric.turned_right, metric.turned_wrong) == (gained, lost)
    assert lost > 0
    assert metric.p_value == mcnemar(gained, lost)
    assert metric.flip_rate == (gained + lost) / 8
    kept_answers = np.array([a == b for a, b in zip(answers, of_bytes(kept["baseline/school/answers"]), strict=True)])
    assert (same.name, same.value, same.baseline) == ("same_answer", kept_answers.mean(), 1)
    assert same.turned_wrong == (~kept_answers).sum()
    assert kept["quantized/school/same_answer,none"].tolist() == kept_answers.tolist()
    result, _ = point("rtn")
    place = tmp_path / "out" / "results" / result.run_id
    place.mkdir(parents=True)
    save_file(kept, place / record.scores_file)
    (place / "result.json").write_text(replace(result, evaluation=[], tasks=[record]).to_json())
    recorded = entries.read(tmp_path / "out").entries
    section, answers_kept = board.sections(recorded, *columns.order("quality"))
    assert (section.metric, answers_kept.metric) == ("exact_match,first", "same_answer")
    written = columns.table(section)
    for style in ("md", "json"):
        text = table.write([written], style)
        assert "Answers are generated greedily" in text
        assert "at most 6 tokens" in text
    row = json.loads(table.write([written], "json"))[0]["rows"][0]
    assert (row["turned_right"], row["turned_wrong"]) == (gained, lost)
    shown = dict(zip(written.titles, written.cells[0], strict=True))
    assert shown["McNemar p"] == f"{metric.p_value:.3f}"
    assert float(shown["flipped, %"]) == pytest.approx(100 * metric.flip_rate)
    page = html.page([section], [], [], [])
    assert "turned wrong" in page
    assert "chat template" in page


def _first(text):
    found = re.search("([ -~])", text)
    return found.group(1) if found else "[invalid]"


def test_samples_have_seeds_a_mean_and_a_spread(folder, models):
    gsm8k_shaped(folder, answers="aeioust ")
    task = asked(folder, "school", **CHAT, **SAMPLED)
    evaluation = prepare(task, models[2])
    baseline = evaluation.score_baseline(models[0])
    own = TaskScores.of(baseline, "school", ["school"])
    texts = np.array([answers[0] for answers in own.leaves["school"].answers])
    assert texts.shape == (8, 4)
    assert all(len(set(row)) > 1 for row in texts)
    alone = [prepare(replace(task, samples=1, seed=1234 + n), models[2]).score_baseline(models[0]) for n in (0, 2)]
    for column, one in zip((0, 2), alone, strict=True):
        answers = TaskScores.of(one, "school", ["school"]).leaves["school"].answers
        assert [a[0][0] for a in answers] == texts[:, column].tolist()
    again = evaluation.score(models[0], baseline)
    _, [same], _ = evaluation.records(again, baseline, False)
    [metric] = same.metrics
    assert (metric.delta, metric.flip_rate) == (0, 0)  # the same seeds, the same answers
    scores = evaluation.score(models[1], baseline)
    _, [record], files = evaluation.records(scores, baseline, False)
    [metric] = record.metrics
    assert record.protocol.endswith("-chat-sampled-t1-4samples")
    assert record.decoding["seeds"] == [1234, 1235, 1236, 1237]
    assert metric.value == pytest.approx(np.mean(metric.samples))
    assert metric.sample_spread == pytest.approx(np.std(metric.samples, ddof=1))
    assert len(metric.samples) == 4
    assert metric.turned_right is None
    right = own.sampled("exact_match,first")
    pairs = [(right[:, i] != right[:, j]).mean() for i in range(4) for j in range(4) if i != j]
    assert metric.flip_rate_alone == pytest.approx(np.mean(pairs))
    values = files[record.scores_file]["quantized/school/exact_match,first"]
    assert values.mean() == pytest.approx(metric.value)


def test_held_dense_weights_give_the_same_numbers_and_are_let_go(models):
    model = copy.deepcopy(models[0])
    layers = find_linears(model).layers
    for name, (module, _) in quantize_linears(layers, RTN(nbits=4, group_size=32)).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    ids = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        expected = model(ids).logits
        with held_dense(model):
            assert torch.equal(model(ids).logits, expected)
            linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
            assert all(linear.dense for linear in linears)
    assert linears
    assert all(linear.dense is None for linear in linears)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"fewshot_as_multiturn": True}, "task.fewshot_as_multiturn=true is for a chat; add"),
        ({"chat_template_args": {"enable_thinking": False}}, "task.chat_template_args are the template's; add"),
        ({"samples": 0}, "task.samples must be at least 1, got 0"),
        ({"generate_batch": 0}, "task.generate_batch must be at least 1, got 0"),
        ({"samples": 3}, "school is greedy, so that all samples would be one; add"),
        ({"gen_kwargs": {"temperature": 0.7}}, "school decodes greedily, where a temperature means nothing"),
        ({"gen_kwargs": {"do_sample": True}}, "school samples at temperature 0; set task.gen_kwargs.temperature"),
        ({"gen_kwargs": {"do_sample": "yes"}}, "task.gen_kwargs.do_sample must be true or false, got 'yes'"),
        ({"gen_kwargs": {"max_gen_toks": 0}}, "task.gen_kwargs.max_gen_toks must be a whole number of at least 1"),
        ({"gen_kwargs": {"tempratur": 1}}, "did you mean 'task.gen_kwargs.temperature'"),
        ({"gen_kwargs": {"max_gen_toks": 600}}, "school generates up to 600 tokens, .* task.window=512"),
        ({"apply_chat_template": True, "system_instruction": "Hi"}, "this chat template takes no system message"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(folder, models, settings, sentence):
    gsm8k_shaped(folder)
    tokenizer = copy.deepcopy(models[2])
    tokenizer.chat_template = NO_SYSTEM
    with pytest.raises(RequestError, match=sentence):
        prepare(asked(folder, "school", **settings), tokenizer)


def test_decoding_is_for_tasks_that_generate(folder, models):
    write(folder, "choice")
    with pytest.raises(RequestError, match=r"choice generates nothing; leave out task\.gen_kwargs"):
        prepare(asked(folder, "choice", gen_kwargs={"max_gen_toks": 4}), models[2])


def test_a_model_without_a_chat_template_is_refused_before_its_weights_are_read(prepared, monkeypatch):
    point = prepared("model=tiny-dense task=questions quantizer=rtn")
    monkeypatch.setattr(type(point.model), "load", None)
    with pytest.raises(RequestError, match="this model's tokenizer has no chat template"):
        next(iter(run_pass([point])))


def test_a_quantized_variant_answers_as_its_packed_model_does(prepared, tmp_path):
    """Through the pass: packed block by block, assembled, and asked as lm-eval's own layer asks the whole model."""
    folder = tmp_path / "tasks"
    gsm8k_shaped(folder)
    task = f"task=lmeval task.names=[school] task.window=1024 task.include_path={folder}"
    asked_for = [prepared(f"model=tiny-dense {task} quantizer={name}") for name in ("none", "sinq")]
    results = {one.run_id: result for one, result in run_pass(asked_for)}
    for one in asked_for:
        [record] = results[one.run_id].tasks
        kept = load_file(one.store.results / one.run_id / record.scores_file)
        answers = {whose: of_bytes(kept[f"{whose}/school/answers"]) for whose in ("quantized", "baseline")}
        if one is asked_for[0]:
            assert answers["quantized"] == answers["baseline"]
            assert (record.metrics[0].delta, record.metrics[0].flip_rate, record.metrics[0].p_value) == (0, 0, 1)
            continue
        assert answers["quantized"] != answers["baseline"]
        alone = whole(replace(one, store=Store(tmp_path / "alone")))
        assert alone.result.status == "ok", alone.result.error
        assert of_bytes(alone.files[record.scores_file]["quantized/school/answers"]) == answers["quantized"]


def test_choices_go_through_the_chat_template_in_a_pass_as_in_lm_eval(folder, models):
    """Likelihoods behind the template: what a pass answers, and what lm-eval's own layer does."""
    write(folder, "choice", train=4)
    task = asked(folder, "choice", num_fewshot=2, **CHAT)
    evaluation = prepare(task, models[2])
    asks = evaluation.asks()
    assert all(text.startswith("<user>") and text.endswith("<assistant>") for text, _ in asks.recording.pairs)
    reader = asks.reader(None)
    with torch.inference_mode():
        for b, rows in enumerate(asks.batches):
            for row, logits in enumerate(models[0](torch.from_numpy(rows)).logits):
                reader.see(b, row, logits, None)
    passed, whole = reader.scores(), evaluation.score_baseline(models[0])
    assert passed.keys() == whole.keys()
    for key, values in whole.items():
        np.testing.assert_allclose(passed[key], values, rtol=1e-6, atol=1e-6)


def test_the_embedded_questions_are_the_published_ones_and_can_be_answered():
    folder = Path(lmeval.EMBEDDED)
    lines = (folder / "SOURCES.txt").read_text().splitlines()
    listed = dict(reversed(line.split("  ")) for line in lines if "  " in line)
    for name in ("arithmetic.jsonl", "extraction.jsonl"):
        content = (folder / name).read_bytes()
        assert listed[name] == hashlib.sha256(content).hexdigest()
        documents = [json.loads(line) for line in content.decode().splitlines()]
        assert len(documents) == 60 == len({json.dumps(d) for d in documents})
        for document in documents:
            if "passage" in document:
                said = document["passage"].lower()
                assert any(a.lower() in said for a in document["answers"])
            else:
                assert document["answer"].isdigit()
    assert lmeval.embedded(["piqa"]) == []
    assert len(lmeval.embedded(["questions"])) == 7
