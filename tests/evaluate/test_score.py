"""Scoring windows: equal to a naive loop and to lm-eval's model layer, in little memory, and loud about NaN."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qbench.config import RuntimeConfig
from qbench.errors import PointError
from qbench.evaluate import resident, score
from qbench.evaluate.harness import wrap
from qbench.evaluate.protocols.lmeval import LmEval
from qbench.evaluate.score import WindowAsks
from qbench.intervals import perplexity
from qbench.sources.tiny import build
from tests.evaluate.test_windows import TEXT, task


@pytest.fixture
def windows(tiny):
    return task().cut(TEXT, tiny[1]).ids


def token_nll(model, ids, batch_size=1):
    return resident.score(model, WindowAsks(ids, batch_size, False), "tiny")["token_nll"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_a_naive_loop_in_fp64(windows, batch_size, monkeypatch):
    monkeypatch.setattr(score, "CHUNK_BYTES", 7 * 258 * 8)  # 7 rows a chunk, and a rest
    model = build("dense", 1)[0].double().eval()
    measured = token_nll(model, windows, batch_size)
    assert measured.dtype == np.float64
    naive = []
    with torch.no_grad():
        for ids in torch.from_numpy(windows):
            log_probabilities = model(ids[None]).logits[0, :-1].log_softmax(-1)
            naive.append(-log_probabilities[torch.arange(99), ids[1:]].numpy())
    np.testing.assert_allclose(measured, naive, rtol=1e-9)
    assert perplexity(measured.mean(1)) == pytest.approx(np.exp(np.mean(naive)), rel=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-6)])
def test_equals_lm_evals_model_layer(windows, dtype, tolerance):
    """HFLM's _loglikelihood_tokens with the first token as context is the same protocol."""
    model, tokenizer = build("dense", 0)
    model = model.to(dtype).eval()
    lm = wrap(model, tokenizer, LmEval(window=100, add_bos_token=False), RuntimeConfig())
    requests = [(("", ""), ids[:1], ids[1:]) for ids in windows.tolist()]
    with torch.inference_mode():
        theirs = [-loglikelihood / 99 for loglikelihood, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]
    np.testing.assert_allclose(token_nll(model, windows).mean(1), theirs, rtol=tolerance)


def test_a_pass_is_asked_for_the_windows_in_their_order(windows):
    """Walked row by row, as a pass does it, the scores are those of the model that is here as a whole."""
    model = build("dense", 0)[0].double().eval()
    asks = WindowAsks(windows, 4, True)
    assert [len(batch) for batch in asks.batches] == [4, 4, 3]
    assert np.array_equal(np.concatenate(asks.batches), windows[:, :-1])
    reader = asks.reader(None)
    with torch.no_grad():
        for b, ids in enumerate(asks.batches):
            for row, logits in enumerate(model(torch.from_numpy(ids)).logits):
                reader.see(b, row, logits, None)
    np.testing.assert_array_equal(reader.scores()["token_nll"], token_nll(model, windows, 4))


def test_softmax_is_fp32_for_16_bit_models(windows):
    model = build("dense", 0)[0].bfloat16().eval()
    measured = token_nll(model, windows).mean(1)
    with torch.no_grad():
        logits = model(torch.from_numpy(windows[:1, :-1])).logits[0]
    target = torch.from_numpy(windows[0, 1:])[:, None]
    wide = -logits.double().log_softmax(-1).gather(1, target).mean().item()
    narrow = -logits.log_softmax(-1).gather(1, target).float().mean().item()
    assert measured[0] == pytest.approx(wide, rel=1e-6)
    assert abs(narrow - wide) > 1e-5  # what it would have been


def test_a_large_vocabulary_costs_no_digits():
    """One token far above 49,151 others, as when a model is sure: torch's log_softmax is off by 2e-5, on a CPU."""
    logits = torch.randn(40, 49_152, generator=torch.Generator().manual_seed(0))
    logits[:, 1000] = 17
    ids = np.random.default_rng(0).integers(0, 49_152, (1, 41))
    reader = WindowAsks(ids, 1, False).reader(None)
    reader.see(0, 0, logits, None)
    exact = -logits.double().log_softmax(-1).gather(1, torch.from_numpy(ids[0, 1:, None]))[:, 0].numpy()
    assert abs(reader.scores()["token_nll"][0].mean(dtype=float) - exact.mean()) < 1e-6


class LargestWide(TorchDispatchMode):
    """Sees every tensor that torch makes, and keeps the size of the largest one in fp32 or wider."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float32, torch.float64):
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return out


def test_no_more_than_one_chunk_is_ever_wide(monkeypatch):
    """A vocabulary of 50,000 in bfloat16: whole windows of fp32 logits would be 12 times the chunk."""
    vocabulary, tokens, chunk = 50_000, 60, 10**6
    monkeypatch.setattr(score, "CHUNK_BYTES", chunk)
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, tokens + 1))
    p, q = (torch.randn(tokens, vocabulary).bfloat16() for _ in range(2))
    with LargestWide() as largest:
        reader = WindowAsks(ids, 1, True).reader(None)
        reader.see(0, 0, q, p)
    assert reader.scores()["kl"].shape == (1, tokens)
    assert 0 < largest.nbytes <= chunk


def test_nan_names_the_window_and_the_first_layer(windows):
    model = build("dense", 0)[0].eval()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(PointError, match=r"NaN or Inf in window 0 from token 0, first .*layers\.1\.mlp\.up_proj"):
        token_nll(model, windows)


def test_overflow_is_found_where_it_starts(windows):
    """Inf for one input token only: the window that holds it is named, and not the first."""
    model = build("dense", 0)[0].eval()
    rare = int(windows[5, 50])
    clean = np.where(windows == rare, 32, windows)
    clean[5] = windows[5]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untied
    with torch.no_grad():
        model.model.embed_tokens.weight[rare] = float("inf")
    with pytest.raises(PointError, match=r"in window 5 from token \d+, first in the output of model\.embed_tokens"):
        token_nll(model, clean, 2)


PEAK = """
import resource
import numpy as np, torch
from qbench.evaluate.score import CHUNK_BYTES, WindowAsks

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

ids = np.random.default_rng(0).integers(0, 150_000, (1, 2048))
p, q = (torch.empty(2047, 150_000, dtype=torch.bfloat16).fill_(value) for value in (1.0, 2.0))
WindowAsks(ids[:, :3], 1, True).reader(None).see(0, 0, q[:2], p[:2])
before = peak()
WindowAsks(ids, 1, True).reader(None).see(0, 0, q, p)
print((peak() - before) / CHUNK_BYTES)
"""


@pytest.mark.slow
def test_peak_memory_beside_the_logits_is_a_few_chunks():
    """2048 tokens, a vocabulary of 150,000, bfloat16: 0.6 GB of logits a model, and no second copy of them."""
    returns_freed_memory = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # so that resident means in use
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=returns_freed_memory
    )
    assert float(done.stdout) < 5  # chunks of 32 MB; fp32 log-probabilities of the window would be 38
