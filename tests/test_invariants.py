"""What this project promises, each promise as a test: the file to read first.

Every method, on a dense and a mixture model, in fp32, bf16 and fp16, on windows so few that all of it takes a minute;
the fast suite takes each method once, with models and precisions in turn.
A measure that breaks one of these has measured something else than it says, whatever its number.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qbench import leaderboard
from qbench.plugins.rtn import RTN
from qbench.record.result import Result
from qbench.run import run_point
from tests.conftest import composed, thinned
from tests.report import examples

MODELS = ("tiny-dense", "tiny-moe")
DTYPES = ("float32", "bfloat16", "float16")
METHODS = {
    "rtn": ("quantizer=rtn",),
    "hqq": ("quantizer=hqq",),
    "nf4": ("quantizer=nf4",),
    "fp4": ("quantizer=fp4",),
    "gptq": ("quantizer=gptq",),
    "awq": ("quantizer=awq",),
    "sinq": ("quantizer=sinq",),
    "asinq": ("quantizer=asinq",),
    "sinq-nf4": ("quantizer=sinq", "quantizer.codebook=nf4"),
    "sinq+hqq": ("quantizer=sinq", "quantizer.inner=hqq"),
    "gptq-hadamard": ("quantizer=gptq", "quantizer.rotation=hadamard"),
    "higgs": ("quantizer=higgs",),
    "sinq-shared": ("quantizer=sinq", "quantizer.shared_t=true", "quantizer.t_dtype=fp8"),
    "nvfp4": ("quantizer=nvfp4",),
}
SHORT = ("task.window=64", "task.max_windows=2")
SHORT_CALIBRATION = ("calibration.window=64", "calibration.sequences=4")
EVERY_METHOD = pytest.mark.parametrize(("method", "model", "dtype"), thinned(METHODS, MODELS, DTYPES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results and kept scores of the originals, which the points of a model and a precision share."""
    return tmp_path_factory.mktemp("invariants")


@pytest.fixture(scope="module")
def run(folder):
    """The result of the point that the settings ask for; a point that was asked for before is not run again."""

    @cache
    def point(*settings: str, outputs: str = "outputs") -> Result:
        given = {setting.partition("=")[0] for setting in settings}
        short = SHORT[:1] if "task=wikitext_lmeval" in settings else SHORT
        short += () if "model=packed" in settings else SHORT_CALIBRATION
        asked = [*settings, *(s for s in short if s.partition("=")[0] not in given)]
        return run_point(replace(composed(asked), outputs=str(folder / outputs)), asked)

    return point


def quantized(run, model: str, dtype: str, method: str, **options: str) -> Result:
    """The method's point, its checkpoint included."""
    export = f"export.dir={method}-{model}-{dtype}"
    result = run(f"model={model}", f"runtime.dtype={dtype}", *METHODS[method], export, **options)
    assert result.status == "ok", result.error
    return result


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def tensors(checkpoint: str) -> dict[str, Tensor]:
    """What a packed checkpoint stores of its quantized weights, by name."""
    described = json.loads((Path(checkpoint) / "qbench.json").read_text())["layers"]
    stored = {name: t for file in Path(checkpoint).glob("*.safetensors") for name, t in load_file(file).items()}
    return {
        name: tensor
        for name, tensor in stored.items()
        if any(name.startswith(f"{layer}.") for layer in described) and not name.endswith("bias")
    }


PAGES = "".join(
    json.dumps({"text": f"{n} geese crossed the river, and {n * n} came back. " * 9}) + "\n" for n in range(9)
)
TASKS = {
    "windows": (),
    "a BOS in every window": ("task.add_bos_token=true",),
    "crops": ("task=c4_gptq", "task.path=pages.jsonl", "task.max_windows=3"),
    "pages": ("task=c4_new", "task.path=pages.jsonl", "task.pages=5"),
}


@pytest.mark.parametrize(("task", "model", "dtype"), thinned(TASKS, MODELS, DTYPES))
def test_the_original_beside_itself_differs_by_exactly_nothing(run, folder, model, dtype, task):
    """quantizer=none is evaluated as any other: what is not zero or one here is an error of the measure."""
    (folder / "pages.jsonl").write_text(PAGES)
    result = run(f"model={model}", f"runtime.dtype={dtype}", "quantizer=none", *TASKS[task])
    assert result.status == "ok", result.error
    (record,) = result.evaluation
    assert record.ppl == record.baseline_ppl
    assert (record.ppl_delta, record.ppl_delta_low, record.ppl_delta_high) == (0, 0, 0)
    assert record.verdict == "not distinguishable"
    divergence = record.divergence
    for zero in (divergence.kl, divergence.kl_reverse, divergence.true_token_rms_change):
        assert asdict(zero) == {"value": 0, "low": 0, "high": 0}
    assert (divergence.kl_p99, divergence.kl_max) == (0, 0)
    assert asdict(divergence.top1_agreement) == {"value": 1, "low": 1, "high": 1}
    quantization = result.quantization
    assert (quantization.bits_per_weight, quantization.coverage, quantization.layers) == (16, 0, [])
    assert quantization.model_bytes == result.model.baseline_bytes
    assert quantization.weight_bytes == result.model.weight_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_original_beside_itself_in_lm_evals_tasks(run, folder, dtype):
    (folder / "wiki.raw").write_text(" = One = \n \n It rained a lot . \n = Two = \n \n The sun is out . \n")
    asked = ("quantizer=none", "task=wikitext_lmeval", "task.path=wiki.raw")
    result = run("model=tiny-dense", f"runtime.dtype={dtype}", *asked)
    assert result.status == "ok", result.error
    (record,) = result.evaluation
    assert (record.ppl_delta, record.ppl_delta_low, record.ppl_delta_high) == (0, 0, 0)
    assert {metric.name for metric in record.metrics} == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    for metric in record.metrics:
        assert metric.value == metric.baseline
        assert (metric.delta, metric.delta_low, metric.delta_high) == (0, 0, 0)


@EVERY_METHOD
def test_a_difference_is_that_of_the_two_numbers_that_are_shown(run, model, dtype, method):
    result = quantized(run, model, dtype, method)
    (record,) = result.evaluation
    assert record.ppl_delta == record.ppl - record.baseline_ppl
    assert record.divergence.kl.value > 0
    assert record.divergence.kl_reverse.value > 0
    for metric in (*record.metrics, *(m for task in result.tasks for m in task.metrics)):
        assert metric.delta is None or metric.delta == pytest.approx(metric.value - metric.baseline, abs=1e-12)


@EVERY_METHOD
def test_bytes_are_those_that_are_held_and_finite(run, model, dtype, method):
    result = quantized(run, model, dtype, method)
    stored = tensors(f"{method}-{model}-{dtype}")
    quantization, held = result.quantization, sum(tensor.nbytes for tensor in stored.values())
    assert quantization.packed_bytes == held
    assert quantization.weight_bytes.codes + quantization.weight_bytes.aux == held
    weights = quantization.coverage * result.model.linear_weights
    assert quantization.bits_per_weight == pytest.approx(8 * held / weights)
    assert quantization.model_bytes == held + 2 * (result.model.parameters - round(weights))
    for name, tensor in stored.items():
        assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), name


@EVERY_METHOD
def test_a_checkpoint_read_back_is_the_model_that_was_measured(run, model, dtype, method):
    measured = quantized(run, model, dtype, method).evaluation[0]
    path = f"model.path={method}-{model}-{dtype}"
    again = run("model=packed", path, f"runtime.dtype={dtype}", outputs="packed")
    assert again.status == "ok", again.error
    assert again.evaluation[0].ppl == measured.ppl  # to the bit
    assert again.evaluation[0].protocol == measured.protocol


@EVERY_METHOD
def test_two_runs_give_the_same_bits(run, folder, model, dtype, method):
    """The codes as well as the numbers; only times and memory may differ."""
    first = quantized(run, model, dtype, method)
    export = f"again-{method}-{model}-{dtype}"
    settings = (f"model={model}", f"runtime.dtype={dtype}", *METHODS[method], f"export.dir={export}")
    second = run(*settings, outputs="again")
    assert second.run_id == first.run_id
    one, other = tensors(f"{method}-{model}-{dtype}"), tensors(export)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert replace(second.evaluation[0], baseline_cached=True) == replace(first.evaluation[0], baseline_cached=True)


def test_a_rerun_that_fails_keeps_the_result(run, folder, monkeypatch):
    kept = quantized(run, "tiny-dense", "float32", "rtn")
    with monkeypatch.context() as broken:
        broken.setattr(RTN, "quantize_basis", lambda *_: 1 / 0)
        failed = run("model=tiny-dense", "runtime.dtype=float32", "quantizer=rtn", "runtime.rerun=true")
    assert failed.status == "failed"
    path = folder / "outputs" / "results" / kept.run_id
    assert Result.from_json((path / "result.json").read_bytes()) == kept
    assert all((path / name).is_file() for name in kept.files())


def test_a_row_that_is_no_number_moves_no_other_row(tmp_path, capsys):
    sound = [examples.point(f"m{i}", windows=examples.nll(shift)) for i, shift in enumerate((0.5, 0.1, 0.3, 0.2))]
    lost = examples.point("lost", windows=np.full(len(examples.BASELINE), np.nan))

    def places(name: str, *points) -> dict[str, int]:
        assert leaderboard.main([str(examples.save(tmp_path / name, *points)), "--format", "json"]) == 0
        (table,) = json.loads(capsys.readouterr().out)
        return {row["quantizer"]: row["rank"] for row in table["rows"] if row["quantizer"] != "lost"}

    alone = places("alone", *sound)
    assert alone == {"m1": 1, "m3": 2, "m2": 3, "m0": 4}
    for at in range(len(sound) + 1):
        assert places(f"with{at}", *sound[:at], lost, *sound[at:]) == alone


def test_what_cannot_change_a_number_changes_no_identity_and_what_can_does(run, folder):
    """Other names and defaults spelled out are the same point; another seed, text or bit is another."""
    settings = ("model=tiny-dense", "runtime.dtype=float32", "quantizer=rtn")
    same = run(*settings)
    for further in (("quantizer.nbits=4",), ("runtime.threads=1",), ("runtime.min_coverage=0.5",)):
        assert run(*settings, *further).run_id == same.run_id, further
    (folder / "one.txt").write_text("One text is not another. " * 20)
    (folder / "two.txt").write_text("Two texts are not one of them. " * 20)
    texts = [("task=text", f"task.path={name}.txt") for name in ("one", "two")]
    others = [run(*settings, *further) for further in (("model.seed=1",), ("quantizer.nbits=3",), *texts)]
    assert len({result.run_id for result in (same, *others)}) == 5
