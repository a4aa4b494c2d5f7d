"""A number of a third party's protocol is compared and shown as its record says, whatever its name."""

import math
from dataclasses import replace

import numpy as np
import pytest

from qbench.intervals import paired_delta
from qbench.record.result import Result
from qbench.report import board, columns, entries
from qbench.report.baseline import Baseline, Limits
from qbench.report.noise import Paired, difference
from qbench.report.regress import compare
from tests.report.examples import save, tasked

DRAW = np.random.default_rng(0)
NLL = DRAW.normal(2.0, 0.5, 60)
NEAR, FAR = NLL + DRAW.normal(0, 0.05, 60), NLL + 0.3


def point(quantizer, nll, day=1):
    """A perplexity per document that a task record holds, as no protocol that ships would."""
    result, scores = tasked(quantizer, nll, day=day)
    number = replace(
        result.tasks[0].metrics[0],
        name="code_ppl",
        title="perplexity of code",
        reading="exp mean",
        higher_is_better=False,
        value=math.exp(nll.mean()),
        baseline=math.exp(NLL.mean()),
        delta=math.exp(nll.mean()) - math.exp(NLL.mean()),
    )
    scores = {"quantized/pair/code_ppl,none": scores["quantized/pair/acc,none"]}
    return replace(result, tasks=[replace(result.tasks[0], metrics=[number])]), scores


@pytest.fixture
def recorded(tmp_path):
    return entries.read(save(tmp_path, point("sinq", NLL), point("hqq", NEAR), point("rtn", FAR)))


def test_it_is_ranked_by_the_noise_of_its_own_reading(recorded):
    [section] = board.sections(recorded.entries, *columns.order("quality"))
    assert [row.entry.quantizer for row in section.rows][-1] == "rtn"
    assert [row.rank for row in section.rows] == [1, 1, 3]
    windows = {row.entry.quantizer: row.score.windows for row in section.rows}
    found = difference(windows["rtn"], windows["sinq"], section.number.reading)
    told = paired_delta(FAR, NLL)
    assert (found.value, found.low, found.high) == pytest.approx((told.value, told.low, told.high))
    assert Paired(np.stack([FAR, NLL]), "mean").difference(0, 1).value == pytest.approx(0.3) != found.value


def test_it_is_shown_under_its_own_title(recorded):
    [section] = board.sections(recorded.entries, *columns.order("quality"))
    column = next(c for c in columns.columns(section) if c.key == "code_ppl")
    assert (column.title, column.digits) == ("perplexity of code", 3)
    assert columns.text(column, section.rows[-1]) == f"{math.exp(FAR.mean()):.3f}"


def test_the_gate_reads_it_likewise(recorded, tmp_path):
    baseline = Baseline.of(recorded.entries, Limits())
    assert {score.reading for each in baseline.points for score in each.scores} == {"exp mean"}
    worse = entries.read(save(tmp_path / "later", point("sinq", FAR, day=2)))
    [finding] = [f for f in compare(baseline, worse) if f.verdict == "regressed"]
    assert f"{math.exp(FAR.mean()) - math.exp(NLL.mean()):+.3g} (95 %" in str(finding)


def test_it_is_read_back_as_it_was_written():
    result, _ = point("sinq", NLL)
    assert Result.from_json(result.to_json()) == result
    with pytest.raises(ValueError, match="reading"):
        Result.from_json(result.to_json().replace('"exp mean"', '"median"'))
