"""The examples before a question: equal for both models, as many as asked for, and never the answer itself."""

import json
from dataclasses import replace

import numpy as np
import pytest

from qbench.errors import RequestError
from qbench.evaluate import lmeval
from tests.evaluate.own_tasks import asked, prepare, questions, write


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "tasks"


def prompts(task):
    leaf = next(iter(task.leaves.values()))
    leaf.build_all_requests(limit=None, rank=0, world_size=1)
    return leaf.instances


def local_file(folder, count=8):
    folder.mkdir(exist_ok=True)
    path = folder.parent / "local.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions(count, 100)))
    return str(path)


def test_both_models_are_shown_the_same_shots_in_this_run_and_the_next(tiny, folder):
    """The state of the sampler goes on within an evaluation, and over the tasks of one command."""
    write(folder, "one", train=30)
    write(folder, "two", documents=5, train=30)
    model, tokenizer = tiny
    task = asked(folder, "one", "two", num_fewshot=2)
    evaluation = prepare(task, tokenizer)
    baseline = evaluation.score_baseline(model)
    scores = evaluation.score(model, baseline)  # refuses other prompts
    again = prepare(task, tokenizer).score(model, baseline)
    assert all(np.array_equal(scores[key], again[key]) for key in baseline)
    alone = prepare(asked(folder, "two", num_fewshot=2), tokenizer).score(model, None)
    assert np.array_equal(alone["two|prompts"], baseline["two|prompts"])
    _, records, _ = evaluation.records(scores, baseline, False)
    assert [r.protocol.split(":")[1] for r in records] == ["lmeval-v1.0-2shot-w512"] * 2
    assert [(m.delta, m.flip_rate) for r in records for m in r.metrics] == [(0, 0)] * 2


@pytest.mark.slow
def test_a_first_run_with_random_shots_succeeds_and_so_does_one_with_the_kept_baseline(qbench, folder):
    write(folder, "own", train=30)
    request = ("model=tiny-dense", "task=lmeval", "task.names=[own]", f"task.include_path={folder}", "task.window=512")
    first = qbench(*request, "task.num_fewshot=3", "quantizer=rtn")
    assert first.status == 0, first.stderr
    kept = qbench(*request, "task.num_fewshot=3", "quantizer=rtn", "runtime.rerun=true")
    assert kept.status == 0, kept.stderr
    assert kept.summary["own:lmeval-v1.0-3shot-w512/acc"] == first.summary["own:lmeval-v1.0-3shot-w512/acc"]


def test_shots_that_are_asked_for_are_given_where_lm_eval_keeps_zero(folder):
    write(folder, "none", train=9, num_fewshot=0)
    [task] = lmeval.load(asked(folder, "none", num_fewshot=2).read())
    assert task.num_fewshot == 2
    assert "-2shot-" in task.protocol
    assert all(sum(row["q"] in i.args[0] for row in questions(9)) == 2 for i in prompts(task))


def test_more_shots_than_there_are_documents_for_them(folder):
    write(folder, "few", train=3)
    with pytest.raises(RequestError, match=r"few has 3 documents to draw 4 shots from; lower task\.num_fewshot"):
        lmeval.load(asked(folder, "few", num_fewshot=4).read())


@pytest.mark.parametrize("sampler", ["default", "first_n"])
@pytest.mark.parametrize("default", [None, 3])
def test_shots_out_of_the_scored_file_leave_the_question_out_and_the_name_says_so(folder, sampler, default):
    write(folder, "own", train=9, num_fewshot=default, fewshot_config={"sampler": sampler})
    task = asked(folder, "own", path=local_file(folder), num_fewshot=None if default else 3)
    [task] = lmeval.load(task.read())
    assert "-3shot-leave1out-" in task.protocol
    for instance in prompts(task):
        assert instance.args[0].count(instance.doc["q"]) == 1
        assert sum(row["q"] in instance.args[0] for row in questions(8, 100)) == 4


def test_a_file_too_short_to_leave_the_question_out(folder):
    write(folder, "own", train=9, num_fewshot=3)
    with pytest.raises(RequestError, match="own has 2 documents to draw 3 shots from"):
        lmeval.load(asked(folder, "own", path=local_file(folder, 3)).read())


def test_a_scored_file_whose_shots_lm_eval_cannot_tell_from_the_question_is_refused(folder):
    """Here the shots are other dictionaries than the documents, so that comparing them leaves nothing out."""
    write(folder, "own", train=9, num_fewshot=2, fewshot_config={"process_docs": "!function marks.mark"})
    text = (folder / "own.yaml").read_text().replace("'!function marks.mark'", "!function marks.mark")
    (folder / "own.yaml").write_text(text)
    (folder / "marks.py").write_text("def mark(docs):\n    return [dict(doc, shot=True) for doc in docs]\n")
    task = asked(folder, "own", path=local_file(folder))
    with pytest.raises(RequestError, match=r"documents of task\.path, which are scored, .*ask for task\.num_fewshot=0"):
        lmeval.load(task.read())
    [found] = lmeval.load(replace(task, num_fewshot=0).read())
    assert "-0shot-" in found.protocol


def test_a_task_that_brings_its_shots_along_takes_them_beside_a_file(folder):
    write(folder, "listed", num_fewshot=2, fewshot_config={"sampler": "first_n", "samples": questions(3)})
    [task] = lmeval.load(asked(folder, "listed", path=local_file(folder)).read())
    assert "-2shot-w" in task.protocol
    assert all(i.args[0].count(i.doc["q"]) == 1 for i in prompts(task))


def test_a_task_whose_shots_may_hold_the_answer_says_so(folder):
    """Scored and shots from one validation split, which lm-eval does not compare."""
    write(folder, "loose", num_fewshot=1)
    text = (folder / "loose.yaml").read_text()
    (folder / "loose.yaml").write_text(text.replace("test_split: test", "validation_split: test\nfewshot_split: test"))
    [task] = lmeval.load(asked(folder, "loose").read())
    assert "-1shot-leaky-" in task.protocol


def test_rolling_tasks_take_no_shots(tmp_path):
    (tmp_path / "wiki.raw").write_text(" = One = \n \n It rained .\n")
    task = asked(tmp_path, "wikitext", path=str(tmp_path / "wiki.raw"), num_fewshot=2)
    with pytest.raises(RequestError, match=r"wikitext scores whole documents and takes no shots"):
        lmeval.load(replace(task, include_path=None).read())


def test_prompts_that_no_seed_repeats_are_not_blamed_on_a_kept_file(tiny, folder):
    from qbench.errors import PointError

    write(folder, "own", process_docs="!function draw.draw")
    text = (folder / "own.yaml").read_text().replace("'!function draw.draw'", "!function draw.draw")
    (folder / "own.yaml").write_text(text)
    (folder / "draw.py").write_text(
        "import itertools\n\ncount = itertools.count()\n\n\n"
        "def draw(docs):\n    n = next(count)\n    return docs.map(lambda doc: {'q': f'{n} ' + doc['q']})\n"
    )
    evaluation = prepare(asked(folder, "own"), tiny[1])
    baseline = evaluation.score_baseline(tiny[0])
    with pytest.raises(PointError, match="own: its prompts change from one evaluation to the next, whatever the seed"):
        evaluation.score(tiny[0], baseline)
