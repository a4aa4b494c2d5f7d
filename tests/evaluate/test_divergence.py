"""Divergence over the whole vocabulary: exact, zero for equal models, and as llama.cpp defines it."""

import numpy as np
import pytest
import torch

from qbench.config import RuntimeConfig
from qbench.evaluate import resident, score
from qbench.evaluate.divergence import divergences, log_probabilities, masked_divergences
from qbench.evaluate.score import NonFiniteError, WindowAsks
from qbench.evaluate.windowed import WindowedEvaluation
from qbench.record import quality
from qbench.sources.tiny import build
from tests.evaluate.test_windows import TEXT, task

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def exact(p_logits, q_logits):
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)


def compare(p_logits, q_logits, of=divergences):
    return of(log_probabilities(p_logits), log_probabilities(q_logits))


def near(dtype, change, rows=64, vocabulary=5000):
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    return p, (p.double() + change * torch.randn(rows, vocabulary, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [2.0, 0.3, 0.05, 0.005])
def test_exact_from_one_nat_down_to_a_hundred_thousandth(dtype, change):
    """From the logits as they are, in any precision: to 2e-7 nats a token, and far better in the mean."""
    p, q = near(dtype, change)
    near_zero, tolerance = (1e-14, 1e-9) if dtype == torch.float64 else (2e-7, 2e-4)
    for of in (divergences, masked_divergences):
        for measured, true in zip(compare(p, q, of), exact(p, q), strict=True):
            np.testing.assert_allclose(measured, true, rtol=tolerance, atol=near_zero)
            assert measured.double().mean() == pytest.approx(true.mean().item(), rel=tolerance, abs=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_beside_itself_gives_zeros_and_ones_exactly(dtype):
    """Logits of few values, as 16 bit has them: most rows have several largest."""
    tied = (torch.randn(1, 99, 300, generator=torch.Generator().manual_seed(0)) * 2).round().to(dtype)
    assert ((tied == tied.max(-1, keepdim=True).values).sum(-1) > 1).any()
    seen = read(tied, tied.clone())
    assert not seen["kl"].any()
    assert not seen["kl_reverse"].any()
    assert not seen["squared_change"].any()
    assert seen["agrees"].all()


def read(p_logits, q_logits):
    """Through a reader, `[windows, tokens, vocabulary]` each; the tokens that follow are 0, 1, 2, ..."""
    windows, tokens = p_logits.shape[:2]
    asks = WindowAsks(np.arange(windows * (tokens + 1)).reshape(windows, -1) % p_logits.shape[2], 2, True)
    reader = asks.reader(None)
    for b, rows in enumerate(asks.batches):
        for row in range(len(rows)):
            reader.see(b, row, q_logits[2 * b + row], p_logits[2 * b + row])
    return reader.scores()


def test_what_has_no_probability_counts_for_nothing():
    """Logits of -inf, as models with padded vocabularies give them."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 6, 50, generator=generator, dtype=torch.float64)
    finite = exact(p[..., :30], q[..., :30])
    p[..., 30:], q[..., 30:] = -torch.inf, -torch.inf
    seen = read(p, q)
    np.testing.assert_allclose(seen["kl"], finite[0], rtol=1e-9)
    np.testing.assert_allclose(seen["kl_reverse"], finite[1], rtol=1e-9)
    q[0, 0, 29] = -torch.inf  # of a token that the original may say
    seen = read(p, q)
    assert seen["kl"][0, 0] == np.inf
    assert np.isfinite(seen["kl_reverse"]).all()
    assert np.isfinite(seen["kl"]).sum() == 17


def test_from_certain_to_uniform():
    sure = torch.full((1, 8, 50), -1000.0, dtype=torch.float64)
    sure[..., 0] = 1000
    unsure = torch.zeros(1, 8, 50, dtype=torch.float64)
    np.testing.assert_allclose(read(sure, unsure)["kl"], np.log(50), rtol=1e-9)


def test_the_originals_argmax_is_found_once_for_all_variants():
    row = torch.randn(9, 20, generator=torch.Generator().manual_seed(0))
    asks = WindowAsks(np.arange(10)[None], 1, True)
    assert asks.most_probable(row) is asks.most_probable(row)
    assert torch.equal(asks.most_probable(row), row.argmax(-1))
    other = -row
    assert torch.equal(asks.most_probable(other), other.argmax(-1))  # another row's is another's


def test_chunks_change_nothing(monkeypatch):
    p, q = (x.view(2, 32, 5000) for x in near(torch.bfloat16, 0.3))
    whole = read(p, q)
    monkeypatch.setattr(score, "CHUNK_BYTES", 7 * 5000 * 4)
    for name, values in read(p, q).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_names_window_and_token(value):
    p = torch.randn(3, 9, 20, generator=torch.Generator().manual_seed(0))
    q = p.clone()
    q[2, 4, 7] = value
    with pytest.raises(NonFiniteError, match="the model gives NaN or Inf in window 2 from token 4") as raised:
        read(p, q)
    assert raised.value.window == 2


def models():
    """Two in fp64 that differ in all but the head, which no method quantizes."""
    base, other = (build("dense", seed)[0].double().eval() for seed in (0, 1))
    with torch.no_grad():
        for ours, theirs in zip(other.parameters(), base.parameters(), strict=True):
            ours.copy_(theirs + (0 if ours is other.lm_head.weight else 0.2) * (ours - theirs))
    return base, other


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_record_equals_llama_cpps_definitions(tiny, batch_size):
    """From whole distributions in fp64: KL both ways, top-1 agreement, RMS change of the true token's probability."""
    config = task(max_windows=4)
    windows = config.cut(TEXT, tiny[1])
    base, other = models()
    evaluation = WindowedEvaluation(windows, TEXT, config, RuntimeConfig(batch_size=batch_size))
    baseline = evaluation.score_baseline(base)
    assert baseline[resident.HEAD_INPUTS].shape == (4, 99, 64)
    scores = evaluation.score(other, baseline)
    [record], [], files = evaluation.records(scores, baseline, False)
    ids = torch.from_numpy(windows.ids)
    with torch.no_grad():
        p, q = (model(ids[:, :-1]).logits.log_softmax(-1) for model in (base, other))
    kl, reverse = ((a.exp() * (a - b)).sum(-1) for a, b in ((p, q), (q, p)))
    true = [x.exp().gather(2, ids[:, 1:, None])[..., 0] for x in (p, q)]
    found = record.divergence
    assert found.kl.value == pytest.approx(kl.mean().item(), rel=1e-9)
    assert found.kl_reverse.value == pytest.approx(reverse.mean().item(), rel=1e-9)
    for name, quantile in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("max", 1)):
        assert getattr(found, f"kl_{name}") == pytest.approx(np.quantile(kl, quantile), rel=1e-9)
    sure = p.max(-1).values.exp() >= 0.5
    assert found.confident_share == pytest.approx(sure.double().mean().item())
    for which, value in ((sure, found.kl_confident), (~sure, found.kl_unconfident)):
        assert value == (pytest.approx(kl[which].mean().item(), rel=1e-9) if which.any() else None)
    changed = p.argmax(-1) != q.argmax(-1)
    for number, part in enumerate(found.by_confidence):
        inside = torch.floor(p.max(-1).values.exp() * 5).clamp(max=4) == number
        assert part.share == pytest.approx(inside.double().mean().item())
        assert part.kl == (pytest.approx(kl[inside].mean().item(), rel=1e-9) if inside.any() else None)
        assert part.top1_changed == (pytest.approx(changed[inside].double().mean().item()) if inside.any() else None)
    assert [(part.low, part.high) for part in found.by_position][::7] == [(1, 13), (88, 99)]
    for part in found.by_position:
        inside = slice(int(part.low) - 1, int(part.high))
        assert part.kl == pytest.approx(kl[:, inside].mean().item(), rel=1e-9)
        assert part.top1_changed == pytest.approx(changed[:, inside].double().mean().item())
    assert sum(found.kl_histogram) == found.tokens == kl.numel()
    edges = quality.histogram_edges()
    assert len(found.kl_histogram) == len(edges) - 1
    for number, count in enumerate(found.kl_histogram):
        assert count == int(((kl.numpy() >= edges[number]) & (kl.numpy() < edges[number + 1])).sum())
    assert found.top1_agreement.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    change = (true[1] - true[0]).square().mean().sqrt().item()
    assert found.true_token_rms_change.value == pytest.approx(change, rel=1e-9)
    assert found.kl.low < found.kl.value < found.kl.high
    (kept,) = files.values()
    np.testing.assert_allclose(kept["kl"].mean(), found.kl.value)
    assert set(kept) == {"quantized", "baseline", "kl", "kl_reverse", "agrees", "squared_change"}


def test_confidence_is_told_apart():
    """A position where the original is sure and one where it is not, with KLs of their own."""
    p = torch.tensor([[[4.0, 0, 0, 0], [0, 0, 0, 0.1]]], dtype=torch.float64)
    seen = read(p, p * 0.5)
    np.testing.assert_allclose(seen["confidence"], p.softmax(-1).amax(-1), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_originals_logits_are_made_again_to_the_bit(tiny, dtype, batch_size):
    """Of what entered its head, by the same model's head: so the original beside itself differs by nothing."""
    config = task(max_windows=5)
    model = build("dense", 0)[0].to(dtype).eval()
    evaluation = WindowedEvaluation(config.cut(TEXT, tiny[1]), TEXT, config, RuntimeConfig(batch_size=batch_size))
    scores = evaluation.score(model, evaluation.score_baseline(model))
    assert not scores["kl"].any()
    assert not scores["squared_change"].any()
    assert scores["agrees"].all()


def test_soft_caps_behind_the_head_apply_to_both(tiny):
    """Gemma 2 caps its logits after the head: the original's are made again with the cap."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = dict(vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    shape |= dict(num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.5)
    base, other = (Gemma2ForCausalLM(Gemma2Config(**shape)).double().eval() for _ in range(2))
    other.model.embed_tokens.weight = base.model.embed_tokens.weight  # and the head's, which is tied
    other.lm_head.weight = base.lm_head.weight
    config = task(max_windows=2)
    evaluation = WindowedEvaluation(config.cut(TEXT, tiny[1]), TEXT, config, RuntimeConfig())
    scores = evaluation.score(other, evaluation.score_baseline(base))
    with torch.no_grad():
        ids = torch.from_numpy(evaluation.ids[:, :-1])
        kl, _ = exact(base(ids).logits, other(ids).logits)
    np.testing.assert_allclose(scores["kl"], kl, rtol=1e-9)


def test_a_head_that_is_not_called_once_gives_no_divergence_and_says_so(tiny, caplog):
    class Split(torch.nn.Linear):
        """A head that makes its logits of two calls of itself."""

        def __call__(self, states):
            half = states.shape[1] // 2
            return torch.cat(
                [super(Split, self).__call__(states[:, part]) for part in (slice(half), slice(half, None))], 1
            )

    model = build("dense", 0)[0].eval()
    model.lm_head.__class__ = Split
    config = task(max_windows=2)
    evaluation = WindowedEvaluation(config.cut(TEXT, tiny[1]), TEXT, config, RuntimeConfig())
    baseline = evaluation.score_baseline(model)
    assert set(baseline) == {"token_nll"}
    [record], _, _ = evaluation.records(evaluation.score(model, baseline), baseline, False)
    assert record.divergence is None
    assert record.ppl_delta == 0
    assert [r.getMessage() for r in caplog.records if "no divergence" in r.getMessage()] == [
        "no divergence: this model's output head is not called once for all tokens, so that none can be had"
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_survive_being_kept(dtype, tmp_path):
    from qbench.record.store import Store

    states = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    store = Store(tmp_path)
    store.save_baseline("key", {"states": resident.to_numpy(states)}, {})
    kept = resident.from_numpy(store.load_baseline("key", {})["states"])
    assert kept.dtype == dtype
    assert torch.equal(kept, states)


def test_switched_off(tiny):
    config = task(divergence=False)
    evaluation = WindowedEvaluation(config.cut(TEXT, tiny[1]), TEXT, config, RuntimeConfig())
    baseline = evaluation.score_baseline(tiny[0])
    assert set(baseline) == {"token_nll"}
    [record], _, _ = evaluation.records(evaluation.score(tiny[0], baseline), baseline, False)
    assert record.divergence is None
    assert record.ppl_delta == 0
    assert record.verdict == "not distinguishable"


def test_comparing_does_not_change_the_scores(tiny):
    config = task(max_windows=3)
    evaluation = WindowedEvaluation(config.cut(TEXT, tiny[1]), TEXT, config, RuntimeConfig())
    beside = evaluation.score(tiny[0], evaluation.score_baseline(tiny[0]))
    assert np.array_equal(beside["token_nll"], evaluation.score(tiny[0], None)["token_nll"])
