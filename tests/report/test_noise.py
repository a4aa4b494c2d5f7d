import numpy as np
import pytest

from qbench.report.noise import Paired, difference


def test_the_value_is_the_difference_of_the_perplexities():
    first, second = np.random.default_rng(0).normal(3, 0.3, (2, 24))
    assert difference(first, second).value == pytest.approx(np.exp(first.mean()) - np.exp(second.mean()))
    assert difference(first, second, "acc").value == pytest.approx(first.mean() - second.mean())
    tokens = np.arange(1.0, 25.0)
    weighted = np.exp(np.average(first, weights=tokens)) - np.exp(np.average(second, weights=tokens))
    assert difference(first, second, weights=tokens).value == pytest.approx(weighted)


def test_a_model_does_not_differ_from_itself_nor_a_single_window_from_anything():
    first = np.random.default_rng(0).normal(3, 0.3, 24)
    same = difference(first, first)
    assert (same.value, same.low, same.high, same.is_real) == (0, 0, 0, False)
    single = difference(np.array([2.0]), np.array([1.0]))
    assert (single.low, single.high, single.is_real) == (None, None, False)


def test_for_a_mean_it_is_students_paired_interval():
    from scipy import stats

    first, second = np.random.default_rng(3).normal(0.5, 0.2, (2, 12))
    found, student = difference(first, second, "acc"), stats.ttest_rel(first, second).confidence_interval()
    assert (found.low, found.high) == pytest.approx((student.low, student.high))


@pytest.mark.parametrize("windows", [4, 24])
def test_coverage_by_simulation(windows):
    """95 % intervals of a difference of perplexities hold the truth about 95 % of the time."""
    draw = np.random.default_rng(7)
    mean, spread, shift, noise = 3.0, 0.3, 0.1, 0.05
    truth = np.exp(mean + shift) - np.exp(mean)
    trials = 2000
    base = draw.normal(mean, spread, (trials, windows))
    moved = base + shift + draw.normal(0, noise, (trials, windows))
    found = [difference(one, other) for one, other in zip(moved, base, strict=True)]
    assert 0.92 <= np.mean([d.low <= truth <= d.high for d in found]) <= 0.98


def test_many_models_at_once_are_the_same_as_two_by_two():
    scores = np.random.default_rng(1).normal(3, 0.3, (5, 9))
    paired = Paired(scores)
    assert paired.difference(3, 1) == difference(scores[3], scores[1])
