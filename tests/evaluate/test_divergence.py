"""Divergence from kept tops: exact where it says so, bounded and without bias elsewhere."""

import numpy as np
import pytest
import torch

from qbench.config import RuntimeConfig
from qbench.evaluate import measure, windowed
from qbench.evaluate.divergence import TAIL_SAMPLES, CompareTop, KeepTop
from qbench.evaluate.score import token_nll
from qbench.evaluate.windowed import WindowedEvaluation
from qbench.record.store import Store
from qbench.sources.tiny import build
from tests.evaluate.test_windows import TEXT, task

VOCABULARY = 258


def exact(p_logits, q_logits):
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)


def compare(p_logits, q_logits, k):
    """Through the watchers, as one window of `[rows, vocabulary]` logits in two chunks."""
    keep = KeepTop(1, len(p_logits), k)
    for rows in (slice(0, 3), slice(3, len(p_logits))):
        keep(0, rows, p_logits[rows], p_logits[rows].logsumexp(-1))
    seen = CompareTop(keep.ids, keep.log_probabilities, keep.log_tail, keep.most_probable, k)
    for rows in (slice(0, 5), slice(5, len(p_logits))):
        seen(0, rows, q_logits[rows], q_logits[rows].logsumexp(-1))
    return seen


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    p = 3 * torch.randn(2000, 400, generator=generator, dtype=torch.float64)
    return p, p + 0.5 * torch.randn(2000, 400, generator=generator, dtype=torch.float64)


def test_exact_with_the_whole_vocabulary(logits):
    for k in (400, 1000):
        seen = compare(*logits, k)
        kl, reverse = exact(*logits)
        np.testing.assert_allclose(seen.kl[0], kl, rtol=1e-9)
        np.testing.assert_allclose(seen.kl_reverse[0], reverse, rtol=1e-9)
        assert (seen.log_tail == -np.inf).all()
        assert seen.ids.shape[-1] == 400
        assert seen.agrees[0].tolist() == (logits[0].argmax(-1) == logits[1].argmax(-1)).tolist()


@pytest.mark.parametrize("k", [1, 8, 64])
def test_the_coarse_divergence_is_a_lower_bound_and_misses_at_most_the_stated_amount(logits, k):
    p, q = (x.log_softmax(-1) for x in logits)
    top = p.topk(k).indices
    inside = torch.ones_like(p, dtype=torch.bool).scatter_(1, top, False)
    log_tail_p, log_tail_q = (torch.where(inside, x, -torch.inf).logsumexp(-1) for x in (p, q))
    coarse = (p.exp() * (p - q)).masked_fill(inside, 0).sum(-1) + log_tail_p.exp() * (log_tail_p - log_tail_q)
    ratios = torch.where(inside, (p - log_tail_p[:, None]) - (q - log_tail_q[:, None]), -torch.inf)
    gap = exact(*logits)[0] - coarse
    assert (gap >= -1e-12).all()
    assert (gap <= log_tail_p.exp() * ratios.max(-1).values + 1e-12).all()
    assert (compare(*logits, k).kl[0] >= coarse.numpy() - 1e-9).all()  # the estimated rest is never negative


@pytest.mark.parametrize("k", [1, 8, 64])
def test_the_sampled_tail_has_no_bias(logits, k):
    """Over 2000 positions the error is within its own standard error, three times of it at most."""
    seen = compare(*logits, k)
    assert seen.ids.shape[-1] == k + TAIL_SAMPLES
    for measured, true in zip((seen.kl[0], seen.kl_reverse[0]), exact(*logits), strict=True):
        error = measured - true.numpy()
        assert abs(error.mean()) < 3 * error.std() / np.sqrt(len(error))
        assert abs(error.mean()) < 0.02 * true.mean()
    np.testing.assert_allclose(np.exp(seen.log_tail[0]), 1 - logits[0].softmax(-1).topk(k).values.sum(-1), rtol=1e-9)


def test_equal_models_do_not_diverge(logits):
    seen = compare(logits[0], logits[0], 8)
    np.testing.assert_allclose(seen.kl, 0, atol=1e-12)
    np.testing.assert_allclose(seen.kl_reverse, 0, atol=1e-12)
    assert seen.agrees.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 8, 300])
def test_a_model_beside_itself_gives_zeros_and_ones_exactly(dtype, k):
    """Logits of few values, as 16 bit has them: most rows have several largest, and topk names another than argmax."""
    generator = torch.Generator().manual_seed(0)
    tied = (torch.randn(500, 300, generator=generator) * 2).round().to(dtype).float()
    assert (tied.topk(8).indices[:, 0] != tied.argmax(-1)).any()
    seen = compare(tied, tied, k)
    assert seen.agrees.all()
    assert not seen.kl.any()
    assert not seen.kl_reverse.any()


def test_what_has_no_probability_counts_for_nothing():
    """Logits of -inf, as models with padded vocabularies give them, at the same places in both."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 6, 50, generator=generator, dtype=torch.float64)
    finite = [exact(x[:, :20], y[:, :20])[0] for x, y in ((p, q), (q, p))]
    for x in (p, q):
        x[:, 20:] = -torch.inf
    for k in (20, 30, 50):
        seen = compare(p, q, k)
        np.testing.assert_allclose(seen.kl[0], finite[0], rtol=1e-9)
        np.testing.assert_allclose(seen.kl_reverse[0], finite[1], rtol=1e-9)


def test_scores_kept_in_another_form_are_not_taken_for_these(tiny, tmp_path, monkeypatch):
    """Their file has another name, so that it is measured again."""
    config = task(max_windows=2)
    evaluation = WindowedEvaluation(config.cut(TEXT, tiny[1]), TEXT, config, RuntimeConfig())
    store = Store(tmp_path)
    monkeypatch.setattr(windowed, "FORM", 1)
    assert measure.baseline(evaluation, tiny[0], "model", {}, store)[1] is False
    assert measure.baseline(evaluation, tiny[0], "model", {}, store)[1] is True
    monkeypatch.undo()
    scores, cached = measure.baseline(evaluation, tiny[0], "model", {}, store)
    assert not cached
    assert scores["most_probable"].shape == (2, 99)


def test_a_tail_without_mass_counts_for_nothing():
    sure = torch.full((8, 50), -1000.0, dtype=torch.float64)
    sure[:, 0] = 1000
    unsure = torch.zeros(8, 50, dtype=torch.float64)
    np.testing.assert_allclose(compare(sure, unsure, 2).kl, np.log(50), rtol=1e-6)


@pytest.mark.parametrize("topk", [4, VOCABULARY])
def test_a_record_equals_llama_cpps_definitions(tiny, topk):
    """From whole distributions in fp64: KL both ways, top-1 agreement, RMS change of the true token's probability."""
    config = task(divergence_topk=topk, max_windows=4)
    windows = config.cut(TEXT, tiny[1])
    base, other = (build("dense", seed)[0].double().eval() for seed in (0, 1))
    with torch.no_grad():
        for ours, theirs in zip(other.parameters(), base.parameters(), strict=True):
            ours.copy_(theirs + 0.2 * (ours - theirs))
    evaluation = WindowedEvaluation(windows, TEXT, config, RuntimeConfig())
    baseline = evaluation.score_baseline(base)
    scores = evaluation.score(other, baseline)
    [record], [], files = evaluation.records(scores, baseline, False)
    ids = torch.from_numpy(windows.ids)
    with torch.no_grad():
        p, q = (model(ids[:, :-1]).logits.log_softmax(-1) for model in (base, other))
    kl, reverse = ((a.exp() * (a - b)).sum(-1) for a, b in ((p, q), (q, p)))
    true = [x.exp().gather(2, ids[:, 1:, None])[..., 0] for x in (p, q)]
    found = record.divergence
    tolerance = 1e-9 if topk == VOCABULARY else 0.05
    assert found.kl.value == pytest.approx(kl.mean().item(), rel=tolerance)
    assert found.kl_reverse.value == pytest.approx(reverse.mean().item(), rel=tolerance)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=10 * tolerance)
    assert found.top1_agreement.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    change = (true[1] - true[0]).square().mean().sqrt().item()
    assert found.true_token_rms_change.value == pytest.approx(change, rel=1e-9)
    assert found.kl.low < found.kl.value < found.kl.high
    assert found.topk == topk
    assert (found.tail_mass == 0) == (topk == VOCABULARY)
    (kept,) = files.values()
    np.testing.assert_allclose(kept["kl"].mean(), found.kl.value)
    assert set(kept) == {"quantized", "baseline", "kl", "kl_reverse", "agrees", "squared_change"}


def test_switched_off(tiny):
    config = task(divergence=False)
    evaluation = WindowedEvaluation(config.cut(TEXT, tiny[1]), TEXT, config, RuntimeConfig())
    baseline = evaluation.score_baseline(tiny[0])
    assert set(baseline) == {"token_nll"}
    [record], _, _ = evaluation.records(evaluation.score(tiny[0], baseline), baseline, False)
    assert record.divergence is None
    assert record.ppl_delta == 0
    assert record.verdict == "not distinguishable"


def test_watching_does_not_change_the_scores(tiny):
    ids = task().cut(TEXT, tiny[1]).ids
    watched = token_nll(tiny[0], ids, 1, "watched", KeepTop(len(ids), 99, 4))
    assert np.array_equal(watched, token_nll(tiny[0], ids, 1, "alone"))
