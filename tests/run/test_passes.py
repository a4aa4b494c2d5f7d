"""A point in a pass is the point alone, to the bit; and what the whole model computes, to rounding."""

import weakref
from dataclasses import replace

import pytest
import torch

from qbench.errors import RequestError
from qbench.evaluate import speed
from qbench.passes.variant import Variant
from qbench.passes.walk import Walk
from qbench.run import run_pass
from qbench.run.whole import whole

SHORT = ("task.window=64", "task.max_windows=5", "calibration.window=64", "calibration.sequences=4")
METHODS = [f"quantizer={name}" for name in ("none", "rtn", "hqq", "nf4", "gptq", "awq", "sinq", "asinq")]
ORIGINAL = "calibration.inputs=original"


def together(points):
    return {point.run_id: result for point, result in run_pass(points)}


def measured(result):
    """All of a result that the pass must not change."""
    assert result.status == "ok", result.error
    rows = [replace(row, seconds=0) for row in result.quantization.layers]
    quantization = replace(
        result.quantization, quant_seconds=0, wall_seconds=0, peak_alloc_bytes=None, peak_rss_bytes=None, layers=rows
    )
    evaluation = [replace(record, baseline_cached=False) for record in result.evaluation]
    return result.model, quantization, evaluation


def check_alone(prepared, settings, methods):
    points = [prepared(*settings, method) for method in methods]
    results = together(points)
    assert list(results) == [point.run_id for point in points]
    assert {result.pass_points for result in results.values()} == {len(points)}
    assert len({result.pass_id for result in results.values()}) == 1
    for method, point in zip(methods, points, strict=True):
        alone = prepared(*settings, method, outputs="alone")
        assert alone.run_id == point.run_id
        [(_, result)] = run_pass([alone])
        assert result.pass_id is None
        assert measured(result) == measured(results[point.run_id])


@pytest.mark.parametrize("model", ["tiny-dense", pytest.param("tiny-moe", marks=pytest.mark.slow)])
def test_a_point_in_a_pass_is_the_point_alone(prepared, model):
    settings = (f"model={model}", *SHORT, "runtime.batch_size=2")
    methods = METHODS[:4] + [f"{method} quantizer.nbits=3" for method in METHODS[4:]]
    check_alone(prepared, settings, methods)


@pytest.mark.slow
def test_calibrations_on_the_original_are_shared_and_change_nothing(prepared, monkeypatch):
    """GPTQ wants a Hessian, AWQ and A-SINQ other statistics: they are collected once, on the same states."""
    check_alone(prepared, ("model=tiny-moe", *SHORT, ORIGINAL), METHODS[4:])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-dense", "tiny-moe"])
@pytest.mark.parametrize("nbits", [4, 3])
def test_it_is_what_the_whole_model_computes(prepared, model, nbits):
    methods = [m if "none" in m or "nf4" in m else f"{m} quantizer.nbits={nbits}" for m in METHODS]
    points = [prepared(f"model={model}", *SHORT, method) for method in methods]
    results = together(points)
    for point, method in zip(points, methods, strict=True):
        other = whole(prepared(f"model={model}", *SHORT, method, outputs="whole")).result
        ours, theirs = measured(results[point.run_id]), measured(other)
        assert ours[0] == theirs[0]
        assert replace(ours[1], layers=[]) == replace(theirs[1], layers=[])
        assert [row.relative_error for row in ours[1].layers] == pytest.approx(
            [row.relative_error for row in theirs[1].layers], rel=1e-3
        )
        assert ours[2][0].ppl == pytest.approx(theirs[2][0].ppl, rel=1e-6)
        assert ours[2][0].baseline_ppl == pytest.approx(theirs[2][0].baseline_ppl, rel=1e-6)


@pytest.mark.slow
def test_a_checkpoint_out_of_a_pass_is_the_one_of_the_point_alone(prepared, tmp_path):
    """Every file of it to the bit; and what was written is let go before the next one is."""
    methods = ("rtn", "gptq", "sinq quantizer.nbits=3")
    settings = ("model=tiny-moe", *SHORT)

    def exported(method, outputs):
        folder = f"export.dir={tmp_path / outputs}-{method[:4]}"
        return prepared(*settings, f"quantizer={method}", folder, outputs=outputs)

    points = [*(exported(method, "together") for method in methods), prepared(*settings, "quantizer=hqq")]
    results = together(points)
    assert {result.pass_points for result in results.values()} == {4}
    for method, point in zip(methods, points, strict=False):
        [(_, alone)] = run_pass([exported(method, "alone")])
        assert measured(alone) == measured(results[point.run_id])
        ours, theirs = (tmp_path / f"{outputs}-{method[:4]}" for outputs in ("together", "alone"))
        files = {path.name: path.read_bytes() for path in theirs.iterdir()}
        assert len(files) > 3
        assert {path.name: path.read_bytes() for path in ours.iterdir()} == files


@pytest.mark.slow
def test_the_reference_model_in_a_pass_alone_and_whole(prepared, smollm2_folder, tmp_path):
    for outputs in ("together", "alone", "whole"):  # the converted model is made once
        (tmp_path / outputs).mkdir()
        (tmp_path / outputs / "models").symlink_to(smollm2_folder.parent)
    settings = ("task.window=128", "task.max_windows=2", "calibration.window=128", "calibration.sequences=1")
    methods = ["none", "rtn", "nf4", "gptq quantizer.nbits=3", "sinq quantizer.nbits=3"]
    points = [prepared(*settings, f"quantizer={method}") for method in methods]
    results = together(points)
    for point, method in zip(points, methods, strict=True):
        [(_, alone)] = run_pass([prepared(*settings, f"quantizer={method}", outputs="alone")])
        assert measured(alone) == measured(results[point.run_id])
    for method, point in [*zip(methods, points, strict=True)][1:3]:
        other = whole(prepared(*settings, f"quantizer={method}", outputs="whole")).result
        assert other.evaluation[0].ppl == pytest.approx(results[point.run_id].evaluation[0].ppl, rel=1e-6)


def test_the_original_as_a_row_is_measured_where_its_states_were_not_kept(prepared):
    settings = ("model=tiny-dense", *SHORT, "task.divergence=false")
    together([prepared(*settings, "quantizer=rtn")])
    [result] = together([prepared(*settings, "quantizer=none")]).values()
    assert result.status == "ok", result.error
    assert result.evaluation[0].ppl_delta == 0


def test_the_original_as_a_row_is_the_same_where_its_states_were_kept(prepared):
    settings = ("model=tiny-dense", *SHORT)
    [first] = together([prepared(*settings, "quantizer=none")]).values()
    together([prepared(*settings, "quantizer=rtn", outputs="other")])
    [again] = together([prepared(*settings, "quantizer=none", outputs="other")]).values()
    assert again.evaluation[0].baseline_cached
    assert measured(again) == measured(first)


def test_a_variant_that_fails_drops_out_alone(prepared, monkeypatch):
    points = [
        prepared("model=tiny-dense", *SHORT, method) for method in ("quantizer=rtn", "quantizer=hqq", "quantizer=nf4")
    ]
    quantize = Variant.quantize

    def broken(self, i, *others):
        if self.label.startswith("hqq") and i == 1:
            raise MemoryError("no room for it")
        return quantize(self, i, *others)

    monkeypatch.setattr(Variant, "quantize", broken)
    seen = [(point, result.status, result.error) for point, result in run_pass(points)]
    assert seen[0] == (points[1], "failed", "MemoryError: no room for it")  # known and recorded before the others
    assert [(point, status) for point, status, _ in seen[1:]] == [(points[0], "ok"), (points[2], "ok")]
    assert points[1].store.load(points[1].run_id).status == "failed"


def test_nan_names_model_window_and_block(prepared, monkeypatch):
    points = [prepared("model=tiny-dense", *SHORT, method) for method in ("quantizer=rtn", "quantizer=sinq")]
    quantize = Variant.quantize

    def spoiled(self, i, *others):
        block = quantize(self, i, *others)
        if self.label.startswith("sinq") and i == 1:
            block.register_forward_hook(nan_in_window_3())
        return block

    monkeypatch.setattr(Variant, "quantize", spoiled)
    results = together(points)
    assert results[points[0].run_id].status == "ok"
    error = results[points[1].run_id].error
    assert error == "the quantized model gives NaN or Inf in window 3, first in the output of model.layers.1"


def nan_in_window_3():
    calls = iter(range(100))

    def hook(module, args, output):
        states = output if isinstance(output, torch.Tensor) else output[0]
        if next(calls) == 3:
            states[0, 5, 0] = torch.nan

    return hook


def test_states_that_fit_nowhere_are_refused_with_what_helps(prepared, monkeypatch):
    import psutil

    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=1000))
    with pytest.raises(RequestError, match=r"task\.max_windows"):
        list(run_pass([prepared("model=tiny-dense", *SHORT)]))


SPEED = ("speed=default", "speed.prefill_tokens=16", "speed.context_tokens=8", "speed.decode_tokens=2")


@pytest.mark.parametrize("quantizer", ["rtn", "none"])
def test_a_timed_original_is_gone_before_the_walk(prepared, tmp_path, tiny, monkeypatch, quantizer):
    """What is timed is the original whole, then the variant; while blocks are walked, nothing holds the original's."""
    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    token, walk, timed, blocks = torch.tensor([[1, 2, 3]]), Walk.run, [], []

    def measure(model, config):
        timed.append(model(token).logits)
        blocks.extend(map(weakref.ref, model.model.layers))
        return measured_speed(model, config)

    def run(self, *args):
        assert not any(block() for block in blocks)
        return walk(self, *args)

    measured_speed = speed.measure
    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(Walk, "run", run)
    point = prepared("model=local", f"model.path={tmp_path / 'model'}", f"quantizer={quantizer}", *SHORT, *SPEED)
    [(_, result)] = run_pass([point])
    assert result.status == "ok", result.error
    assert torch.equal(timed[0], model(token).logits)
    assert [result.speed.baseline is None, len(timed)] == ([True, 1] if quantizer == "none" else [False, 2])
    if len(timed) == 2:
        assert 0 < (timed[1] - timed[0]).norm() < 0.5 * timed[0].norm()


def test_an_original_that_does_not_fit_is_one_sentence(prepared, monkeypatch):
    def original(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Walk, "original", original)
    [(_, result)] = run_pass([prepared("model=tiny-dense", "quantizer=rtn", *SHORT, *SPEED)])
    assert result.error == "tiny-dense does not fit on the GPU as it is; runtime.offload=true times it quantized"
