"""What each document adds to a number, whatever function of the documents the number is."""

import math

import numpy as np
import pytest
from lm_eval.api import metrics

from qbench import intervals as statistics
from qbench.evaluate import aggregate
from qbench.evaluate.documents import LeafScores, TaskScores

DRAW = np.random.default_rng(3)
LABELS = [(int(a), int(b)) for a, b in zip(DRAW.random(23) < 0.6, DRAW.random(23) < 0.5, strict=True)]
SENTENCES = [
    ("the river runs past the mill", " ".join(DRAW.permutation(["the", "river", "ran", "past", "a", "mill"])))
] * 2
SENTENCES += [
    (f"a {word} stood by the wall", f"the {word} stood by a wall") for word in ["cat", "boy", "bird", "horse"]
]
LIKELIHOODS = DRAW.normal(-3, 1, 23).tolist()


@pytest.mark.parametrize(
    ("function", "items"),
    [
        (metrics.perplexity, LIKELIHOODS),
        (metrics.weighted_perplexity, list(zip(LIKELIHOODS, DRAW.integers(1, 9, 23).tolist(), strict=True))),
        (metrics.bits_per_byte, list(zip(LIKELIHOODS, DRAW.integers(1, 9, 23).tolist(), strict=True))),
        (metrics.f1_score, LABELS),
        (metrics.matthews_corrcoef, LABELS),
        (metrics.bleu, SENTENCES),
        (lambda items: max(items) - min(items), LIKELIHOODS),
    ],
)
def test_contributions_carry_the_number_and_the_jackknife_of_its_own_function(function, items):
    value = float(function(items))
    found = aggregate.contributions(function, items, value)
    assert found.mean() == pytest.approx(value, rel=1e-12)
    n = len(items)
    left_out = np.array([function(items[:i] + items[i + 1 :]) for i in range(n)])
    expected = math.sqrt((n - 1) / n * np.square(left_out - left_out.mean()).sum())
    assert found.std(ddof=1) / math.sqrt(n) == pytest.approx(expected, rel=1e-9)
    assert aggregate.own_values(function, items) is None


def test_a_perplexity_over_documents_is_compared_as_windows_are():
    ours, theirs = DRAW.normal(3, 1, 20), DRAW.normal(2.8, 1, 20)
    added = [aggregate.contributions(metrics.perplexity, (-x).tolist(), np.exp(x.mean())) for x in (ours, theirs)]
    found = statistics.jackknife(lambda m: m, added[0] - added[1])
    expected = statistics.paired_delta(ours, theirs)
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


@pytest.mark.parametrize("count", [7, 250])
def test_a_mean_is_known_by_what_it_does(count):
    right = (DRAW.random(count) < 0.5).astype(int).tolist()
    assert aggregate.own_values(lambda items: sum(items) / len(items), right).tolist() == right
    assert aggregate.own_values(metrics.mean, right).tolist() == right
    assert aggregate.own_values(lambda items: 100 * sum(items) / len(items), right) is None


def test_many_documents_are_left_out_in_blocks():
    items = DRAW.normal(0, 1, 1000)
    calls = []

    def root(part):
        calls.append(len(part))
        return math.sqrt(np.square(part).mean())

    found = aggregate.contributions(root, items.tolist(), root(items))
    assert len(found) == aggregate.BLOCKS == len(calls) - 1
    error = found.std(ddof=1) / math.sqrt(len(found))
    assert error == pytest.approx(np.square(items).std() / (2 * root(items)) / math.sqrt(1000), rel=0.3)


def test_no_interval_where_none_can_be_had(monkeypatch):
    assert aggregate.contributions(metrics.median, LIKELIHOODS, -3.0) is None

    def needs_all(items):
        if len(items) < 23:
            raise ValueError("too few")
        return 1.0

    assert aggregate.contributions(needs_all, LIKELIHOODS, 1.0) is None
    monkeypatch.setattr(aggregate, "SECONDS", 0)
    assert aggregate.contributions(lambda items: float(len(items)), LIKELIHOODS, 23.0) is None


def test_tasks_of_unequal_weight_are_strata():
    parts = [DRAW.normal(0.2, 1, 40), DRAW.normal(0.9, 2, 4)]
    found = statistics.pooled_contributions(parts, [1, 1])
    assert found.mean() == pytest.approx((parts[0].mean() + parts[1].mean()) / 2, rel=1e-12)
    error = math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / 2
    assert found.std(ddof=1) / math.sqrt(44) == pytest.approx(error)
    assert statistics.pooled_contributions(parts, [40, 4]).tolist() == [*parts[0], *parts[1]]
    assert statistics.pooled_contributions([parts[0], np.array([1.0])], [1, 1]) is None


def test_scores_survive_being_kept():
    leaf = LeafScores(2, {"acc,none": 0.5, "f1,none": 0.4}, {"acc,none": np.array([0.0, 1.0])})
    leaf.contributions["f1,none"] = np.array([0.3, 0.5])
    rolling = LeafScores(1, {"word_perplexity,none": 9.0}, log_likelihood=np.array([-4.0]), tokens=np.array([3.0]))
    digest = np.arange(32, dtype=np.uint8)
    scores = TaskScores({"acc,none": 0.5}, {"a": leaf, "g": rolling}, digest, digest, truncated_prompts=1)
    arrays = scores.arrays("g") | {"g2|a|documents|acc,none": np.zeros(3)}
    again = TaskScores.of(arrays, "g", ["a", "g"])
    assert again.arrays("g").keys() == scores.arrays("g").keys()
    assert all(np.array_equal(again.arrays("g")[key], values) for key, values in scores.arrays("g").items())
    assert (again.numbers, again.documents, again.truncated_prompts) == ({"acc,none": 0.5}, 3, 1)
