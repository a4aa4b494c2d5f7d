import numpy as np
import pytest
import torch

from qbench.config import RuntimeConfig, TaskConfig
from qbench.errors import PointError, RequestError
from qbench.evaluate.perplexity import WindowScorer, check, cut_windows, protocol_name
from qbench.evaluate.text import Text
from qbench.statistics import perplexity

TEXT = Text("Seven grey geese crossed the river in a long, uneven line. " * 20, "test")


def task(**changes):
    return TaskConfig(**{"name": "t", "protocol": "windows", "window": 100} | changes)


def test_windows_are_cut_once_and_the_tail_is_dropped(tiny):
    windows = cut_windows(TEXT, tiny[1], task())
    ids = tiny[1](TEXT.content)["input_ids"]
    assert windows.total_tokens == len(ids) == 1180
    assert windows.ids.tolist() == [ids[i : i + 100] for i in range(0, 1100, 100)]
    assert windows.dropped_tokens == 80
    assert windows.scored_tokens == 11 * 99
    assert windows.leading_special_tokens == 0
    assert cut_windows(TEXT, tiny[1], task(max_windows=3)).ids.tolist() == windows.ids[:3].tolist()


def test_the_protocol_is_in_the_name():
    assert protocol_name(task(name="wikitext2", window=2048)) == "wikitext2:gptq-w2048"
    assert protocol_name(task(name="wikitext2", window=1024, max_windows=4)) == "wikitext2:gptq-w1024-first4"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_a_naive_loop_in_fp64(batch_size):
    from qbench.models.tiny import build

    model, tokenizer = build("dense", 1)
    model = model.double().eval()
    windows = cut_windows(TEXT, tokenizer, task())
    measured = WindowScorer(model, tokenizer, 100, batch_size, softmax_dtype="float64").window_nll(windows, "tiny")
    naive = []
    with torch.no_grad():
        for ids in torch.from_numpy(windows.ids):
            log_probabilities = model(ids[None]).logits[0, :-1].log_softmax(-1)
            naive.append(-log_probabilities[torch.arange(99), ids[1:]].sum().item() / 99)
    np.testing.assert_allclose(measured, naive, rtol=1e-9)
    all_tokens = np.exp(np.sum(np.array(naive) * 99) / windows.scored_tokens)
    assert perplexity(measured) == pytest.approx(all_tokens, rel=1e-9)


def test_softmax_is_fp32_for_16_bit_models(tiny):
    from qbench.models.tiny import build

    model, tokenizer = build("dense", 0)
    model = model.bfloat16().eval()
    windows = cut_windows(TEXT, tokenizer, task())
    measured = WindowScorer(model, tokenizer, 100, 1).window_nll(windows, "bf16")
    with torch.no_grad():
        logits = model(torch.from_numpy(windows.ids[:1, :-1])).logits[0]
    target = torch.from_numpy(windows.ids[0, 1:])[:, None]
    wide = -logits.double().log_softmax(-1).gather(1, target).mean().item()
    narrow = -logits.log_softmax(-1).gather(1, target).float().mean().item()
    assert measured[0] == pytest.approx(wide, rel=1e-6)
    assert abs(narrow - wide) > 1e-5  # what it would have been


def test_nan_logits_name_the_window():
    from qbench.models.tiny import build

    model, tokenizer = build("dense", 0)
    model = model.eval()
    windows = cut_windows(TEXT, tokenizer, task())
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(PointError, match="NaN or Inf in window 0"):
        WindowScorer(model, tokenizer, 100, 1).window_nll(windows, "broken")


def test_refusals(tiny):
    with pytest.raises(RequestError, match=r"1180 tokens, less than one window of 2048"):
        cut_windows(TEXT, tiny[1], task(window=2048))
    with pytest.raises(RequestError, match=r"task\.window must be at least 2"):
        check(task(window=1), RuntimeConfig())
    with pytest.raises(RequestError, match=r"task\.max_windows"):
        check(task(max_windows=0), RuntimeConfig())
    with pytest.raises(RequestError, match=r"task\.protocol"):
        check(task(protocol="magic"), RuntimeConfig())
