"""The timed decode really decodes, a step of it can be captured, and what is recorded is what was asked for."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from qbench.config import SpeedConfig
from qbench.errors import PointError, RequestError
from qbench.evaluate import energy, speed, steps, ways
from qbench.layers.linear import use_kernels
from qbench.passes.quantize import quantize_model
from qbench.record.result import Result
from qbench.registry import make_quantizer
from qbench.sources import tiny
from tests.conftest import refused

SMALL = SpeedConfig("default", batch_size=2, prefill_tokens=12, context_tokens=8, decode_tokens=6, repeats=3)


def model(architecture="dense", quantizer=None):
    built, _ = tiny.build(architecture, 0)
    built.eval().requires_grad_(False)
    if quantizer is not None:
        quantize_model(built, make_quantizer({"name": quantizer, "nbits": 4, "group_size": 64}))
    return built


def prompt(batch=2, tokens=8):
    return torch.randint(256, (batch, tokens), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def decoded(decoder, steps):
    tokens = [decoder.token.clone()]
    for _ in range(steps):
        decoder.step()
        tokens.append(decoder.token.clone())
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("quantizer", [None, "sinq"])
@torch.inference_mode()
def test_the_timed_decode_is_greedy_generation(quantizer):
    tested, ids = model(quantizer=quantizer), prompt()
    decoder = steps.Decoder(tested, ids, steps=6)
    found = decoded(decoder, 5)
    assert len(found.unique()) > 2
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = tested.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]
    assert torch.equal(found, expected)
    decoder.rewind()
    assert torch.equal(decoded(decoder, 5), expected)  # every repeat does the same work


FORBIDDEN = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "lift_fresh")


class Forbidden(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: values that Python asks of the GPU or hands to it, shapes made of data."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(word in name for word in FORBIDDEN), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("quantizer", [None, "rtn", "sinq", "nf4"])
@torch.inference_mode()
def test_a_step_can_be_captured(quantizer, monkeypatch):
    built = model()
    if quantizer is not None:
        settings = {"name": quantizer, "group_size": 64} | ({} if quantizer == "nf4" else {"nbits": 4})
        quantize_model(built, make_quantizer(settings))
    decoder = steps.Decoder(built, prompt(), steps=6)
    expected = decoded(decoder, 4)
    decoder.rewind()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with Forbidden():
        found = decoded(decoder, 4)
    assert torch.equal(found, expected)


@torch.inference_mode()
def test_sliding_windows_are_filled_again():
    """Their layers overwrite what they hold, so there is no rewinding: every repeat starts from the prompt."""
    config = Gemma3TextConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    tested, ids = Gemma3ForCausalLM(config).eval().requires_grad_(False), prompt()
    decoder = steps.Decoder(tested, ids, steps=6)
    first = decoded(decoder, 5)
    decoder.rewind()
    assert torch.equal(decoded(decoder, 5), first)
    for way in (ways.graph, ways.compiled):
        with pytest.raises(ways.RefusedError, match=r"^the model has sliding-window layers$"), way(decoder):
            pass


def test_what_is_measured():
    found = speed.measure(model(), SMALL)
    for phase in (found.prefill, found.decode):
        rates = phase.tokens_per_second
        assert 0 < rates.min <= rates.median <= rates.max < math.inf
        assert (phase.method, phase.eager_because, phase.peak_alloc_bytes) == ("eager", None, None)
        assert phase.joules_per_token is None


def test_rates_are_tokens_over_seconds(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 12.0, 20.0, 21.0, 30.0, 34.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    prepared = []
    rates = speed._time(lambda: 8, lambda: prepared.append(1), 3, torch.device("cpu"))
    assert (rates.median, rates.min, rates.max) == (4.0, 2.0, 8.0)  # the first run, of 9 s, is the warm-up
    assert len(prepared) == 4


def test_a_sequence_that_is_too_long():
    with pytest.raises(PointError, match=r"speed asks for 2049 tokens in a sequence, this model takes 2048"):
        speed.measure(model(), SpeedConfig("default", 1, 8, 2048, 1, 1))


@pytest.mark.parametrize(
    ("config", "key", "names"),
    [
        (SpeedConfig("none", batch_size=4), "speed.batch_size", ["speed=none", "speed=default"]),
        (SpeedConfig("default", 1, 8, 8, 8, 0), "speed.repeats", ["1", "0"]),
        (SpeedConfig("default", 1, [8, "long"], 8, 8, 1), "speed.prefill_tokens", ["1", "long"]),
        (SpeedConfig("default", 1, [], 8, 8, 1), "speed.prefill_tokens", ["1", "[]"]),
        (SpeedConfig("default", 1, [8, 8], 8, 8, 1), "speed.prefill_tokens", ["twice"]),
        (SpeedConfig("none", compile=True), "speed.compile", ["speed=none", "speed=default"]),
        (SpeedConfig("fast"), "speed", ["default", "none"]),
    ],
)
def test_refusals(config, key, names):
    with pytest.raises(RequestError) as error:
        speed.check(config)
    refused(error.value, key, names)


@pytest.mark.slow
def test_a_point_records_both_models(qbench, tmp_path):
    plain = qbench("model=tiny-dense", "task.max_windows=2").summary
    sizes = [f"speed.{k}={getattr(SMALL, k)}" for k in speed.SIZES]
    outcome = qbench("model=tiny-dense", "task.max_windows=2", "speed=default", *sizes)
    assert outcome.status == 0
    assert outcome.summary["decode_tokens_per_second"] > 0
    assert outcome.summary["run_id"] != plain["run_id"]
    assert outcome.summary["ppl"] == plain["ppl"]
    assert "decode, tokens/s" in outcome.stderr
    result = Result.from_json((tmp_path / f"outputs/results/{outcome.summary['run_id']}/result.json").read_bytes())
    assert result.speed.baseline.decode.tokens_per_second.median > 0
    assert (result.speed.batch_size, result.speed.context_tokens, result.speed.repeats) == (2, 8, 3)
    assert {"baseline_speed", "speed"} <= set(result.seconds)
    assert result.model.weight_bytes.linears > 0
    assert result.quantization.weight_bytes.codes > 0
    without = Result.from_json((tmp_path / f"outputs/results/{plain['run_id']}/result.json").read_bytes())
    assert without.speed is None
    assert without.quantization.weight_bytes == result.quantization.weight_bytes


def test_joules_per_token(monkeypatch):
    """The counter is in millijoules; work is repeated until enough of it has passed."""
    counter, clock = iter([1000, 6000]), iter([0.0, 0.0, 1.5, 2.5])
    pynvml = type("pynvml", (), {"nvmlDeviceGetTotalEnergyConsumption": staticmethod(lambda handle: next(counter))})
    monkeypatch.setitem(__import__("sys").modules, "pynvml", pynvml)
    monkeypatch.setattr(energy, "_handle", lambda device: "handle")
    monkeypatch.setattr(energy.torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(energy.time, "perf_counter", lambda: next(clock))
    assert energy.joules_per_token(lambda: 10, torch.device("cuda")) == pytest.approx(5.0 / 20)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["cuda graph", "compiled"])
@pytest.mark.parametrize(("architecture", "quantizer"), [("dense", "sinq"), ("moe", None), ("moe", "sinq")])
def test_a_replayed_decode_is_the_eager_decode(architecture, quantizer, way):
    tested = model(architecture, quantizer).to("cuda", torch.bfloat16)
    use_kernels(tested)
    with torch.inference_mode():
        decoder = steps.Decoder(tested, prompt().cuda(), steps=6)
        expected = decoded(decoder, 5)
        with ways.WAYS[way](decoder) as found:
            for _ in range(2):
                decoder.rewind()
                tokens = [decoder.token.clone()]
                for _ in range(5):
                    found.run()
                    tokens.append(decoder.token.clone())
                same = (torch.cat(tokens, 1) == expected).float().mean()  # bf16 is rounded elsewhere when compiled
                assert same == 1 if way == "cuda graph" else same >= 0.5
                assert (found.difference or 0) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["cuda graph", "compiled"])
def test_a_replayed_prefill_gives_the_eager_logits(way):
    tested = model(quantizer="sinq").to("cuda", torch.bfloat16)
    use_kernels(tested)
    with torch.inference_mode():
        work = steps.Prefill(tested, prompt(tokens=40).cuda())
        expected, step, newest = work.step().float(), work.step, []
        work.step = lambda: newest.append(step()) or newest[-1]
        with ways.WAYS[way](work) as found:
            for _ in range(2):
                work.rewind()
                newest[-1].zero_()  # what the captured step writes
                found.run()
                assert (newest[-1].float() - expected).norm() / expected.norm() < (0.1 if way == "compiled" else 1e-6)


@pytest.mark.gpu
def test_what_a_gpu_records(monkeypatch):
    monkeypatch.setattr(energy, "SECONDS", 0.05)
    found = speed.measure(model(quantizer="sinq").to("cuda", torch.bfloat16), SMALL)
    for phase in (found.prefill, found.decode):
        assert [way.method for way in phase.ways] == ["cuda graph", "compiled"]
        assert all(way.refused is None for way in phase.ways)
        assert phase.method in ("cuda graph", "compiled")
        assert phase.peak_alloc_bytes > 0
        assert phase.peak_rss_bytes is None


@pytest.mark.gpu
def test_a_mixture_is_multiplied_in_both_ways(monkeypatch):
    monkeypatch.setattr(energy, "SECONDS", 0.05)
    found = speed.measure(model("moe").to("cuda", torch.bfloat16), SMALL)
    assert [way.experts for way in found.decode.ways][:2] == list(ways.EXPERTS)
