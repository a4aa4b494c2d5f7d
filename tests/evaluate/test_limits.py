"""Ids and positions that a model has not are refused before the first forward pass, in a sentence."""

import numpy as np
import pytest
import torch
import transformers

from qbench.config import CalibrationConfig, SpeedConfig
from qbench.errors import RequestError
from qbench.evaluate.limits import Limits, check_ids, check_positions
from qbench.evaluate.protocols.windows import TextWindows
from qbench.sources.tiny import build, byte_tokenizer


def task(**changes):
    return TextWindows(**{"name": "t", "window": 65} | changes)


LEARNED = [
    transformers.OPTConfig(max_position_embeddings=64, vocab_size=258),
    transformers.GPT2Config(n_positions=64, vocab_size=258),
    transformers.GPTNeoConfig(max_position_embeddings=64, vocab_size=258),
]
ROTARY = [
    transformers.LlamaConfig(max_position_embeddings=64, vocab_size=258),
    transformers.Qwen3Config(max_position_embeddings=64, vocab_size=258),
    transformers.GPTNeoXConfig(max_position_embeddings=64, vocab_size=258),
    transformers.Gemma3Config(text_config={"max_position_embeddings": 64, "vocab_size": 258}),
]
NONE = [transformers.BloomConfig(vocab_size=258), transformers.MambaConfig(vocab_size=258)]


def name(config):
    return type(config).__name__


@pytest.mark.parametrize("config", LEARNED, ids=name)
def test_learned_positions_end_where_they_end(config):
    limits = Limits.of(config)
    assert limits == Limits(258, 64, rotary=False)
    check_positions(limits, task(window=64), None, None)
    with pytest.raises(RequestError, match=r"task\.window=65, but this model takes 64 positions.*task\.window=64"):
        check_positions(limits, task(), None, None)
    with pytest.raises(RequestError, match="learned, so that there are no others"):
        check_positions(limits, task(beyond_positions=True), None, None)


@pytest.mark.parametrize("config", ROTARY, ids=name)
def test_rotary_positions_go_on_only_if_that_is_asked_for(config):
    limits = Limits.of(config)
    assert limits == Limits(258, 64, rotary=True)
    with pytest.raises(RequestError, match=r"task\.beyond_positions=true"):
        check_positions(limits, task(), None, None)
    check_positions(limits, task(beyond_positions=True), None, None)
    calibration = CalibrationConfig(name="c", window=128)
    with pytest.raises(RequestError, match=r"calibration\.window=128, but this model takes 64 positions"):
        check_positions(limits, task(window=64), calibration, None)
    speed = SpeedConfig("default", 1, 32, 60, 8, 1)
    with pytest.raises(RequestError, match=r"speed asks for 68 .* takes 64; lower .* or speed\.decode_tokens"):
        check_positions(limits, task(beyond_positions=True), None, speed)


@pytest.mark.parametrize("config", NONE, ids=name)
def test_a_model_without_positions_has_no_limit(config):
    check_positions(Limits.of(config), task(window=10**6), None, SpeedConfig("default", 1, 10**6, 1, 1, 1))


def test_ids():
    check_ids(Limits(258, None), np.array([[0, 257]]), "the text")
    with pytest.raises(RequestError, match=r"gives the text the token id 258, but the model knows 258 tokens"):
        check_ids(Limits(258, None), np.array([[3, 258]]), "the text")


@pytest.mark.slow
def test_a_point_is_refused_before_its_model_is_shown_a_window(qbench, tmp_path, monkeypatch):
    """Nothing is computed but, where token ids are what is wrong, the few tokens that show how the model is built."""
    model, tokenizer = build("dense", 0)[0], byte_tokenizer()
    model.config.max_position_embeddings = 64
    model.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    model.config.max_position_embeddings = 2048
    model.save_pretrained(tmp_path / "more")
    tokenizer.add_tokens(["the "])
    tokenizer.save_pretrained(tmp_path / "more")
    common = ("quantizer=rtn", "task.max_windows=2", "model=local")
    calls, forward = [], torch.nn.Embedding.forward
    monkeypatch.setattr(
        torch.nn.Embedding, "forward", lambda self, ids: calls.append(ids.shape[-1]) or forward(self, ids)
    )
    short = qbench(*common, "model.path=short", "task.window=65")
    assert (short.status, calls) == (2, [])
    assert "task.window=65, but this model takes 64 positions" in short.stderr
    gptq = qbench(*common, "model.path=short", "task.window=64", "quantizer=gptq")
    assert gptq.status == 2
    assert "calibration.window=512, but this model takes 64 positions" in gptq.stderr
    more = qbench(*common, "model.path=more", "task.window=64", "task.max_windows=20")
    assert (more.status, max(calls, default=0) < 63) == (2, True)
    assert "gives the text the token id 258, but the model knows 258 tokens" in more.stderr
    monkeypatch.undo()
    beyond = qbench(
        *common,
        "model.path=" + str(tmp_path / "short"),
        "task.window=65",
        "task.beyond_positions=true",
        f"outputs={tmp_path / 'outputs'}",
    )
    assert beyond.status == 0, beyond.stderr
