"""Intervals hold the truth as often as they say, by simulation; verdicts follow from them."""

import numpy as np
import pytest

from qbench.intervals import (
    Drawn,
    Estimate,
    jackknife,
    paired_delta,
    paired_shares,
    perplexity,
    positive_mean,
    share,
    verdict,
)
from qbench.report.noise import Paired, Told


def test_perplexity_is_exp_of_the_mean():
    assert perplexity(np.array([1.0, 3.0])) == pytest.approx(np.exp(2))
    assert perplexity(np.array([1.0, 4.0]), np.array([2.0, 1.0])) == pytest.approx(np.exp(2))


def test_identical_models_differ_by_exactly_nothing():
    nll = np.random.default_rng(0).normal(3, 0.3, 24)
    assert paired_delta(nll, nll) == Estimate(0, 0, 0)
    assert positive_mean(np.zeros(5)) == Estimate(0, 0, 0)


def test_pairing_is_what_makes_the_interval_tight():
    draw = np.random.default_rng(0)
    baseline = draw.normal(3, 0.4, 40)
    quantized = baseline + 0.05 + draw.normal(0, 0.01, 40)
    paired = paired_delta(quantized, baseline)
    shuffled = paired_delta(draw.permutation(quantized), baseline)
    assert paired.low > 0
    assert paired.high - paired.low < (shuffled.high - shuffled.low) / 4


def test_single_windows_have_no_interval_and_mismatches_are_refused():
    delta = paired_delta(np.array([2.0]), np.array([1.0]))
    assert delta.low is None
    assert delta.high is None
    assert verdict(delta, higher_is_better=False) == "not distinguishable"
    assert positive_mean(np.array([2.0])) == Estimate(2.0, None, None)
    with pytest.raises(ValueError, match="must match"):
        paired_delta(np.zeros(3), np.zeros(4))


def test_the_jackknife_of_a_mean_is_students_interval():
    from scipy import stats

    values = np.random.default_rng(1).normal(5, 2, 9)
    found = jackknife(lambda m: m, values)
    low, high = stats.t.interval(0.95, 8, values.mean(), stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))


def test_shares_agree_with_scipys_and_with_the_published_example():
    from scipy import stats

    for successes, n in ((0, 20), (3, 50), (50, 50)):
        found, theirs = share(successes, n), stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    ours, base = np.array([1] * 6 + [0] * 44), np.array([0] * 2 + [1] * 4 + [1] * 14 + [0] * 30)
    found = paired_shares(ours, base)  # 2 gained, 14 lost of 50
    up, down = 3 / 52, 15 / 52
    reach = 1.959964 * np.sqrt((up + down - (up - down) ** 2) / 52)
    assert found.value == pytest.approx(-12 / 50)
    assert (found.low, found.high) == pytest.approx((up - down - reach, up - down + reach), rel=1e-6)


@pytest.mark.parametrize(
    ("interval", "higher_is_better", "says"),
    [
        ((0.5, 0.1, 0.9), True, "better"),
        ((0.5, 0.1, 0.9), False, "worse"),
        ((-0.5, -0.9, -0.1), False, "better"),
        ((0.5, -0.1, 1.1), True, "not distinguishable"),
        ((0.0, 0.0, 0.0), True, "not distinguishable"),
    ],
)
def test_verdicts(interval, higher_is_better, says):
    assert verdict(Estimate(*interval), higher_is_better) == says


MEAN, SPREAD, SHIFT, NOISE = 3.0, 0.3, 0.1, 0.05
TRUE_DELTA = np.exp(MEAN + SHIFT) - np.exp(MEAN)  # of the perplexities of endless texts


def models(draw, n):
    baseline = draw.normal(MEAN, SPREAD, n)
    return baseline + SHIFT + draw.normal(0, NOISE, n), baseline


def changed(draw, n, flips=0.1):
    """Right or wrong per document; one in ten changes, equally often from right and from wrong."""
    baseline = draw.random(n) < 0.6
    return np.where(draw.random(n) < flips, ~baseline, baseline).astype(int), baseline.astype(int)


def ppl_delta(draw, n):
    return paired_delta(*models(draw, n)), TRUE_DELTA


def ppl_delta_of_documents(draw, n):
    return paired_delta(*models(draw, n), weights=draw.lognormal(6, 0.5, n).round()), TRUE_DELTA


def kl(draw, n):
    return positive_mean(draw.gamma(4, 1 / 4, n)), 1.0  # spread: half of the mean


def rms(draw, n):
    return positive_mean(draw.gamma(4, 1 / 4, n), power=0.5), 1.0


def accuracy_delta(draw, n):
    return paired_shares(*changed(draw, 50 * n)), 0.1 * (0.4 - 0.6)


def flip_rate(draw, n):
    return share(int(draw.binomial(50 * n, 0.1)), 50 * n), 0.1


@pytest.mark.parametrize("measure", [ppl_delta, ppl_delta_of_documents, kl, rms, accuracy_delta, flip_rate])
@pytest.mark.parametrize("n", [4, 12, 54])
def test_coverage_by_simulation(measure, n):
    """95 % intervals contain the truth 93 to 97 % of the time, from 4 windows (200 documents) on."""
    draw = np.random.default_rng(11)
    trials = 1500
    hits = sum(found.low <= truth <= found.high for found, truth in (measure(draw, n) for _ in range(trials)))
    assert 0.93 <= hits / trials <= 0.97


RUNS = range(800)


@pytest.mark.parametrize(("effect", "least", "most"), [(0.0, 0.2, 0.3), (2.0, 0.99, 1.0)])
def test_draws_count_where_they_differ_by_more_than_windows_explain(effect, least, most):
    """A quarter of the time where they add nothing, which is the test's level, and always where they matter."""
    random = np.random.default_rng(3)
    tables = (random.normal(size=(24, 1)) + effect * random.normal(size=4) + random.normal(size=(24, 4)) for _ in RUNS)
    counted = [Drawn.of(table).adds for table in tables]
    assert least <= np.mean(counted) <= most


@pytest.mark.parametrize(("apart", "effect"), [(0.0, 0.0), (1.0, 0.0), (1.0, 0.3)])
def test_a_method_beside_itself_in_other_draws_is_seldom_different(apart, effect):
    """Two rows of one mean; their windows differ by `apart`, their draws by `effect`."""
    random, wrong = np.random.default_rng(5), 0
    for _ in RUNS:
        own, other = random.normal(size=(24, 1)), apart * random.normal(size=(24, 1))
        rows = [w + effect * random.normal(size=4) + random.normal(size=(24, 4)) for w in (own, own + other)]
        paired = Paired(np.stack([row.mean(1) for row in rows]), "mean", draws=rows)
        wrong += paired.p_values()[0, 1] < 0.05
    assert 0.02 <= wrong / len(RUNS) <= 0.06


@pytest.mark.parametrize(("rows", "draws"), [(6, 4), (12, 3)])
def test_a_board_of_equal_rows_is_seldom_wrong_about_any_pair(rows, draws):
    """Draws that matter so little that an F test at 25 % overlooks some rows': it would give 8 and 20 % of boards."""
    random, wrong, runs = np.random.default_rng(6), 0, 1200 // rows
    for _ in range(runs):
        own = random.normal(size=(24, 1))
        tables = [own + 0.35 * random.normal(size=draws) + random.normal(size=(24, draws)) for _ in range(rows)]
        told = Told.of(Paired(np.stack([table.mean(1) for table in tables]), "mean", draws=tables))
        wrong += bool((told.adjusted < 0.05).any())
    assert wrong / runs <= 0.05
