import numpy as np
import pytest

from qbench.statistics import paired_delta, perplexity


def test_perplexity_is_exp_of_the_mean():
    assert perplexity(np.array([1.0, 3.0])) == pytest.approx(np.exp(2))


def test_identical_models_differ_by_exactly_nothing():
    nll = np.random.default_rng(0).normal(3, 0.3, 24)
    assert paired_delta(nll, nll, 0) == paired_delta(nll, nll, 1)
    delta = paired_delta(nll, nll, 0)
    assert (delta.value, delta.low, delta.high) == (0, 0, 0)


def test_pairing_is_what_makes_the_interval_tight():
    draw = np.random.default_rng(0)
    baseline = draw.normal(3, 0.4, 40)
    quantized = baseline + 0.05 + draw.normal(0, 0.01, 40)
    paired = paired_delta(quantized, baseline, 0)
    shuffled = paired_delta(draw.permutation(quantized), baseline, 0)
    assert paired.low > 0
    assert paired.high - paired.low < (shuffled.high - shuffled.low) / 4


def test_single_windows_have_no_interval_and_mismatches_are_refused():
    delta = paired_delta(np.array([2.0]), np.array([1.0]), 0)
    assert delta.low is None
    assert delta.high is None
    with pytest.raises(ValueError, match="must match"):
        paired_delta(np.zeros(3), np.zeros(4), 0)


@pytest.mark.parametrize("windows", [12, 24])
def test_coverage_by_simulation(windows, monkeypatch):
    """95 % intervals contain the truth about 95 % of the time, also with few windows."""
    monkeypatch.setattr("qbench.statistics.RESAMPLES", 1000)
    draw = np.random.default_rng(7)
    mean, spread, shift, noise = 3.0, 0.3, 0.1, 0.05
    truth = np.exp(mean + shift) - np.exp(mean)  # difference of the perplexities of endless texts
    trials, hits = 600, 0
    for trial in range(trials):
        baseline = draw.normal(mean, spread, windows)
        quantized = baseline + shift + draw.normal(0, noise, windows)
        delta = paired_delta(quantized, baseline, trial)
        hits += delta.low <= truth <= delta.high
    assert 0.925 <= hits / trials <= 0.975
