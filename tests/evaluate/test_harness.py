"""What a record says of lm-eval's tasks: differences of the numbers shown, every task asked for, nothing cut unsaid."""

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from qbench.errors import PointError, RequestError
from qbench.evaluate import lmeval
from qbench.evaluate.hflm import wrap
from qbench.record.result import Result
from qbench.report import entries
from qbench.report.noise import difference
from qbench.significance import detectable_share, mcnemar, student
from qbench.sources.tiny import build, byte_tokenizer
from tests.evaluate.own_tasks import asked, group, prepare, questions, write
from tests.report.examples import point

F1 = {"metric": "f1", "aggregation": "f1", "higher_is_better": True}
MCC = {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}
ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
MEDIAN = {"metric": "acc", "aggregation": "median", "higher_is_better": True}
GENERATES = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "yes"}
GENERATES["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]


@pytest.fixture(scope="module")
def two_models():
    (one, tokenizer), (other, _) = build("dense", 0), build("dense", 1)
    return one.eval(), other.eval(), tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "tasks"


@pytest.fixture
def only_own(monkeypatch):
    """lm-eval without its 14,000 tasks, which take half a minute to list."""
    from lm_eval.tasks import TaskManager

    usual = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **k: usual(self, **k | {"include_defaults": False}))


def measured(task, two_models, **runtime):
    base, other, tokenizer = two_models
    evaluation = prepare(task, tokenizer, **runtime)
    baseline = evaluation.score_baseline(base)
    return evaluation.records(evaluation.score(other, baseline), baseline, False)


@pytest.mark.slow
def test_every_difference_is_that_of_the_numbers_shown(folder, two_models):
    """Accuracy, F1, Matthews, a perplexity over documents, a median; groups of 14 and 3 documents of both weights."""
    write(folder, "big", documents=14, metric_list=[ACC, F1, MCC])
    write(folder, "small", documents=3, metric_list=[ACC, F1])
    last = {"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": "{{choices[label]}}"}
    write(folder, "last", documents=9, metric_list=[PERPLEXITY, ACC], **last)
    write(folder, "middle", documents=9, metric_list=[MEDIAN])
    group(folder, "pooled", ["big", "small"], by_size=True)
    group(folder, "macro", ["big", "small"], by_size=False)
    names = ("big", "last", "middle", "pooled", "macro")
    _, records, files = measured(asked(folder, *names), two_models, batch_size=4)
    by_name = {(r.task, m.name): (r, m) for r in records for m in r.metrics}
    assert by_name.keys() == {
        *(("big", m) for m in ("acc", "f1", "mcc")),
        *(("last", m) for m in ("perplexity", "acc")),
        ("middle", "acc"),
        ("pooled", "acc"),
        ("macro", "acc"),
    }
    for (task, name), (record, metric) in by_name.items():
        assert metric.value - metric.baseline == pytest.approx(metric.delta, rel=1e-12, abs=1e-12), (task, name)
        kept = files[record.scores_file]
        if task == "middle":  # whose jackknife says nothing
            assert (metric.delta_low, f"quantized/middle/{name},none" in kept) == (None, False)
            continue
        ours, theirs = (kept[f"{whose}/{task}/{name},none"] for whose in ("quantized", "baseline"))
        again = difference(ours, theirs, "mean")
        assert again.value == pytest.approx(metric.delta, rel=1e-9, abs=1e-12), (task, name)
        assert metric.delta_low <= metric.delta <= metric.delta_high
        if (task, name) in (("big", "acc"), ("last", "acc"), ("pooled", "acc")):  # Bonett and Price's, and McNemar's
            gained, lost = int((ours > theirs).sum()), int((ours < theirs).sum())
            assert metric.p_value == pytest.approx(mcnemar(gained, lost))
            assert metric.detectable == detectable_share((gained + lost) / len(ours), len(ours))
            assert (metric.verdict == "not distinguishable") == (metric.p_value >= 0.05)
        else:
            assert metric.p_value == pytest.approx(student(again.value, again.error, again.dof), abs=1e-12)
            assert (again.low, again.high) == pytest.approx((metric.delta_low, metric.delta_high)), (task, name)
    macro = by_name["macro", "acc"][1]
    parts = [files[by_name["macro", "acc"][0].scores_file][f"quantized/{leaf}/acc,none"] for leaf in ("big", "small")]
    assert macro.value == pytest.approx((parts[0].mean() + parts[1].mean()) / 2)
    assert macro.delta != pytest.approx(by_name["pooled", "acc"][1].delta)
    assert by_name["big", "mcc"][1].flip_rate is None
    assert macro.flip_rate == by_name["pooled", "acc"][1].flip_rate > 0


def test_a_perplexity_that_rises_is_worse(folder, two_models):
    last = {"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": " {{choices[label]}}"}
    write(folder, "last", documents=12, metric_list=[PERPLEXITY], **last)
    evaluation = prepare(asked(folder, "last"), two_models[2])
    good, bad = evaluation.score_baseline(two_models[0]), evaluation.score(two_models[0], None)
    bad["last|number|perplexity,none"] = good["last|number|perplexity,none"] * 2
    bad["last|last|number|perplexity,none"] = good["last|last|number|perplexity,none"] * 2
    bad["last|last|contributions|perplexity,none"] = (
        good["last|last|contributions|perplexity,none"] + 1e3 + np.sqrt(np.arange(12))
    )
    for ours, theirs, expected in ((bad, good, "worse"), (good, bad, "better")):
        [metric] = evaluation.records(ours, theirs, False)[1][0].metrics
        assert (metric.higher_is_better, metric.verdict) == (False, expected)


def test_a_board_reads_the_number_and_its_spread(folder, two_models, tmp_path):
    """The difference of two recorded points is the difference of the numbers that they show."""
    write(folder, "big", documents=14)
    write(folder, "small", documents=3)
    group(folder, "macro", ["big", "small"], by_size=False)
    _, [record], files = measured(asked(folder, "macro"), two_models)
    result, _ = point("rtn")
    place = tmp_path / "out" / "results" / result.run_id
    place.mkdir(parents=True)
    save_file(files[record.scores_file], place / record.scores_file)
    (place / "result.json").write_text(replace(result, evaluation=[], tasks=[record]).to_json())
    [entry] = entries.read(tmp_path / "out").entries
    [score] = entry.scores
    number = score.number
    assert score.windows.mean() == pytest.approx(score.value, rel=1e-12)
    change = difference(score.windows, files[record.scores_file]["baseline/macro/acc,none"], number.reading)
    assert (change.value, change.low, change.high) == pytest.approx((number.delta, number.delta_low, number.delta_high))


def test_a_tag_and_a_group_without_a_number_give_a_record_for_each_task(folder, two_models, only_own):
    write(folder, "first", documents=3, tag="mine")
    write(folder, "second", documents=4, tag="mine")
    group(folder, "inner", ["first", "second"], by_size=True)
    group(folder, "outer", ["inner", "second"])
    _, records, _ = measured(asked(folder, "mine"), two_models)
    assert [(r.task, r.documents, [m.name for m in r.metrics]) for r in records] == [
        ("first", 3, ["acc"]),
        ("second", 4, ["acc"]),
    ]
    _, records, _ = measured(asked(folder, "outer"), two_models)
    assert [(r.task, r.documents) for r in records] == [("inner", 7), ("second", 4)]
    with pytest.raises(RequestError, match=r"task\.names=mine,first holds first twice"):
        prepare(asked(folder, "mine", "first"), two_models[2])


def test_a_group_in_a_group_is_one_number_over_all_tasks(folder, two_models):
    write(folder, "first", documents=3)
    write(folder, "second", documents=4)
    write(folder, "third", documents=6)
    group(folder, "inner", ["first", "second"], by_size=True)
    group(folder, "outer", ["inner", "third"], by_size=False)
    _, [record], files = measured(asked(folder, "outer"), two_models)
    means = [files[record.scores_file][f"quantized/{leaf}/acc,none"].mean() for leaf in ("first", "second", "third")]
    assert record.metrics[0].value == pytest.approx(np.mean(means))
    assert record.metrics[0].delta == record.metrics[0].value - record.metrics[0].baseline


def test_tasks_with_different_shots_name_them_all(folder, two_models):
    write(folder, "first", train=9, num_fewshot=2)
    write(folder, "second")
    group(folder, "both", ["first", "second"], by_size=True)
    [task] = lmeval.load(asked(folder, "both").read())
    assert (task.num_fewshot, task.protocol) == (None, "both:lmeval-v1.0-2shot+0shot-w512")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"metric_list": []}, "odd defines no metric"),
        ({"process_docs": "!function none.none"}, "a task of it has no documents"),
        ({**GENERATES, "generation_kwargs": {"until": ["."], "max_gen_toks": 512}}, "odd generates up to 512 tokens"),
        ({"unsafe_code": True}, "marks odd as unsafe"),
    ],
)
def test_tasks_that_cannot_give_a_number_are_refused_before_anything_runs(folder, two_models, settings, sentence):
    write(folder, "odd", **settings)
    text = (folder / "odd.yaml").read_text().replace("'!function none.none'", "!function none.none")
    (folder / "odd.yaml").write_text(text)
    (folder / "none.py").write_text("def none(docs):\n    return docs.select([])\n")
    with pytest.raises(RequestError, match=sentence):
        prepare(asked(folder, "odd"), two_models[2])


def test_a_limit_beyond_the_documents_takes_them_all(folder, two_models):
    write(folder, "few", documents=3)
    _, [record], _ = measured(asked(folder, "few", limit=50), two_models)
    assert record.documents == 3


def test_a_metric_that_is_nan_is_left_out_and_said(folder, two_models, caplog):
    write(folder, "odd", metric_list=[ACC, {"metric": "gap", "aggregation": "mean", "higher_is_better": True}])
    text = (folder / "odd.yaml").read_text() + "process_results: !function gap.gap\n"
    (folder / "odd.yaml").write_text(text)
    (folder / "gap.py").write_text("def gap(doc, results):\n    return {'acc': 1.0, 'gap': float('nan')}\n")
    with caplog.at_level(logging.WARNING):
        _, [record], _ = measured(asked(folder, "odd"), two_models)
    assert ([m.name for m in record.metrics], record.undefined_metrics) == (["acc"], ["gap"])
    assert "left out, being NaN or infinite: gap" in caplog.text
    result, _ = point("rtn")
    again = Result.from_json(replace(result, evaluation=[], tasks=[record]).to_json())
    assert again.tasks == [record]


def test_a_perplexity_beyond_all_numbers_is_a_sentence(folder, two_models):
    last = {"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": "{{q * 400}}"}
    write(folder, "last", documents=1, metric_list=[PERPLEXITY], **last)
    with pytest.raises(PointError, match="last: a perplexity is too large"):
        prepare(asked(folder, "last", window=8192), two_models[2]).score(two_models[0], None)


def test_prompts_that_lose_their_beginning_are_counted_and_warned_of_once(folder, two_models, caplog):
    """Of 8 questions those longer than the window; lm-eval scores a prompt and its answer less its last token."""
    write(folder, "choice", num_fewshot=2, train=9)
    _, [whole], _ = measured(asked(folder, "choice", window=512), two_models)
    assert (whole.truncated_prompts, caplog.text) == (0, "")
    leaf = lmeval.load(asked(folder, "choice").read())[0].leaves["choice"]
    leaf.build_all_requests(limit=None, rank=0, world_size=1)
    tokens = np.array([len("".join(i.args)) for i in leaf.instances])  # one of each byte
    window = int(np.median(tokens))
    evaluation = prepare(asked(folder, "choice", window=window), two_models[2])
    baseline = evaluation.score_baseline(two_models[0])
    scores = evaluation.score(two_models[1], baseline)
    with caplog.at_level(logging.WARNING):
        _, [record], _ = evaluation.records(scores, baseline, False)
    too_long = {i.doc_id for i, n in zip(leaf.instances, tokens, strict=True) if n > window + 1}
    assert 0 < record.truncated_prompts == len(too_long) < 8
    said = [r.getMessage() for r in caplog.records if "truncated" in r.getMessage()]
    assert said == [
        f"choice:lmeval-v1.0-2shot-w{window}: the prompts of {len(too_long)} of 8 documents are longer than "
        f"task.window={window} and were truncated from the left"
    ]


def test_generating_tasks_count_the_prompts_that_were_cut(folder, two_models):
    write(folder, "says", generation_kwargs={"until": ["."], "max_gen_toks": 4}, **GENERATES)
    tokens = np.array([len(row["q"]) for row in questions(8, 100)])  # one of each byte
    window = int(np.median(tokens)) + 4
    evaluation = prepare(asked(folder, "says", window=window), two_models[2], batch_size=3)
    scores = evaluation.score(two_models[0], None)
    _, [record], _ = evaluation.records(scores, None, False)
    expected = (tokens > window - 4).sum()
    assert 0 < record.truncated_prompts == expected < 8


def test_an_answer_longer_than_the_window_is_a_sentence(folder, two_models):
    write(folder, "choice")
    with pytest.raises(PointError, match=r"an answer has \d+ tokens, more than task\.window=4"):
        prepare(asked(folder, "choice", window=4), two_models[2]).score(two_models[0], None)


@pytest.mark.parametrize(
    ("special", "sentence"),
    [
        ({"eos_token": "</s>"}, "tokenizer has no BOS"),
        ({"bos_token": "<s>", "eos_token": "</s>"}, r"tokenizer puts no BOS \(<s>\) before a text"),
        ({}, "BOS or EOS token, .* tokenizer has neither"),
    ],
)
def test_a_bos_that_is_not_there_is_refused(folder, special, sentence):
    from transformers import PreTrainedTokenizerFast

    write(folder, "choice")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()._tokenizer, **special)
    with pytest.raises(RequestError, match=sentence):
        prepare(asked(folder, "choice", add_bos_token=True), tokenizer)


def test_a_bos_that_is_asked_for_is_there(folder, two_models):
    from tokenizers.processors import TemplateProcessing

    write(folder, "choice")
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    task = asked(folder, "choice", add_bos_token=True)
    evaluation = prepare(task, tokenizer)
    _, [record], _ = evaluation.records(evaluation.score(two_models[0], None), None, False)
    assert record.protocol.endswith("-bos")
    assert "before a text: BOS" in record.bos_policy
    assert wrap(two_models[0], tokenizer, task, evaluation.runtime).tok_encode("a")[0] == 256


def test_the_numbers_of_lm_eval_are_untouched_by_counting(folder, two_models):
    """Prompts cut on the left, scored by lm-eval's own layer and by ours."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    write(folder, "says", generation_kwargs={"until": ["."], "max_gen_toks": 4}, **GENERATES)
    write(folder, "choice")
    task = asked(folder, "says", "choice", window=20)
    evaluation = prepare(task, two_models[2], batch_size=3)
    plain = HFLM(pretrained=two_models[0], tokenizer=two_models[2], max_length=20, batch_size=3)
    for loaded in evaluation.tasks:
        samples = []
        for lm in (plain, wrap(two_models[0], two_models[2], task, evaluation.runtime)):
            found = evaluate(lm, loaded.loaded, bootstrap_iters=0)["samples"][loaded.name]
            samples.append(json.dumps([sample["resps"] for sample in found]))
        assert samples[0] == samples[1]
        assert not math.isnan(len(samples[0]))
