"""What a plan says that its points need: bytes from shapes, hours from measured rates."""

from __future__ import annotations

import pytest

from qbench.request import estimate
from qbench.request.needs import FLOPS, START_SECONDS, needs
from qbench.request.prepare import prepare
from qbench.sources import hub
from tests.conftest import composed


@pytest.fixture
def point(monkeypatch, data):
    """A point of a Hub model whose files are not here, under WikiText-2."""
    monkeypatch.setattr(hub.Hub, "pinned", lambda self: self)
    monkeypatch.setattr(hub.Hub, "fingerprint", lambda self: f"hub:{self.id}@{self.revision}")

    def made(*overrides):
        words = ("task=wikitext2", f"task.path={data / 'wiki.test.raw'}", "runtime.dtype=bfloat16", *overrides)
        found = prepare(composed(words), list(words))
        return found, estimate.skeleton(found.model)

    return made


def test_a_model_that_is_not_here_has_its_published_size(point):
    found = needs(*point("model=qwen3-8b", "quantizer=rtn", "task.max_windows=148"))
    assert found.download_bytes == pytest.approx(16.4e9, rel=0.01)
    assert found.read_seconds == pytest.approx(16.4 / 2.5, rel=0.01)
    # 303,104 tokens through 7.57 billion weights
    assert found.original_seconds == pytest.approx(2 * 303_104 * 7.57e9 / FLOPS, rel=0.01)
    assert found.variant_seconds == pytest.approx(found.original_seconds + 3.6, rel=0.02)
    whole = START_SECONDS + found.read_seconds + found.original_seconds + found.variant_seconds
    assert found.hours == pytest.approx(whole / 3600)
    assert 5e9 < found.gpu_bytes < 7e9  # two blocks of 0.4 GB, embedding and head of 2.5, logits of a window twice


def test_a_calibrated_method_takes_longer_and_more_draws_as_many_times(point):
    plain = needs(*point("model=qwen3-8b", "quantizer=rtn", "calibration=mini"))
    gptq = needs(*point("model=qwen3-8b", "quantizer=gptq", "calibration=mini"))
    assert gptq.variant_seconds > plain.variant_seconds + 5.6
    drawn = needs(*point("model=qwen3-8b", "quantizer=gptq", "calibration=mini", "calibration.draws=3"))
    assert drawn.variant_seconds == pytest.approx(3 * gptq.variant_seconds)
    assert drawn.original_seconds == gptq.original_seconds


def test_speed_takes_its_time_and_compiling_most_of_it(point):
    model = ("model=qwen3-8b", "quantizer=rtn")
    untimed = needs(*point(*model)).variant_seconds

    def spent(*asked):
        return needs(*point(*model, "speed=default", *asked)).variant_seconds - untimed

    plain = spent("speed.compile=false")
    assert plain > 10
    assert spent() > 2 * plain
    assert spent("speed.prefill_tokens=[512,2048]") == pytest.approx(1.5 * spent())
    alone = needs(*point("model=qwen3-8b", "quantizer=none", "speed=default")).variant_seconds
    assert alone - needs(*point("model=qwen3-8b", "quantizer=none")).variant_seconds == pytest.approx(spent() / 2)


def test_an_embedded_model_is_not_downloaded(point):
    assert needs(*point("model=smollm2-135m", "quantizer=rtn")).download_bytes == 0


def test_only_the_experts_that_a_token_is_sent_to_are_multiplied_with(point):
    found, known = point("model=qwen3-30b-a3b", "quantizer=rtn", "task.max_windows=10")
    needed = needs(found, known)
    assert needed.download_bytes == pytest.approx(61.06e9, rel=0.001)
    met = needed.original_seconds * 90e12 / (2 * 10 * 2048)
    assert met == pytest.approx(3.0e9, rel=0.1)  # of 30.5 billion


def test_sizes_of_a_part_are_those_of_what_it_quantizes(point):
    found, known = point("model=smollm2-135m", "quantizer=partly", "quantizer.only='*.mlp.down_proj'")
    bits, packed = estimate.quantized(found, known, estimate.coefficients)
    weights = 30 * 576 * 1536
    assert bits == pytest.approx(4.5)
    assert packed == pytest.approx(2 * (known.parameters - weights) + weights * 4.5 / 8)
    assert estimate.covered(found, known)[0] == pytest.approx(0.25, abs=0.001)
