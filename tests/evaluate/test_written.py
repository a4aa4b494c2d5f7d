"""`task=self`: the original writes once, what it wrote is the text, and the answers alone are scored."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qbench.config import RuntimeConfig
from qbench.errors import RequestError
from qbench.evaluate import written
from qbench.evaluate.protocols.written import SelfWritten
from qbench.evaluate.written import Sampling, Written
from qbench.record.store import Store
from tests.conftest import refused

CPU = RuntimeConfig(device="cpu")
SAMPLING = Sampling(answers=3, tokens=12, temperature=1.0, top_p=1.0, seed=0)


@pytest.fixture(scope="module")
def wrote(tiny):
    chat, prompts, answers = written.sample(*tiny, SAMPLING)
    return Written(SAMPLING, chat, prompts, answers, "test")


def evaluation(source, tokenizer, **changes):
    task = SelfWritten(**{"answers": 3, "tokens": 12} | changes)
    task.check(CPU)
    task.check_length(source)
    return task.prepare(source, tokenizer, CPU)


def test_what_is_written_is_the_models_own_and_the_seeds(tiny, wrote):
    model, tokenizer = tiny
    assert wrote.prompts == [tokenizer(f"{prompt}\n\n")["input_ids"] for prompt in written.prompts()[:3]]
    assert [len(answer) for answer in wrote.answers] == [12, 12, 12]
    assert not {256, 257} & {i for answer in wrote.answers for i in answer[:-1]} & {tokenizer.eos_token_id}
    assert written.sample(model, tokenizer, SAMPLING)[2] == wrote.answers
    other = Sampling(3, 12, 1.0, 1.0, seed=1)
    assert written.sample(model, tokenizer, other)[2] != wrote.answers
    greedy = written.sample(model, tokenizer, Sampling(1, 12, 1e-6, 1.0, 0))[2][0]
    ids = list(wrote.prompts[0])
    with torch.inference_mode():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert greedy == ids[len(wrote.prompts[0]) :]


def test_writing_leaves_the_random_numbers_of_others_alone(tiny):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    written.sample(*tiny, SAMPLING)
    assert torch.equal(torch.rand(3), expected)


def test_the_answers_alone_are_scored(tiny, wrote):
    """Every answer token's NLL is that of the model after the prompt and what of the answer stands before it."""
    model, tokenizer = tiny
    scores = evaluation(wrote, tokenizer).score_baseline(model)
    assert scores["token_nll"].shape == (3, 12)
    for n, (prompt, answer) in enumerate(zip(wrote.prompts, wrote.answers, strict=True)):
        with torch.inference_mode():
            log = model(torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
        expected = [-float(log[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
        assert np.allclose(scores["token_nll"][n], expected, atol=1e-4)


def test_the_record_is_of_what_was_written(tiny, wrote):
    model, tokenizer = tiny
    found = evaluation(wrote, tokenizer)
    scores = found.score_baseline(model)
    [record], _, _ = found.records(found.score(model, scores), scores, False)
    assert record.protocol == "self:plain-3x12-t1-seed0"
    assert record.text_sha256 == wrote.sha256
    assert (record.windows, record.scored_tokens, record.dropped_tokens) == (3, 36, 0)
    assert record.divergence.tokens == 36
    assert record.divergence.kl.value == 0
    assert [part.high for part in record.divergence.by_position][-1] == 12


@pytest.mark.slow
def test_it_is_written_once_and_is_part_of_the_identity(qbench, tmp_path, monkeypatch):
    asked = ("model=tiny-dense", "task=self", "task.answers=2", "task.tokens=8", "task.window=120")
    results = []

    def run(*more):
        outcome = qbench(*asked, *more)
        assert outcome.status == 0, outcome.stderr
        return Store(Path("outputs")).load(outcome.summary["run_id"])

    results.append(run("quantizer=rtn"))
    [kept] = (tmp_path / "outputs" / "texts").iterdir()
    monkeypatch.setattr(written, "_write", None)  # a second time would fail
    results.append(run("quantizer=none"))
    assert results[1].evaluation[0].divergence.kl.value == results[1].evaluation[0].ppl_delta == 0
    assert results[0].evaluation[0].divergence.kl.value > 0
    sha256 = written.read(kept).sha256
    assert {r.identity.text_sha256 for r in results} == {r.evaluation[0].text_sha256 for r in results} == {sha256}
    assert json.loads(kept.read_text())["texts"][0]["prompt"].startswith(written.prompts()[0])
    moved = kept.rename(tmp_path / "moved.json")
    assert run("quantizer=rtn", f"task.path={moved}").run_id == results[0].run_id


def test_a_model_that_ends_at_once_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(written, "_ends", lambda *_: set(range(258)))
    with pytest.raises(RequestError) as found:
        written.sample(*tiny, Sampling(1, 4, 1.0, 1.0, 0))
    assert "task.tokens" in refused(found.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "nowhere.json"}, "cannot read nowhere.json"),
        ({"window": 20}, "task.window"),
        ({"answers": 4}, "task.answers"),
        ({"seed": 5}, "task.seed=0"),
        ({"tokens": 13}, "task.tokens"),
    ],
)
def test_a_wrong_request_is_one_sentence(tmp_path, tiny, wrote, changes, words):
    path = tmp_path / "self.json"
    sampling = {"answers": 3, "tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    held = {"format": written.FORMAT, "sampling": sampling, "chat": False}
    path.write_text(json.dumps(held | {"prompts": wrote.prompts, "answers": wrote.answers}))

    def ask():
        task = SelfWritten(**{"answers": 3, "tokens": 12, "path": str(path)} | changes)
        task.check(CPU)
        task.check_length(task.read())

    with pytest.raises(RequestError) as found:
        ask()
    assert words in refused(found.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    for content in ("{}", "not json", '{"format": "qbench-written-1", "prompts": [], "answers": []}'):
        (tmp_path / "f.json").write_text(content)
        with pytest.raises(RequestError):
            written.read(tmp_path / "f.json")


def test_a_chat_template_is_used_and_one_that_fails_is_told(tiny):
    model, tokenizer = tiny
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "<{{ messages[0]['content'] }}>{% if add_generation_prompt %}A:{% endif %}"
    chat, prompts, _ = written.sample(model, tokenizer, Sampling(1, 2, 1.0, 1.0, 0))
    assert chat
    assert tokenizer.decode(prompts[0]) == f"<{written.prompts()[0]}>A:"
    tokenizer.chat_template = "{{ raise_exception('a system message is needed') }}"
    with pytest.raises(RequestError) as found:
        written.sample(model, tokenizer, Sampling(1, 2, 1.0, 1.0, 0))
    assert "a system message is needed" in refused(found.value)
