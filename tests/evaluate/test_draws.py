"""Records of several draws become one: numbers of their mean, intervals of windows and draws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qbench.evaluate.draws import merged
from qbench.intervals import Drawn, jackknife, with_draws
from qbench.record.quality import MetricRecord, TaskRecord
from tests.report.examples import BASELINE, point, tasked

RIGHT = (np.random.default_rng(0).random(60) < 0.5).astype(float)


def answers(draw: int) -> np.ndarray:
    random = np.random.default_rng(draw)
    return np.where(random.random(60) < 0.15, 1 - RIGHT, RIGHT)


def of_task(draw: int, *others: MetricRecord) -> tuple[list, list[TaskRecord], dict]:
    ours = answers(draw)
    result, kept = tasked("gptq", ours)
    [record] = result.tasks
    value, flips = float(ours.mean()), float((ours != RIGHT).mean())
    metric = MetricRecord(
        "acc", True, value, RIGHT.mean(), value - RIGHT.mean(), -1, 1, "not distinguishable", flips, 0, 1
    )
    kept |= {"baseline/pair/acc,none": RIGHT}
    return [], [replace(record, metrics=[metric, *others])], {record.scores_file: kept}


def test_a_single_draw_is_itself():
    made = of_task(1)
    assert merged([made]) is made


def test_accuracies_are_means_over_draws():
    f1 = [MetricRecord("f1", True, value) for value in (0.5, 0.7, 0.9)]
    _, [record], files = merged([of_task(draw, f1[draw]) for draw in range(3)])
    acc, other = record.metrics
    table = np.stack([answers(draw) for draw in range(3)], 1)
    kept = files[record.scores_file]
    np.testing.assert_array_equal(kept["draws/quantized/pair/acc,none"], table)
    np.testing.assert_array_equal(kept["quantized/pair/acc,none"], table.mean(1))
    np.testing.assert_array_equal(kept["baseline/pair/acc,none"], RIGHT)
    assert acc.value == pytest.approx(table.mean())
    assert acc.draws == pytest.approx(table.mean(0).tolist())
    assert acc.delta == pytest.approx(acc.value - RIGHT.mean())
    told = with_draws(jackknife(lambda m: m, table.mean(1) - RIGHT), Drawn.of(table))
    assert (acc.delta_low, acc.delta_high) == pytest.approx((told.low, told.high))
    assert acc.flip_rate == pytest.approx((table != RIGHT[:, None]).mean())
    assert acc.flip_rate_low < acc.flip_rate < acc.flip_rate_high
    assert acc.p_value > 0
    assert acc.detectable > 0
    assert (other.value, other.delta, other.draws) == (pytest.approx(0.7), None, [0.5, 0.7, 0.9])


def test_a_metric_that_is_no_number_in_one_draw_is_undefined():
    with_f1, without = of_task(0, MetricRecord("f1", True, 0.5)), of_task(1)
    _, [record], _ = merged([with_f1, without])
    assert [metric.name for metric in record.metrics] == ["acc"]
    assert record.undefined_metrics == ["f1"]


def test_numbers_on_a_scale_of_their_own_are_read_off_the_mean():
    """lm-eval's perplexities of a word, which stand beside that of a token."""
    made = []
    for draw, shift in enumerate((0.1, 0.3)):
        result, files = point("gptq", windows=BASELINE + shift)
        word = MetricRecord("word_perplexity", False, float(np.exp(4 + shift)), float(np.exp(4.0)), reading="exp mean")
        [record] = result.evaluation
        record = replace(record, metrics=[word], window_nll_file=f"{draw}.safetensors")
        made.append(([record], [], {record.window_nll_file: files}))
    [record], [], files = merged(made)
    [word] = record.metrics
    assert word.value == pytest.approx(np.exp(4.2))
    assert word.delta == pytest.approx(word.value - np.exp(4))
    assert record.ppl == pytest.approx(np.exp(BASELINE.mean() + 0.2))
    assert list(files) == [record.window_nll_file]
