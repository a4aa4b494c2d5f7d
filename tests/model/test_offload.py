"""Offloaded models: they hold the same bits when quantized, run unquantized, and only the linears wait on the host."""

import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qbench.errors import PointError
from qbench.evaluate import energy
from qbench.evaluate.memory import weight_bytes
from qbench.model.linears import find_linears, quantized_weights
from qbench.model.offload import leave_linears_on_host, runs_offloaded
from qbench.passes.quantize import quantize_model, require_finite
from qbench.passes.stream import Stream
from qbench.plugins.rtn import RTN
from qbench.registry import make_quantizer
from qbench.sources import tiny
from qbench.sweep.share import HELD
from tests.conftest import thinned
from tests.model.test_experts import deepseek_v2, made
from tests.passes.test_calibrate import calibration
from tests.test_cli import recorded

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[gpu, needs_cuda])]
METHODS = ["rtn", "sinq", "hqq", "nf4", "gptq", "awq", "asinq"]


def dense():
    return tiny.build("dense", 0)[0]


def moe():
    return tiny.build("moe", 0)[0]


def biased():
    """Its q, k and v have biases, which belong to the linears and wait with them."""
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=258)
    return Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=2))


MODELS = [dense, moe, biased, deepseek_v2]


def on(device, build, offloaded):
    model = made(build)
    if not offloaded:
        return model.to(device)
    leave_linears_on_host(model, torch.device(device))
    return model


def held(model):
    return {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize(("method", "build"), thinned(METHODS, MODELS))
@pytest.mark.parametrize("device", DEVICES)
def test_an_offloaded_model_is_quantized_to_the_same_bits(device, build, method):
    quantizer = make_quantizer({"name": method})
    text = calibration() if quantizer.needs else None
    usual, offloaded = on(device, build, False), on(device, build, True)
    rows, skipped = quantize_model(usual, quantizer, text)
    its_rows, its_skipped = quantize_model(offloaded, quantizer, text, offloaded=True)

    expected, found = held(usual), held(offloaded)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert tensor.device.type == device, name
        assert torch.equal(tensor, expected[name]), name
    assert len(quantized_weights(offloaded)) == len(quantized_weights(usual)) > 0
    assert its_skipped == skipped
    assert [replace(row, seconds=0) for row in its_rows] == [replace(row, seconds=0) for row in rows]
    assert weight_bytes(offloaded) == weight_bytes(usual)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_every_weight_that_is_quantized_came_over_the_stream(build, method, monkeypatch):
    quantizer = make_quantizer({"name": method})
    start, quantize, arrived, handed = Stream._start, type(quantizer).quantize, [], []

    def watched_start(self, batch):
        started = start(self, batch)
        arrived.extend(copy for _, copy in started[1])  # kept, so that no two have one address
        return started

    def watched_quantize(self, weights, stats):
        for weight in weights:  # or a stack of experts'
            handed.extend([weight.untyped_storage().data_ptr()] * weight[..., 0, 0].numel())
        return quantize(self, weights, stats)

    monkeypatch.setattr(Stream, "_start", watched_start)
    monkeypatch.setattr(type(quantizer), "quantize", watched_quantize)
    rows, _ = quantize_model(made(build), quantizer, calibration(), offloaded=True)
    assert len(handed) == len(rows) > 0
    assert set(handed) <= {copy.untyped_storage().data_ptr() for copy in arrived}


# without a second device, a dtype stands for it: `.to` takes either
ELSEWHERE = [torch.float64, pytest.param(torch.device("cuda", 0), marks=[gpu, needs_cuda])]


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("elsewhere", ELSEWHERE, ids=str)
def test_only_what_will_be_quantized_waits_on_the_host(build, elsewhere):
    model = made(build)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    leave_linears_on_host(model, elsewhere)
    found = find_linears(model)
    waiting = {
        f"{name}.{key}"
        for name, module in (found.layers | found.experts).items()
        for key, _ in module.named_parameters()
    }
    moved = {name for name, tensor in held(model).items() if elsewhere in (tensor.device, tensor.dtype)}
    assert moved == set(held(model)) - waiting
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.rotary_emb.inv_freq"} < moved
    assert (head.weight is embeddings.weight) == tied


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("device", DEVICES)
def test_an_offloaded_model_runs_unquantized_and_is_then_as_before(device, build):
    usual, model = on(device, build, False), on(device, build, True)
    ids = torch.arange(48, device=device)[None]
    expected = usual(ids).logits
    before = {name: (tensor.device, tensor.data_ptr()) for name, tensor in held(model).items()}
    first = next(iter(find_linears(model).layers.values()))
    with runs_offloaded(model, True):
        assert first.weight.device.type == "meta"  # nothing is on the device between the calls
        assert model.device.type == device
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, expected)
    assert {name: (tensor.device, tensor.data_ptr()) for name, tensor in held(model).items()} == before
    assert not any(tensor.is_inference() for tensor in held(model).values())
    assert not any(hasattr(module, "_hf_hook") or "forward" in vars(module) for module in model.modules())

    layer = weakref.ref(first)
    del first
    gc.disable()
    try:
        quantize_model(model, RTN(), offloaded=True)
        assert layer() is None  # at once, since its weight is on the device by then
    finally:
        gc.enable()


def test_a_model_that_is_not_offloaded_gets_no_hooks():
    model = dense()
    with runs_offloaded(model, False):
        assert not any(hasattr(module, "_hf_hook") for module in model.modules())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_failure_names_the_layer_and_ends_the_thread(method, monkeypatch):
    quantizer = make_quantizer({"name": method})
    usual, seen = type(quantizer).quantize, []

    def fail_from_the_fifth(self, weights, stats):
        seen.append(weights)
        if len(seen) >= 5:
            raise ValueError("no")
        return usual(self, weights, stats)

    monkeypatch.setattr(type(quantizer), "quantize", fail_from_the_fifth)
    with pytest.raises(PointError, match=r"^layer model\.layers\..*_proj: no$"):
        quantize_model(made(moe), quantizer, calibration(), offloaded=True)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qbench-stream")]


def test_an_infinite_weight_is_found_and_the_others_are_left_where_they_are():
    model = made(moe)
    before = {name: tensor.data_ptr() for name, tensor in held(model).items()}
    require_finite(model, offloaded=True)
    model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = float("nan")
    with pytest.raises(PointError, match=r"layer model\.layers\.1\.mlp\.experts\.2\.down_proj: 1 of 6144 weights"):
        require_finite(model, offloaded=True)
    assert {name: tensor.data_ptr() for name, tensor in held(model).items()} == before


POINT = ("task.max_windows=2", "calibration.sequences=2")


def same_numbers(qbench, *arguments):
    """Both results of a point, with and without offloading, once their qualities were compared."""
    folders = {"usual": "false", "offloaded": "true"}  # each with a baseline of its own
    for folder, offload in folders.items():
        outcome = qbench(*POINT, *arguments, f"runtime.offload={offload}", f"outputs={folder}")
        assert outcome.status == 0, outcome.stderr
    usual, offloaded = (recorded(Path(folder))[0] for folder in folders)
    assert usual.evaluation == offloaded.evaluation
    assert not offloaded.evaluation[0].baseline_cached
    assert usual.quantization.packed_bytes == offloaded.quantization.packed_bytes
    assert usual.quantization.coverage == offloaded.quantization.coverage
    assert usual.model == offloaded.model
    assert usual.run_id != offloaded.run_id  # the peak of memory is another number
    return usual, offloaded


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("model=tiny-dense", "quantizer=gptq"), ("model=tiny-moe", "quantizer=sinq")])
def test_a_point_gives_the_same_numbers(qbench, monkeypatch, arguments):
    """On a CPU, where it is refused otherwise."""
    monkeypatch.setattr("qbench.request.prepare.check_offload", lambda runtime, device: None)
    same_numbers(qbench, *arguments, "runtime.device=cpu")


@gpu
@needs_cuda
@pytest.mark.parametrize("quantizer", ["rtn", "sinq", "gptq", "awq"])
@pytest.mark.parametrize("model", ["tiny-dense", "tiny-moe"])
def test_a_point_gives_the_same_numbers_on_a_gpu(qbench, monkeypatch, model, quantizer):
    """As a CUDA graph alone: which way is the fastest, chance decides where other tests are running."""
    monkeypatch.setenv(HELD, str(torch.cuda.get_device_properties(0).uuid))  # none waits for those
    monkeypatch.setattr(energy, "SECONDS", 0.05)
    sizes = ("speed.prefill_tokens=16", "speed.context_tokens=16", "speed.decode_tokens=4")
    speed = ("speed=default", "speed.compile=false", *sizes)
    arguments = (f"model={model}", f"quantizer={quantizer}", "runtime.device=cuda")
    usual, offloaded = same_numbers(qbench, *arguments, *speed)
    assert usual.speed.baseline is not None
    assert offloaded.speed.baseline is None
    assert offloaded.speed.quantized.decode.method == usual.speed.quantized.decode.method


def test_on_a_cpu_it_is_refused(qbench):
    outcome = qbench("model=tiny-dense", "runtime.device=cpu", "runtime.offload=true")
    assert outcome.status == 2
    assert "qbench: runtime.offload=true keeps the weights off a GPU until" in outcome.stderr
    assert "this point runs on the CPU" in outcome.stderr
    assert not list(Path().rglob("result.json"))


def test_a_packed_checkpoint_has_nothing_to_offload(qbench):
    outcome = qbench("model=packed", "model.path=anywhere", "runtime.offload=true")
    assert outcome.status == 2
    assert "qbench: model=packed is loaded as it is quantized, in full; leave out runtime.offload" in outcome.stderr


def many_blocks():
    """24 blocks of 30 MB in bf16, made on the GPU, where it takes no time."""
    shape = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=8, head_dim=128)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(Qwen3Config(**shape, vocab_size=512, num_key_value_heads=2))
    return model.bfloat16().cpu().eval().requires_grad_(False)


@gpu
@needs_cuda
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_gpu_never_holds_the_model_in_16_bits(method):
    """It holds what is packed, two linears or blocks and the method's working copies; less while the baseline runs."""
    quantizer, peaks = make_quantizer({"name": method}), {}
    text = calibration(sequences=4, window=128) if quantizer.needs else None
    for offloaded in (False, True):
        model = many_blocks()
        sixteen_bit = 2 * find_linears(model).weights
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        leave_linears_on_host(model, torch.device("cuda")) if offloaded else model.cuda()
        torch.cuda.reset_peak_memory_stats()
        with runs_offloaded(model, offloaded):
            model(torch.arange(64, device="cuda")[None])
        running = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        quantize_model(model, quantizer, text, offloaded)
        peaks[offloaded] = torch.cuda.max_memory_allocated() - before
        assert all(tensor.is_cuda for tensor in held(model).values())
        packed = sum(weight.nbytes for weight in quantized_weights(model))
        del model
    assert running < 0.2 * sixteen_bit
    assert packed < 0.3 * sixteen_bit < sixteen_bit < peaks[False]
    assert peaks[False] - peaks[True] > 0.5 * sixteen_bit
    if method == "rtn":  # GPTQ's factors are larger than this model
        assert peaks[True] < 0.55 * sixteen_bit
