"""What a board may say: ranks with draws, corrections and a floor, and the sentences that say it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from qbench import leaderboard
from qbench.intervals import paired_delta, perplexity
from qbench.record.quality import DivergenceRecord, IntervalRecord, PartRecord
from qbench.report import board, columns, entries
from qbench.report.noise import Paired, Told, difference
from qbench.significance import holm, mcnemar
from tests.report.examples import BASELINE, nll, point, save, tasked


def sections(folder, *points):
    return board.sections(entries.read(save(folder, *points)).entries, *columns.order("quality"))


def drawn(method: str, shift: float, spread: float, draws: int = 5, seed: int = 0, rest: float = 0.002):
    """A point of several draws, each of which is a perplexity of its own."""
    random = np.random.default_rng(seed)
    moved = random.normal(0, spread, draws)
    table = (BASELINE + shift)[:, None] + moved - moved.mean() + random.normal(0, rest, (len(BASELINE), draws))
    result, files = point(method, windows=table.mean(1))
    delta = paired_delta(table.mean(1), BASELINE, draws=table)
    [record] = result.evaluation
    record = replace(record, ppl_delta_low=delta.low, ppl_delta_high=delta.high, draws=np.exp(table.mean(0)).tolist())
    return replace(result, evaluation=[record]), files | {"draws/quantized": table}


def noise(size: float, kl: float = 1e-4):
    result, files = point("noise", bits=16.0, windows=BASELINE + np.random.default_rng(9).normal(0, size, 24))
    return diverged((result, files), kl)


def diverged(made, kl, parts=(1.0, 1.0)):
    result, files = made
    interval = IntervalRecord(kl, 0.9 * kl, 1.1 * kl)
    places = [PartRecord(1.0 + 9 * i, 9.0 + 9 * i, 0.5, kl * part, 0.1) for i, part in enumerate(parts)]
    record = DivergenceRecord(
        *(100, interval, interval, kl, kl, kl, kl, kl, 0.5, kl, kl, IntervalRecord(0.9, 0.8, 1.0), interval),
        by_position=places,
        kl_histogram=[0, *[2] * 50, 0],
    )
    return replace(result, evaluation=[replace(result.evaluation[0], divergence=record)]), files


def ranks(section):
    return {row.entry.quantizer: row.rank for row in section.rows}


def test_draws_that_scatter_are_not_ranked(tmp_path):
    """By the windows alone the two would be told apart, whatever another draw of calibration text would give."""
    [certain] = sections(tmp_path / "1", drawn("gptq", 0.10, 0.0005), drawn("awq", 0.11, 0.0005, seed=1))
    assert ranks(certain) == {"gptq": 1, "awq": 2}
    [scattered] = sections(tmp_path / "2", drawn("gptq", 0.10, 0.02), drawn("awq", 0.11, 0.02, seed=1))
    assert ranks(scattered) == {"gptq": 1, "awq": 1}
    tie = scattered.rows[1]
    assert tie.tied
    assert tie.detectable > abs(tie.score.value - scattered.rows[0].score.value)
    said = " ".join(scattered.sentences)
    assert "cannot be told apart with these 24 windows and 5 draws" in said
    assert "more draws would, and no number of windows" in said


def test_two_rows_of_one_number_are_called_equal(tmp_path):
    [section] = sections(tmp_path, point("sinq", 4, nll(0.2)), point("rtn", 4, nll(0.2)))
    [said] = [sentence for sentence in section.sentences if "told apart" in sentence]
    assert said.endswith("with these 24 windows: their numbers are equal.")


def test_a_difference_of_two_models_with_draws_pairs_windows_and_not_draws():
    random = np.random.default_rng(2)
    ours, theirs = (BASELINE[:, None] + random.normal(0, 0.05, n) + random.normal(0, 0.01, (24, n)) for n in (4, 6))
    means = [table.mean(1) for table in (ours, theirs)]
    found = difference(*means, "mean", draws=[ours, theirs])
    parts = [stats.sem(means[0] - means[1]) ** 2]
    for table in (ours, theirs):
        rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
        rest = (rest**2).sum() / (23 * (table.shape[1] - 1)) / table.size
        parts.append(table.mean(0).var(ddof=1) / table.shape[1] - rest)
    assert found.error == pytest.approx(np.sqrt(sum(parts)), rel=1e-9)
    assert found.value == pytest.approx(ours.mean() - theirs.mean())


@pytest.mark.parametrize("reading", ["mean", "exp mean"])
@pytest.mark.parametrize("weights", [None, np.arange(1.0, 25.0)])
def test_all_pairs_at_once_are_the_tests_of_two(reading, weights):
    random = np.random.default_rng(3)
    tables = [BASELINE[:, None] + random.normal(0, 0.02, n) + random.normal(0, 0.02, (24, n)) for n in (4, 3, 5)]
    tables = [*tables, None, None]
    scores = np.stack([*(table.mean(1) for table in tables[:3]), nll(0, 5), nll(0.02, 6)])
    paired = Paired(scores, reading, weights, draws=tables)
    p = paired.p_values()
    for i in range(5):
        assert np.isnan(p[i, i])
        for j in range(i + 1, 5):
            found = paired.difference(i, j)
            expected = 2 * stats.t.sf(abs(found.value) / found.error, found.dof)
            assert p[i, j] == p[j, i] == pytest.approx(expected, rel=1e-9)
    told = Told.of(paired)
    np.testing.assert_allclose(told.adjusted[np.triu_indices(5, 1)], holm(p[np.triu_indices(5, 1)]))
    assert told.comparisons == 10


def test_many_rows_need_more_than_two_do(tmp_path):
    """One pair of twenty equal rows is different by chance; as two rows it is, among twenty it is not."""
    one, other = nll(0.1, 1), nll(0.1, 1) + 0.004 + np.tile([0.007, -0.007], 12)
    [two] = sections(tmp_path / "two", point("rtn", windows=one), point("nf4", windows=other))
    assert sorted(ranks(two).values()) == [1, 2]
    more = [point(f"m{i}", windows=nll(0.1 + 0.001 * i, 10 + i)) for i in range(18)]
    [many] = sections(tmp_path / "many", point("rtn", windows=one), point("nf4", windows=other), *more)
    assert {ranks(many)[name] for name in ("rtn", "nf4")} == {1}
    assert any("190 comparisons" in sentence and "Holm" in sentence for sentence in many.sentences)


def test_right_and_wrong_answers_are_compared_by_mcnemar(tmp_path):
    right = np.random.default_rng(0).random(200) < 0.6
    better, little = right.copy(), right.copy()
    better[np.flatnonzero(~right)[:9]] = True  # nine gained, none lost
    little[np.flatnonzero(~right)[:5]] = True  # five gained: exact McNemar says 0.0625
    made = [tasked(name, values.astype(float)) for name, values in (("rtn", right), ("nf4", better), ("hqq", little))]
    acc = next(s for s in sections(tmp_path, *made) if s.metric == "acc")
    paired = Paired(np.stack([values.astype(float) for values in (right, better, little)]), "mean")
    p = paired.p_values()
    assert p[0, 1] == pytest.approx(mcnemar(9, 0)) == pytest.approx(2 / 2**9)
    assert p[0, 2] == pytest.approx(0.0625)
    assert ranks(acc) == {"nf4": 1, "hqq": 1, "rtn": 3}
    assert any("more documents would" in sentence for sentence in acc.sentences)


def test_nothing_is_ranked_below_the_floor(tmp_path):
    close = [point("rtn", windows=nll(0.1, 1)), point("nf4", windows=nll(0.1, 1) + 0.002)]
    [without] = sections(tmp_path / "without", *close)
    assert (ranks(without), without.floor) == ({"rtn": 1, "nf4": 2}, None)
    [section] = sections(tmp_path / "with", *close, noise(0.01))
    assert ranks(section) == {"rtn": 1, "nf4": 1, "noise": None}
    row = next(row for row in section.rows if row.floor)
    low, high = row.score.number.delta_low, row.score.number.delta_high
    assert section.floor == max(abs(low), abs(high)) > perplexity(nll(0.1, 1) + 0.002) - perplexity(nll(0.1, 1))
    assert row.front == board.BEATEN
    assert any("no more than rounding noise does" in sentence for sentence in section.sentences)
    assert any(sentence.startswith("Rounding noise of float32") for sentence in section.sentences)


def test_the_silent_zone(tmp_path):
    made = [diverged(point("rtn", windows=nll(0.3)), 0.2, (0.5, 1.5)), diverged(point("q8", windows=nll(0.01)), 5e-4)]
    [section] = sections(tmp_path, *made, noise(1e-4, kl=1e-4))
    assert {row.entry.quantizer: row.silent for row in section.rows} == {"rtn": False, "q8": True, "noise": False}
    said = " ".join(section.sentences)
    assert "q8 at 4 bits, group 64 lies in the silent zone" in said
    assert "the KL of rtn at 4 bits, group 64 is 0.3000 from token 10 on, 3.0 times that of the first 9" in said


def test_every_format_says_the_same(tmp_path, capsys):
    folder = save(
        tmp_path, diverged(drawn("gptq", 0.1, 0.01), 0.1), diverged(drawn("awq", 0.101, 0.01, seed=4), 0.1), noise(1e-3)
    )
    told = {}
    for style in ("md", "json", "html", "table"):
        assert leaderboard.main([str(folder), "--format", style]) == 0
        told[style] = capsys.readouterr().out
    [section] = json.loads(told["json"])
    rows = {row["quantizer"]: row for row in section["rows"]}
    assert rows["gptq"]["draws"] == 5
    assert rows["gptq"]["draws_spread"] > 0
    assert max(row["detectable"] or 0 for row in rows.values()) > 0
    assert section["floor"] > 0
    assert section["floor_kl"] == pytest.approx(1.1e-4)
    sentence = next(note for note in section["notes"] if "cannot be told apart" in note)
    assert sentence in told["html"]
    assert sentence.replace("*", r"\*") in told["md"]
    assert "".join(sentence.split()) in "".join(told["table"].split())
    data = json.loads(told["html"].split('id="data">')[1].split("</script>")[0])
    assert data["sections"][0]["floor"] == pytest.approx(section["floor"])
    drawn_rows = [row for row in data["sections"][0]["rows"] if not row["floor"]]
    assert sum(drawn_rows[0]["kl"]) == pytest.approx(1, abs=1e-4)
    assert len(drawn_rows[0]["kl"]) == len(data["edges"]) + 1


def test_draws_that_are_not_those_of_the_scores_are_a_problem(tmp_path):
    result, files = drawn("gptq", 0.1, 0.01)
    recorded = entries.read(save(tmp_path, (result, files | {"draws/quantized": files["draws/quantized"] + 1})))
    assert "its draws are not those of its scores" in recorded.problems[0]
    assert recorded.entries[0].scores[0].windows is None
