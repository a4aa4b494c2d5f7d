"""Scoring windows: equal to a naive loop and to lm-eval's model layer, in little memory, and loud about NaN."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qbench.config import RuntimeConfig
from qbench.errors import PointError
from qbench.evaluate import score
from qbench.evaluate.divergence import KeepTop
from qbench.evaluate.harness import wrap
from qbench.evaluate.protocols.lmeval import LmEval
from qbench.evaluate.score import token_nll
from qbench.intervals import perplexity
from qbench.sources.tiny import build
from tests.evaluate.test_windows import TEXT, task


@pytest.fixture
def windows(tiny):
    return task().cut(TEXT, tiny[1]).ids


@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_a_naive_loop_in_fp64(windows, batch_size, monkeypatch):
    monkeypatch.setattr(score, "CHUNK_BYTES", 7 * 258 * 8)  # 7 rows a chunk, and a rest
    model = build("dense", 1)[0].double().eval()
    measured = token_nll(model, windows, batch_size, "tiny")
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
    np.testing.assert_allclose(token_nll(model, windows, 1, "tiny").mean(1), theirs, rtol=tolerance)


def test_softmax_is_fp32_for_16_bit_models(windows):
    model = build("dense", 0)[0].bfloat16().eval()
    measured = token_nll(model, windows, 1, "bf16").mean(1)
    with torch.no_grad():
        logits = model(torch.from_numpy(windows[:1, :-1])).logits[0]
    target = torch.from_numpy(windows[0, 1:])[:, None]
    wide = -logits.double().log_softmax(-1).gather(1, target).mean().item()
    narrow = -logits.log_softmax(-1).gather(1, target).float().mean().item()
    assert measured[0] == pytest.approx(wide, rel=1e-6)
    assert abs(narrow - wide) > 1e-5  # what it would have been


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
    from qbench.evaluate.divergence import CompareTop, KeepTop

    vocabulary, tokens, chunk = 50_000, 60, 10**6
    monkeypatch.setattr(score, "CHUNK_BYTES", chunk)

    class Model:
        device = torch.device("cpu")

        def __call__(self, ids, use_cache):
            generator = torch.Generator().manual_seed(0)
            logits = torch.randn(1, ids.shape[1], vocabulary, generator=generator, dtype=torch.bfloat16)
            return SimpleNamespace(logits=logits)

    ids = np.random.default_rng(0).integers(0, vocabulary, (1, tokens + 1))
    keep = KeepTop(1, tokens, 8)
    with LargestWide() as largest:
        token_nll(Model(), ids, 1, "large", keep)
        token_nll(
            Model(), ids, 1, "large", CompareTop(keep.ids, keep.log_probabilities, keep.log_tail, keep.most_probable, 8)
        )
    assert 0 < largest.nbytes <= chunk


def test_nan_names_the_window_and_the_first_layer(windows):
    model = build("dense", 0)[0].eval()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(PointError, match=r"NaN or Inf in window 0 from token 0, first .*layers\.1\.mlp\.up_proj"):
        token_nll(model, windows, 1, "broken")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_watches_what_is_no_distribution(windows, value):
    """The baseline's watcher samples from the softmax: multinomial would fail, on a GPU with the whole process."""
    model = build("dense", 0)[0].eval()
    with torch.no_grad():
        model.model.norm.weight[3] = value
    for watch in (KeepTop(len(windows), 99, 8), lambda *_: pytest.fail("it was shown NaN or Inf")):
        with pytest.raises(
            PointError, match=r"NaN or Inf in window 0 from token 0, first in the output of model\.norm"
        ):
            token_nll(model, windows, 1, "broken", watch)


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
        token_nll(model, clean, 2, "broken")


PEAK = """
import resource
from types import SimpleNamespace
import numpy as np, torch
from qbench.evaluate.score import CHUNK_BYTES, token_nll
from qbench.evaluate.divergence import CompareTop, KeepTop

class Model:
    device = torch.device("cpu")
    def __call__(self, ids, use_cache):
        logits = torch.empty(1, ids.shape[1], 150_000, dtype=torch.bfloat16).fill_(1.0)
        return SimpleNamespace(logits=logits)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

ids = np.random.default_rng(0).integers(0, 150_000, (1, 2048))
token_nll(Model(), ids[:, :3], 1, "warm-up", KeepTop(1, 2, 64))
before = peak()
keep = KeepTop(1, 2047, 64)
token_nll(Model(), ids, 1, "baseline", keep)
seen = CompareTop(keep.ids, keep.log_probabilities, keep.log_tail, keep.most_probable, 64)
token_nll(Model(), ids, 1, "quantized", seen)
print((peak() - before - 2047 * 150_000 * 2) / CHUNK_BYTES)
"""


@pytest.mark.slow
def test_peak_memory_beside_the_logits_is_a_few_chunks():
    """2048 tokens, a vocabulary of 150,000, bfloat16: 0.6 GB of logits, and no second copy of them."""
    import os
    import subprocess
    import sys

    returns_freed_memory = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # so that resident means in use
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=returns_freed_memory
    )
    assert float(done.stdout) < 5  # chunks of 32 MB; fp32 log-probabilities of the window would be 38
