"""Tests and what they could have found, against scipy's and statsmodels' own, on random inputs."""

import numpy as np
import pytest
from scipy import integrate, stats

from qbench import significance
from qbench.intervals import Drawn, Estimate, exp_adds, jackknife, paired_delta, with_draws


def test_exact_mcnemar_is_the_binomial_test():
    draw = np.random.default_rng(0)
    gained, lost = draw.integers(0, 60, (2, 40))
    pairs = [(int(g), int(g + w)) for g, w in zip(gained, lost, strict=True)]
    theirs = [stats.binomtest(g, n, 0.5).pvalue if n else 1.0 for g, n in pairs]
    np.testing.assert_allclose(significance.mcnemar(gained, lost), theirs, rtol=1e-9)
    assert significance.mcnemar(0, 0) == 1
    assert significance.mcnemar(5, 0) > 0.05 > significance.mcnemar(significance.FEWEST, 0)


def test_students_p_value_is_scipys_paired_test():
    first, second = np.random.default_rng(1).normal(3, 0.3, (2, 14))
    found = jackknife(lambda m: m, first - second)
    p = significance.student(found.value, found.error, found.dof)
    assert p == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-9)
    assert (p < 0.05) == (found.low > 0 or found.high < 0)
    assert significance.student(0.0, 0.0, 3) == 1
    assert significance.student(0.1, 0.0, 3) == 0


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_statsmodels(seed):
    contingency = pytest.importorskip("statsmodels.stats.contingency_tables")
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    power = pytest.importorskip("statsmodels.stats.power")
    draw = np.random.default_rng(seed)
    gained, lost = (int(n) for n in draw.integers(0, 40, 2))
    theirs = contingency.mcnemar([[100, gained], [lost, 100]], exact=True)
    assert significance.mcnemar(gained, lost) == pytest.approx(theirs.pvalue, abs=1e-9)
    p = draw.uniform(0, 1, 30) ** 3
    np.testing.assert_allclose(significance.holm(p), multitest.multipletests(p, method="holm")[1], atol=1e-9)
    windows, level = int(draw.integers(5, 200)), float(draw.uniform(0.01, 0.1))
    effect = draw.uniform(0.1, 5) / np.sqrt(windows)
    theirs = power.TTestPower().power(effect, windows, level)
    assert significance.power_of_t(effect * np.sqrt(windows), windows - 1, level) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize(("dof", "level"), [(3, 0.05), (11, 0.05 / 6), (47, 0.05), (7.4, 0.01)])
def test_what_a_t_test_could_have_found(dof, level):
    """The mean power over all errors that may have been estimated is 0.8, by scipy's own distributions."""
    smallest = significance.detectable(2.0, dof, level) / 2.0
    edge = stats.t.ppf(1 - level / 2, dof)

    def found(ratio):  # estimated error over the true one
        chance = stats.nct.sf(edge, dof, smallest * ratio) + np.nan_to_num(stats.nct.cdf(-edge, dof, smallest * ratio))
        return chance * stats.chi.pdf(ratio * np.sqrt(dof), dof) * np.sqrt(dof)

    total = integrate.quad(found, 0, 8, points=[1], epsabs=1e-12, limit=200)[0]
    assert total == pytest.approx(0.8, abs=1e-8)


def test_with_many_windows_it_is_the_usual_formula():
    usual = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert significance.detectable(0.5, 20_000) == pytest.approx(0.5 * usual, rel=1e-3)


def test_holm_by_hand_and_with_tests_that_are_none():
    np.testing.assert_allclose(significance.holm(np.array([0.01, 0.04, 0.03])), [0.03, 0.06, 0.06])
    found = significance.holm(np.array([np.nan, 0.5, 0.02]))
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1:], [0.5, 0.04])


@pytest.mark.parametrize("documents", [40, 300])
@pytest.mark.parametrize("changed", [0.02, 0.2, 0.6])
def test_the_power_of_mcnemar_is_the_sum_over_everything_that_can_happen(documents, changed):
    difference = 0.7 * changed
    total = 0.0
    for count in range(documents + 1):
        gained = np.arange(count + 1)
        rejected = significance.mcnemar(gained, count - gained) < 0.05
        chance = stats.binom.pmf(gained, count, 0.5 * (1 + difference / changed))
        total += stats.binom.pmf(count, documents, changed) * chance[rejected].sum()
    assert significance.power_of_mcnemar(difference, changed, documents) == pytest.approx(total, abs=1e-9)


def test_what_mcnemar_could_have_found():
    smallest = significance.detectable_share(0.1, 500)
    assert significance.power_of_mcnemar(smallest, 0.1, 500) == pytest.approx(0.8, abs=1e-9)
    assert 0.035 < smallest < 0.05  # (z_a/2 + z_b) sqrt(0.1 / 500) = 0.0396, for a test that is not exact
    few = significance.detectable_share(0.0, 500)  # nothing changed: as many would have to, all in one direction
    assert significance.power_of_mcnemar(few, few, 500) == pytest.approx(0.8, abs=1e-9)
    assert significance.detectable_share(0.2, 5) is None


def test_how_many_more_would_show_it():
    assert significance.more_needed(1.0, 2.0, 10) == 30
    assert significance.more_needed(0.0, 2.0, 10) is None


def test_draws_are_random_effects_paired_over_windows():
    """The variance, by the textbook's mean squares of a balanced table."""
    table = np.random.default_rng(4).normal(0, 1, (9, 5)) + np.random.default_rng(5).normal(0, 1, 5)
    windows, draws = table.shape
    ms_draws = windows * table.mean(0).var(ddof=1)
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    ms_rest = (rest**2).sum() / (windows - 1) / (draws - 1)
    ms_windows = draws * table.mean(1).var(ddof=1)
    variance = (ms_windows + ms_draws - ms_rest) / table.size
    spread = ms_windows**2 / (windows - 1) + ms_draws**2 / (draws - 1) + ms_rest**2 / ((windows - 1) * (draws - 1))
    found = with_draws(jackknife(lambda m: m, table.mean(1)), Drawn.of(table))
    assert found.error == pytest.approx(np.sqrt(variance), rel=1e-9)
    assert found.dof == pytest.approx(variance**2 * table.size**2 / spread, rel=1e-9)
    reach = stats.t.ppf(0.975, found.dof) * found.error
    assert (found.low, found.high) == pytest.approx((found.value - reach, found.value + reach), rel=1e-9)


def test_one_draw_says_nothing_of_draws():
    plain = Estimate(1.0, 0.5, 1.5, 0.2, 7)
    assert with_draws(plain, Drawn.of(np.ones((8, 1)))) is plain
    nll, base = np.random.default_rng(0).normal(3, 0.1, (2, 8))
    assert paired_delta(nll, base, draws=nll[:, None]) == paired_delta(nll, base)


def test_what_windows_add_to_a_perplexity():
    nll, weights = np.random.default_rng(0).normal(3, 0.1, (12, 4)), np.arange(1.0, 13.0)
    adds = exp_adds(nll, weights)
    assert adds.mean() == pytest.approx(np.exp(np.average(nll.mean(1), weights=weights)))
    moved = nll.copy()
    moved[3, 1] += 1e-6
    by = np.exp(np.average(moved.mean(1), weights=weights)) - adds.mean()
    assert exp_adds(moved, weights).mean() - adds.mean() == pytest.approx(by, rel=1e-5)


@pytest.mark.parametrize(("windows", "draws", "spread"), [(12, 4, 0.02), (12, 4, 0.005), (40, 6, 0.05), (24, 3, 0.0)])
def test_intervals_with_draws_hold_the_truth(windows, draws, spread):
    """Draws that matter more than windows, less, and not at all."""
    draw, hits, trials = np.random.default_rng(7), 0, 600
    for _ in range(trials):
        base = draw.normal(3, 0.3, windows)
        own = base + 0.1 + draw.normal(0, 0.02, windows)
        table = own[:, None] + draw.normal(0, spread, draws) + draw.normal(0, 0.02, (windows, draws))
        found = paired_delta(table.mean(1), base, draws=table)
        hits += found.low <= np.exp(3.1) - np.exp(3) <= found.high
    assert 0.92 <= hits / trials <= 0.985
