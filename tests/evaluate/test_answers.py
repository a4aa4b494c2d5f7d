"""lm-eval's tasks answered from a pass: as HFLM scores them, the same requests, and no model in the readers."""

import json
from dataclasses import replace
from itertools import repeat

import numpy as np
import pytest
import torch

from qbench.errors import PointError
from qbench.evaluate.hflm import wrap
from qbench.evaluate.protocols.lmeval import LmEval
from qbench.evaluate.score import WindowAsks
from qbench.sources.tiny import build, byte_tokenizer
from tests.evaluate.own_tasks import WORDS, asked, prepare, write

ACC = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
LAST = {"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": " {{choices[label]}}"}
LAST["metric_list"] = [
    {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
]
ARTICLES = "".join(f" = {word} = \n \n {' '.join(WORDS[: 2 + 3 * n])} . \n" for n, word in enumerate(WORDS[:4]))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    """lm-eval's evaluate lists every installed package in its result, which takes longer than all the rest."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "tasks"


@pytest.fixture(scope="module")
def two_models():
    """In fp64: perplexities of random models are so large that exp of a rounding error would be seen."""
    (one, tokenizer), (other, _) = build("dense", 0), build("dense", 1)
    return one.double().eval(), other.double().eval(), tokenizer


def walk(asks, model, original=None):
    """As a pass does it: batch after batch, row after row, padding included."""
    reader = asks.reader(original)
    with torch.inference_mode():
        for b, ids in enumerate(asks.batches):
            for row, logits in enumerate(model(torch.from_numpy(ids)).logits):
                reader.see(b, row, logits, None)
    return reader.scores()


def same(ours, theirs, tolerance=1e-6):
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name].astype(float), values.astype(float), rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("add_bos_token", [None, False])
def test_wikitext_equals_hflm(tmp_path, two_models, batch_size, add_bos_token):
    (tmp_path / "wiki.raw").write_text(ARTICLES)
    task = LmEval(names=["wikitext"], path=str(tmp_path / "wiki.raw"), window=40, add_bos_token=add_bos_token)
    evaluation = prepare(task, two_models[2], batch_size=batch_size)
    asks = evaluation.asks()
    assert len({len(ids) for ids, _ in asks.rows}) > 1  # the last windows of the documents are short
    same(walk(asks, two_models[0]), evaluation.score(two_models[0], None))


@pytest.mark.parametrize("window", [pytest.param(512, marks=pytest.mark.slow), 28])
def test_choices_and_contexts_of_uneven_length_equal_hflm(folder, two_models, window):
    """Two tasks in one walk, continuations of one token and of many, contexts that lose their beginning."""
    write(folder, "choice", documents=7, train=4, metric_list=ACC, num_fewshot=1)
    write(folder, "letters", documents=5, doc_to_choice=["a", "b", "c"], metric_list=ACC)
    uneven = '{{q * (label * 2 + 1)}}{{" so" * q|length}}' if window == 512 else "{{q}}"
    write(folder, "last", documents=6, doc_to_text=uneven, **LAST)
    evaluation = prepare(asked(folder, "choice", "letters", "last", window=window), two_models[2], batch_size=4)
    asks = evaluation.asks()
    ids = np.concatenate([batch.ravel() for batch in asks.batches])
    assert (ids == 0).sum() >= 10  # padding
    assert max(batch.shape[1] for batch in asks.batches) <= window
    assert [batch.shape[1] for batch in asks.batches] == sorted((b.shape[1] for b in asks.batches), reverse=True)
    original, variant = (walk(asks, model) for model in two_models[:2])
    for ours, model in ((original, two_models[0]), (variant, two_models[1])):
        same(ours, evaluation.score(model, None))
    if window == 28:
        assert original["choice|truncated_prompts"] > 0
    records = [evaluation.records(variant, base, False) for base in (original, evaluation.score(two_models[0], None))]
    for walked, resident in zip(*(tasks for _, tasks, _ in records), strict=True):
        for ours, theirs in zip(walked.metrics, resident.metrics, strict=True):
            assert ours.delta == pytest.approx(theirs.delta, rel=1e-4, abs=1e-6)
            assert ours.flip_rate == theirs.flip_rate
    assert evaluation.records(original, original, False)[1][0].metrics[0].delta == 0


def test_rows_are_what_hflm_runs(folder, two_models):
    """The inputs of its model, but for what it runs twice; continuations of one token share their context's row."""
    write(folder, "choice", documents=5, doc_to_choice=["a", "b", "long"])
    task = asked(folder, "choice", window=22)
    evaluation = prepare(task, two_models[2], batch_size=1)
    lm, seen = wrap(two_models[0], two_models[2], task, evaluation.runtime), []
    plain = type(lm)._model_call
    lm._model_call = lambda inputs, **more: seen.append(tuple(inputs[0].tolist())) or plain(lm, inputs, **more)
    evaluation._told(lm, None)
    rows = [tuple(ids) for ids, _ in evaluation.asks().rows]
    assert sorted(rows) == sorted(set(seen))
    assert len(rows) == 10
    assert sum(len(requests) for _, requests in evaluation.asks().rows) == 15


def test_a_bos_that_the_tokenizer_puts_and_an_empty_context_equal_hflm(folder, two_models):
    from tokenizers.processors import TemplateProcessing

    write(folder, "nothing", doc_to_text="", **LAST)
    write(folder, "choice")
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    for bos in (None, True, False):
        evaluation = prepare(asked(folder, "nothing", "choice", add_bos_token=bos), tokenizer)
        asks = evaluation.asks()
        assert {ids[0] == 256 for ids, _ in asks.rows} == ({True} if bos is not False else {True, False})
        same(walk(asks, two_models[0]), evaluation.score(two_models[0], None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_answers_equal_hflms_with_the_softmax_in_fp32(folder, dtype):
    """One document a batch: then HFLM's forward pass is the same, and in 16 bit so are the logits."""
    write(folder, "last", documents=4, **LAST)
    model, tokenizer = build("dense", 0)
    model = model.to(dtype).eval()
    task = asked(folder, "last")
    evaluation = prepare(task, tokenizer, batch_size=1)
    lm, asks = wrap(model, tokenizer, task, evaluation.runtime), evaluation.asks()
    reader = asks.reader(None)
    with torch.inference_mode():
        for b, ids in enumerate(asks.batches):
            reader.see(b, 0, model(torch.from_numpy(ids)).logits[0], None)
        requests = [(None, list(context), list(continuation)) for context, continuation in reader.found]
        theirs = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    ours = list(reader.found.values())
    np.testing.assert_allclose([value for value, _ in ours], [value for value, _ in theirs], rtol=1e-6)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_windows_are_what_lm_evals_model_layer_would_be_asked(two_models):
    """A window with its first token as context, as a request: the same rows for a pass, the same log-likelihoods."""
    from qbench.evaluate.answers import Recording, TaskAsks

    model, _, tokenizer = two_models
    windows = np.random.default_rng(0).integers(0, 256, (5, 30))
    recording = Recording(tokenizer, LmEval(names=["any"], window=29))
    recording.ask([((str(n), ""), ids[:1], ids[1:]) for n, ids in enumerate(windows.tolist())], repeat("windows\n0"))
    asks, ours = TaskAsks(recording, 2, lambda lm, _: lm.found), WindowAsks(windows, 2, False)
    assert sorted(np.concatenate(asks.batches).tolist()) == sorted(np.concatenate(ours.batches).tolist())
    nll, found = walk(ours, model)["token_nll"], walk(asks, model)
    for ids, of_window in zip(windows.tolist(), nll, strict=True):
        assert found[(ids[0],), tuple(ids[1:])][0] == pytest.approx(-of_window.sum(), rel=1e-12)


def test_a_task_that_generates_needs_the_model(folder, two_models):
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    write(folder, "says", output_type="generate_until", doc_to_choice=None, doc_to_target="yes", metric_list=exact)
    write(folder, "choice")
    assert prepare(asked(folder, "choice", "says"), two_models[2]).asks() is None


def test_nan_names_task_and_document(folder, two_models):
    write(folder, "choice", documents=5)
    asks = prepare(asked(folder, "choice"), two_models[2], batch_size=2).asks()
    reader = asks.reader(None)
    good = torch.zeros(asks.batches[0].shape[1], 258)
    reader.see(0, 0, good, None)
    document = asks.recording.first[asks.rows[1][1][0]].split("\n")[1]
    with pytest.raises(PointError, match=rf"^choice: the model gives NaN or Inf in document {document}$"):
        reader.see(0, 1, good * torch.nan, None)


def test_an_answer_longer_than_the_window_is_said_before_the_pass(folder, two_models):
    write(folder, "choice")
    with pytest.raises(PointError, match=r"an answer has \d+ tokens, more than task\.window=4"):
        prepare(asked(folder, "choice", window=4), two_models[2]).asks()


def test_prompts_that_change_are_refused(folder, two_models):
    """Documents in another order of words each time they are asked for: seeds do not reach a generator of its own."""
    write(folder, "choice", documents=3)
    evaluation = prepare(asked(folder, "choice"), two_models[2])
    asks = evaluation.asks()
    (leaf,) = evaluation.tasks[0].leaves.values()
    plain = leaf.doc_to_text
    leaf.doc_to_text = lambda doc, *more: plain(doc, *more) + " now"
    with pytest.raises(PointError, match="choice: its prompts change from one evaluation to the next"):
        walk(asks, two_models[0])


def test_a_kept_original_of_other_documents_is_refused(folder, two_models):
    write(folder, "choice", documents=3)
    evaluation = prepare(asked(folder, "choice"), two_models[2])
    original = walk(evaluation.asks(), two_models[0])
    kept = original | {"choice|prompts": np.zeros(32, np.uint8)}
    with pytest.raises(PointError, match="choice: the kept reference is of other documents"):
        walk(evaluation.asks(), two_models[1], kept)


def test_a_limit_holds(folder, two_models):
    write(folder, "choice", documents=6)
    evaluation = prepare(replace(asked(folder, "choice"), limit=2), two_models[2])
    assert {about.split("\n")[1] for about in evaluation.asks().recording.first.values()} == {"0", "1"}
    assert json.dumps(evaluation.identity)


@pytest.mark.slow
def test_points_of_lm_evals_tasks_share_a_pass(folder, tmp_path, monkeypatch):
    """Three points in a pass are each alone, to the bit, and what HFLM gives for the model as a whole."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from qbench.config import register
    from qbench.request.prepare import prepare as point
    from qbench.run import run_pass
    from qbench.run.whole import whole

    write(folder, "choice", documents=7, train=4, metric_list=ACC, num_fewshot=1)
    write(folder, "letters", documents=5, doc_to_choice=["a", "b", "c"], metric_list=ACC)
    register()

    def asked_for(outputs, *words):
        words = ["model=tiny-moe", "task=lmeval", "task.names=[choice,letters]", "runtime.batch_size=3", *words]
        words.append(f"task.include_path={folder}")
        with initialize_config_module("qbench.conf", version_base="1.3"):
            config = OmegaConf.to_object(compose("config", words))
        return point(replace(config, outputs=str(tmp_path / outputs)), words)

    def numbers(result):
        assert result.status == "ok", result.error
        return [(record.protocol, metric) for record in result.tasks for metric in record.metrics]

    methods = (["quantizer=none"], ["quantizer=rtn", "quantizer.nbits=2"], ["quantizer=hqq", "quantizer.nbits=3"])
    together = [result for _, result in run_pass([asked_for("together", *words) for words in methods])]
    for n, (words, result) in enumerate(zip(methods, together, strict=True)):
        [(_, alone)] = run_pass([asked_for(f"alone{n}", *words)])
        assert numbers(alone) == numbers(result)
        assert alone.files() == result.files()  # named by their content
        resident = whole(asked_for(f"whole{n}", *words)).result
        for (_, ours), (_, theirs) in zip(numbers(result), numbers(resident), strict=True):
            assert (ours.value, ours.baseline) == (theirs.value, theirs.baseline)
    assert {metric.delta for _, metric in numbers(together[0])} == {0}
