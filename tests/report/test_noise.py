import numpy as np
import pytest

from qbench.intervals import paired_delta
from qbench.report.noise import Paired, difference, is_real


def test_the_value_is_the_difference_of_the_perplexities():
    first, second = np.random.default_rng(0).normal(3, 0.3, (2, 24))
    assert difference(first, second, "exp mean").value == pytest.approx(np.exp(first.mean()) - np.exp(second.mean()))
    assert difference(first, second, "mean").value == pytest.approx(first.mean() - second.mean())
    tokens = np.arange(1.0, 25.0)
    weighted = np.exp(np.average(first, weights=tokens)) - np.exp(np.average(second, weights=tokens))
    assert difference(first, second, "exp mean", weights=tokens).value == pytest.approx(weighted)


def test_a_model_does_not_differ_from_itself_nor_a_single_window_from_anything():
    first = np.random.default_rng(0).normal(3, 0.3, 24)
    same = difference(first, first, "exp mean")
    assert (same.value, same.low, same.high, is_real(same)) == (0, 0, 0, False)
    single = difference(np.array([2.0]), np.array([1.0]), "exp mean")
    assert (single.low, single.high, is_real(single)) == (None, None, False)


def test_for_a_mean_it_is_students_paired_interval():
    from scipy import stats

    first, second = np.random.default_rng(3).normal(0.5, 0.2, (2, 12))
    found, student = difference(first, second, "mean"), stats.ttest_rel(first, second).confidence_interval()
    assert (found.low, found.high) == pytest.approx((student.low, student.high))


@pytest.mark.parametrize("weights", [None, np.arange(1.0, 10.0)])
def test_for_perplexities_it_is_the_interval_of_every_result(weights):
    first, second = np.random.default_rng(5).normal(3, 0.3, (2, 9))
    found, told = difference(first, second, "exp mean", weights=weights), paired_delta(first, second, weights=weights)
    assert (found.value, found.low, found.high) == pytest.approx((told.value, told.low, told.high))


def test_many_models_at_once_are_the_same_as_two_by_two():
    scores = np.random.default_rng(1).normal(3, 0.3, (5, 9))
    paired = Paired(scores, "exp mean")
    assert paired.difference(3, 1) == difference(scores[3], scores[1], "exp mean")
