"""A point in several draws: each is the variant that it would be alone, and the row is of their mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from qbench.errors import RequestError
from qbench.intervals import paired_delta
from qbench.passes.calibrate import cut_draws
from qbench.passes.variant import Variant
from qbench.quant.noise import Noise
from qbench.run import run_pass
from qbench.run.whole import whole
from tests.conftest import refused
from tests.evaluate import own_tasks
from tests.run.test_passes import SHORT, together

TINY = ("model=tiny-dense", *SHORT, "calibration.sequences=3")


def scores(point):
    folder = point.store.results / point.run_id
    [record] = point.store.load(point.run_id).evaluation
    return record, load_file(folder / record.window_nll_file)


@pytest.mark.slow
def test_a_row_is_of_the_mean_of_its_draws(prepared):
    one, three = (prepared(*TINY, "quantizer=gptq", f"calibration.draws={n}") for n in (1, 3))
    results = together([one, three])
    record, kept = scores(three)
    alone, single = scores(one)
    table = kept["draws/quantized"]
    assert table.shape == (5, 3)
    np.testing.assert_array_equal(table[:, 0], single["quantized"])  # the first draw is what a single one is
    assert len({*table.mean(0)}) == 3
    np.testing.assert_allclose(kept["quantized"], table.mean(1), rtol=1e-12)
    assert record.draws == pytest.approx(np.exp(table.mean(0)).tolist())
    assert record.draws[0] == alone.ppl
    assert record.ppl == pytest.approx(np.exp(table.mean()))
    assert record.ppl_delta == pytest.approx(record.ppl - record.baseline_ppl, abs=1e-12)
    told = paired_delta(kept["quantized"], kept["baseline"], draws=table)
    assert (record.ppl_delta_low, record.ppl_delta_high) == pytest.approx((told.low, told.high))
    windows_alone = paired_delta(kept["quantized"], kept["baseline"])
    assert told.high - told.low > windows_alone.high - windows_alone.low
    assert record.divergence.kl.value == pytest.approx(kept["draws/kl"].mean())
    assert record.divergence.tokens == alone.divergence.tokens
    assert sum(record.divergence.kl_histogram) == 3 * record.divergence.tokens
    assert record.perplexity.spread == pytest.approx(np.std(record.draws, ddof=1))
    shown = results[three.run_id].quantization.calibration
    assert shown.token_ids_sha256 == results[one.run_id].quantization.calibration.token_ids_sha256
    assert len({shown.token_ids_sha256, *shown.draws_sha256}) == 3


def test_a_draw_is_one_choice_for_every_method_and_another_of_the_same_text(prepared):
    point = prepared(*TINY, "quantizer=gptq")
    tokenizer = point.model.tokenizer(point.store.models)
    settings = point.config.calibration
    first, second, third = (c.ids for c in cut_draws(point.calibration_text, tokenizer, settings, range(3)))
    again = cut_draws(point.calibration_text, tokenizer, settings, range(2))
    np.testing.assert_array_equal(again[1].ids, second)
    ids = np.array(tokenizer(point.calibration_text.content)["input_ids"])
    np.testing.assert_array_equal(first.ravel(), ids[: first.size])
    for sequence in (*second, *third):
        assert any((ids[start : start + 64] == sequence).all() for start in range(len(ids) - 63))
    assert not np.array_equal(second, third)


@pytest.mark.slow
def test_tasks_have_draws_as_windows_do(prepared, tmp_path):
    own_tasks.write(tmp_path / "tasks", "choice", documents=20)
    task = f"task=lmeval task.names=[choice] task.window=512 task.include_path={tmp_path / 'tasks'}"
    settings = ("model=tiny-dense", task, "calibration.window=64", "calibration.sequences=3", "quantizer=gptq")
    one, two = (prepared(*settings, f"calibration.draws={n}") for n in (1, 2))
    results = together([one, two])
    [[single], [both]] = ([m for m in results[p.run_id].tasks[0].metrics if m.name == "acc"] for p in (one, two))
    assert both.draws[0] == single.value
    assert both.value == pytest.approx(np.mean(both.draws))
    assert both.delta == pytest.approx(both.value - both.baseline)
    assert both.delta_low <= both.delta <= both.delta_high


def test_draws_are_part_of_the_identity_of_what_they_change_alone(prepared):
    def identity(method, draws):
        return prepared(*TINY, f"quantizer={method}", f"calibration.draws={draws}").identity

    assert identity("rtn", 3) == identity("rtn", 1)
    assert "draws" not in identity("gptq", 1).calibration
    assert identity("gptq", 3).calibration == identity("gptq", 1).calibration | {"draws": 3}
    assert (identity("noise", 1).calibration, identity("noise", 2).calibration) == (None, {"draws": 2})


def test_the_draws_of_noise_are_its_seeds(prepared):
    seeds = [prepared(*TINY, f"quantizer=noise quantizer.seed={seed}") for seed in (4, 5)]
    both = prepared(*TINY, "quantizer=noise quantizer.seed=4 calibration.draws=2")
    together([*seeds, both])
    table = scores(both)[1]["draws/quantized"]
    for draw, seed in enumerate(seeds):
        np.testing.assert_array_equal(table[:, draw], scores(seed)[1]["quantized"])


def test_other_draws_go_on_where_the_first_ones_end(prepared):
    three = prepared(*TINY, "quantizer=gptq", "calibration.draws=3")
    last = prepared(*TINY, "quantizer=gptq", "calibration.first_draw=2")
    seeds = (
        prepared(*TINY, "quantizer=noise", "calibration.first_draw=4"),
        prepared(*TINY, "quantizer=noise quantizer.seed=4"),
    )
    together([three, last, *seeds])
    np.testing.assert_array_equal(scores(three)[1]["draws/quantized"][:, 2], scores(last)[1]["quantized"])
    np.testing.assert_array_equal(*(scores(point)[1]["quantized"] for point in seeds))
    assert last.identity.calibration["first_draw"] == 2
    with pytest.raises(RequestError, match=r"calibration\.first_draw must be"):
        prepared(*TINY, "quantizer=gptq", "calibration.first_draw=-1")


def test_a_rotation_is_drawn_where_there_is_one(prepared):
    rotated, plain = "quantizer=rtn quantizer.rotation=hadamard", "quantizer=rtn"
    assert [prepared(*TINY, method, "calibration.draws=2").draws for method in (rotated, plain)] == [2, 1]
    two, second = (
        prepared(*TINY, rotated, "calibration.draws=2"),
        prepared(*TINY, f"{rotated} quantizer.rotation_seed=1"),
    )
    together([two, second])
    np.testing.assert_array_equal(scores(two)[1]["draws/quantized"][:, 1], scores(second)[1]["quantized"])


def test_a_draw_that_fails_takes_its_point_along_and_no_other(prepared, monkeypatch):
    points = [prepared(*TINY, f"quantizer={method}", "calibration.draws=3") for method in ("gptq", "awq", "rtn")]
    quantize = Variant.quantize

    def broken(self, i, *others):
        if self.label == "gptq 4 draw 2 of 3":
            raise MemoryError("no room for it")
        return quantize(self, i, *others)

    monkeypatch.setattr(Variant, "quantize", broken)
    seen = [(point, result.status) for point, result in run_pass(points)]
    assert seen == [(points[0], "failed"), (points[1], "ok"), (points[2], "ok")]


def test_what_cannot_be_drawn_is_refused(prepared):
    with pytest.raises(RequestError) as refusal:
        prepared(*TINY, "quantizer=gptq", "calibration.draws=0")
    refused(refusal.value, names=["calibration.draws"])
    point = prepared(*TINY, "quantizer=gptq")
    tokenizer = point.model.tokenizer(point.store.models)
    few = replace(point.calibration_text, content=point.calibration_text.content[:60])
    tokens = len(tokenizer(few.content)["input_ids"])
    with pytest.raises(RequestError, match=r"too few for calibration\.draws=2"):
        cut_draws(few, tokenizer, replace(point.config.calibration, window=tokens), range(2))
    with pytest.raises(RequestError, match="use speed=none"):
        prepared(*TINY, "quantizer=noise", "speed=default")
    for setting in ("quantizer=noise", "quantizer=gptq calibration.draws=2"):
        assert "plain chain of blocks" in whole(prepared(*TINY, setting)).result.error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_floor_is_above_nothing_and_below_eight_bits(prepared, dtype):
    methods = ["none", "noise", *(f"{name} quantizer.nbits=8" for name in ("rtn", "hqq", "sinq"))]
    points = [prepared(*TINY, f"runtime.dtype={dtype}", f"quantizer={method}") for method in methods]
    results = together(points)
    assert all(point.recorded() is not None for point in points)  # asked again, they are there, whatever their coverage
    none, noise, *eight = (results[point.run_id].evaluation[0].divergence.kl.value for point in points)
    assert none == 0 < noise < min(eight)
    row = results[points[1].run_id]
    assert (row.quantization.quantizer, row.quantization.bits_per_weight, row.quantization.coverage) == ("noise", 16, 0)


def test_noise_is_a_fraction_of_the_precision_and_seeded():
    states = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0))
    noisy, again, other, batch = (states.clone() for _ in range(4))
    Noise().after_block(noisy, 2, 1)
    Noise().after_block(again, 2, 1)
    Noise(seed=1).after_block(other, 2, 1)
    Noise().after_block(batch, 2, 0)
    assert torch.equal(noisy, again)
    assert not any(torch.equal(noisy, x) for x in (states, other, batch))
    relative = noisy.double() / states.double() - 1
    assert relative.abs().max() < 6 * 2**-24
    assert relative.std() == pytest.approx(2**-24, rel=0.15)  # rounded once more
