import json
import math
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import pytest

from qbench.record.identity import Identity
from qbench.record.outline import Outline
from qbench.record.quality import DivergenceRecord, EvaluationRecord, IntervalRecord, MetricRecord, TaskRecord
from qbench.record.quantization import LayerRow, ModelRecord, QuantizationRecord
from qbench.record.result import Result, ResultError
from qbench.record.speed import InferenceRecord, PhaseRecord, SpeedRecord, SpreadRecord, WayRecord
from qbench.report import summary as terminal

IDENTITY = Identity(
    weights="random:1",
    remote_code=False,
    quantizer={"name": "sinq", "nbits": 4, "group_size": 64, "codebook": None},
    text_sha256="ab",
    protocol={"name": "mini", "protocol": "windows", "window": 512, "max_windows": None},
    calibration=None,
    device="cpu",
    dtype="float32",
    runtime={"batch_size": 1, "offload": False},
    speed=None,
)


def example(run_id="0123456789abcdef", **changes) -> Result:
    layer = LayerRow("model.layers.0.q", (8, 16), "sinq", "cpu", 0.1, 4.5, 72, 0.09, 20.0, 1.5, 3.2, 3.0)
    layer = replace(layer, stored_bytes={"codes": 36, "scale": 2, "zero": 2, "input_scale": 32})
    return replace(
        Result(
            run_id=run_id,
            status="ok",
            error=None,
            created_utc="2026-01-01T00:00:00+00:00",
            qbench_version="0.1.0",
            command=["quantizer=sinq"],
            config={"model": {"name": "tiny"}, "quantizer": {"name": "sinq", "nbits": 4, "group_size": 64}},
            identity=IDENTITY,
            environment={"device": "cpu"},
            seconds={"load": 1.0},
            model=ModelRecord("tiny", "random:1", "", 100, 90, 200),
            quantization=QuantizationRecord("sinq", None, 0.1, 0.2, 4.5, 72, 100, 1.0, None, 10**8, [layer], []),
            evaluation=[
                EvaluationRecord(
                    protocol="mini:gptq-w512",
                    text_source="mini",
                    text_sha256="ab",
                    token_ids_sha256="cd",
                    total_tokens=100,
                    leading_special_tokens=0,
                    window_tokens=50,
                    windows=2,
                    dropped_tokens=0,
                    scored_tokens=98,
                    ppl=9.0,
                    baseline_ppl=8.0,
                    baseline_cached=False,
                    ppl_delta=1.0,
                    ppl_delta_low=0.5,
                    ppl_delta_high=1.5,
                    window_nll_file="w.safetensors",
                )
            ],
        ),
        **changes,
    )


def timed() -> SpeedRecord:
    phase = PhaseRecord(SpreadRecord(20.0, 18.0, 21.0), "cuda graph", None, 10**9, None, 0.5)
    slow = replace(phase, tokens_per_second=SpreadRecord(10.0, 9.0, 11.0), joules_per_token=None)
    return SpeedRecord(1, 512, 512, 64, 5, InferenceRecord(phase, phase), InferenceRecord(slow, slow))


def test_json_round_trip_is_exact():
    for result in (example(), example(speed=timed())):
        assert Result.from_json(result.to_json()) == result


def test_speed_in_the_summary():
    summary = example(speed=timed()).summary()
    assert (summary["decode_tokens_per_second"], summary["baseline_decode_tokens_per_second"]) == (20.0, 10.0)
    assert summary["prefill_joules_per_token"] == 0.5
    assert summary["prefill_peak_alloc_bytes"] == 10**9
    assert not {"baseline_prefill_joules_per_token", "prefill_peak_rss_bytes"} & set(summary)  # what was not measured


def several_ways() -> SpeedRecord:
    """A mixture whose 16-bit experts were multiplied in two ways; compiling was refused for what is quantized."""

    def way(method, rate, experts=None, refused=None):
        spread = None if rate is None else SpreadRecord(rate, rate, rate)
        return WayRecord(method, spread, refused, "sdpa", experts, 9.5, 0.02)

    def phase(*ways):
        best = max((w for w in ways if w.refused is None), key=lambda w: w.tokens_per_second.median)
        return PhaseRecord(best.tokens_per_second, best.method, None, 10**9, None, None, ways)

    grouped, batched = way("cuda graph", 40.0, "grouped_mm"), way("cuda graph", 30.0, "batched_mm")
    base = phase(grouped, batched, way("compiled", 50.0, "batched_mm"))
    ours = phase(way("cuda graph", 80.0), way("compiled", None, refused="it has sliding windows"))
    return SpeedRecord(
        *(1, 512, 512, 64, 5, InferenceRecord(ours, ours, (ours,)), InferenceRecord(base, base, (base,))),
        more_prefill_tokens=(2048,),
    )


def test_every_way_is_kept_and_summarized():
    result = example(speed=several_ways())
    assert Result.from_json(result.to_json()) == result
    summary = result.summary()
    assert (summary["decode_method"], summary["baseline_decode_method"]) == ("cuda graph", "compiled")
    assert summary["baseline_decode_tokens_per_second"] == summary["baseline_decode_compiled_tokens_per_second"] == 50
    assert summary["baseline_decode_cuda_graph_tokens_per_second"] == 40  # of two, the faster
    assert summary["prefill_2048_tokens_per_second"] == 80
    assert "decode_compiled_tokens_per_second" not in summary


def test_every_way_is_shown(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = example(speed=several_ways())
    terminal.show(replace(result, config=result.config | {"outputs": "outputs"}))
    shown = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    fastest = "1.60 times as fast; batch 1, median of 5, cuda graph (16 bit: compiled)"
    assert f"decode, tokens/s, after 512 tokens 50.0 80.0 {fastest}" in shown
    assert "decode, after 512 tokens, cuda graph 40.0 80.0 2.00 times as fast" in shown
    assert "decode, after 512 tokens, compiled 50.0 refused: it has sliding windows" in shown
    assert sum(line.startswith("prefill, tokens/s, 2048 tokens") for line in shown) == 1


def test_a_speed_record_of_one_way_is_read():
    """As records were before a phase was timed in several."""
    document = json.loads(example(speed=timed()).to_json())
    for model in (document["speed"]["quantized"], document["speed"]["baseline"]):
        del model["more_prefill"], model["prefill"]["ways"], model["decode"]["ways"]
    del document["speed"]["more_prefill_tokens"]
    old = Result.from_json(json.dumps(document))
    assert old == example(speed=timed())
    assert old.speed.quantized.decode.rate("cuda graph") is None


def test_what_was_not_measured_may_be_absent():
    document = json.loads(example().to_json())
    del document["speed"], document["model"]["weight_bytes"], document["quantization"]["weight_bytes"]
    del document["quantization"]["layers"][0]["stored_bytes"]
    old = Result.from_json(json.dumps(document))
    assert old.quantization.layers[0].stored_bytes == {}
    assert old.quantization.weight_bytes is None
    assert old.summary()["aux_bytes"] is None


def test_frozen_and_summarized():
    result = example()
    with pytest.raises(FrozenInstanceError):
        result.status = "failed"
    summary = result.summary()
    assert summary["ppl"] == 9.0
    assert summary["bits_per_weight"] == 4.5
    json.dumps(summary)
    assert example(status="failed", error="why", evaluation=[], quantization=None).summary()["error"] == "why"


def break_(change):
    document = json.loads(example(speed=timed()).to_json())
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda d: d.update(schema_version=3), "schema_version: it is of version 3; measure the point again"),
        (lambda d: (d.update(schema_version=1), d.pop("identity")), "schema_version: it is of version 1"),
        (lambda d: d.pop("identity"), "identity"),
        (lambda d: d["identity"].update(surprise=1), "identity.surprise"),
        (lambda d: d["identity"].pop("calibration"), "identity.calibration"),
        (lambda d: d.update(status="fine"), "status"),
        (lambda d: d.pop("run_id"), "run_id"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d["evaluation"][0].update(ppl="low"), "evaluation.0.ppl"),
        (lambda d: d["quantization"]["layers"][0].pop("shape"), "quantization.layers.0.shape"),
        (lambda d: d["quantization"]["layers"][0].update(surprise=1), "quantization.layers.0.surprise"),
        (lambda d: d["evaluation"][0].update(surprise=1), "evaluation.0.surprise"),
        (
            lambda d: d["speed"]["quantized"]["decode"]["tokens_per_second"].update(surprise=1),
            "speed.quantized.decode.tokens_per_second.surprise",
        ),
    ],
)
def test_wrong_documents_are_named(change, place):
    with pytest.raises(ResultError, match=f"x.json is not a result of schema version 2: {place}"):
        Result.from_json(break_(change), "x.json")


def test_an_outline_is_the_result_but_for_its_layers():
    result = example(speed=timed())
    outline = Outline.from_json(result.to_json())
    assert outline.summary() == result.summary()
    assert outline.quantization.weight_error == result.quantization.weight_error == 0.09
    for field_ in fields(Result):
        if field_.name != "quantization":
            assert getattr(outline, field_.name) == getattr(result, field_.name)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda d: d.update(schema_version=1), "schema_version: it is of version 1"),
        (lambda d: d["quantization"].update(surprise=1), "quantization.surprise"),
        (lambda d: d["quantization"].update(layers=[1]), "quantization.layers.0"),
        (lambda d: d["quantization"]["layers"][0].pop("relative_error"), "quantization.layers.0.relative_error"),
        (lambda d: d["quantization"]["layers"][0].update(relative_error="low"), "quantization.layers.0.relative_error"),
    ],
)
def test_wrong_outlines_are_named(change, place):
    with pytest.raises(ResultError, match=f"x.json is not a result of schema version 2: {place}"):
        Outline.from_json(break_(change), "x.json")


def test_results_written_before_the_later_fields_can_be_read():
    document = json.loads(example().to_json())
    del document["tasks"]
    for field_ in ("verdict", "text_revision", "bos_policy", "divergence", "metrics"):
        del document["evaluation"][0][field_]
    assert Result.from_json(json.dumps(document)) == example()


def test_the_summary_tells_measures_and_protocols_apart():
    first = example().evaluation[0]
    interval = IntervalRecord(0.5, 0.4, 0.6)
    both = [
        replace(
            first,
            divergence=DivergenceRecord(
                98, interval, interval, 0.1, 1.0, 2.0, 2.5, 3.0, 0.6, 0.2, 0.9, interval, interval
            ),
        ),
        replace(first, protocol="wikitext:lmeval-v2.0-w50", metrics=[MetricRecord("word_perplexity", False, 30.0)]),
    ]
    task = TaskRecord(
        protocol="piqa:lmeval-v1.0-0shot-w50",
        task="piqa",
        version="1.0",
        documents=10,
        documents_sha256="ab",
        num_fewshot=0,
        max_length=50,
        bos_policy="",
        text_source="piqa",
        baseline_cached=False,
        metrics=[MetricRecord("acc", True, 0.5, 0.6, -0.1, -0.2, 0.0, "not distinguishable", 0.3, 0.1, 0.5)],
        scores_file="t.safetensors",
    )
    result = example(evaluation=both, tasks=[task])
    assert Result.from_json(result.to_json()) == result
    assert result.files() == {"w.safetensors", "t.safetensors"}
    summary = result.summary()
    assert (summary["protocol"], summary["kl"]) == ("mini:gptq-w512", 0.5)
    assert summary["wikitext:lmeval-v2.0-w50/word_perplexity"] == 30.0
    assert summary["piqa:lmeval-v1.0-0shot-w50/acc"] == 0.5
    assert summary["piqa:lmeval-v1.0-0shot-w50/acc_flip_rate"] == 0.3


def test_a_number_that_is_none_stays_what_it_was():
    result = example(evaluation=[replace(example().evaluation[0], ppl=float("nan"), baseline_ppl=float("inf"))])
    read = Result.from_json(result.to_json()).evaluation[0]
    assert math.isnan(read.ppl)
    assert read.baseline_ppl == float("inf")


def test_truncated_json():
    with pytest.raises(ResultError, match="the file"):
        Result.from_json(example().to_json()[:-40])


def test_numbers_carry_their_unit():
    """A count of bytes or seconds says so in its name; nothing is called just `size`, `time` or `memory`."""
    for record in (Result, ModelRecord, QuantizationRecord, EvaluationRecord, LayerRow):
        assert is_dataclass(record)
        assert not {"size", "time", "memory", "duration"} & {field.name for field in fields(record)}


LATER = {"p_value", "detectable", "draws", "by_confidence", "by_position", "kl_histogram", "draws_sha256"}


def without_later(value):
    if isinstance(value, dict):
        return {key: without_later(inner) for key, inner in value.items() if key not in LATER}
    return [without_later(inner) for inner in value] if isinstance(value, list) else value


def test_results_from_before_draws_and_tests_were_recorded_are_read():
    interval = IntervalRecord(0.1, 0.05, 0.2)
    divergence = DivergenceRecord(96, interval, interval, *[0.1] * 5, 0.5, 0.1, 0.1, interval, interval)
    [record] = example().evaluation
    result = replace(example(), evaluation=[replace(record, divergence=divergence)])
    old = without_later(json.loads(result.to_json()))
    assert not any(f'"{key}"' in json.dumps(old) for key in LATER)
    read = Result.from_json(json.dumps(old))
    assert read == result
    assert (read.evaluation[0].perplexity.spread, read.evaluation[0].detectable) == (None, None)
