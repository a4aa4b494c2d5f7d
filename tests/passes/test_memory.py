"""Memory: quantizing holds the model as it is at that moment and two layers' working copies; calibration, its bound.

A layer's working copy is 8 bytes a weight of the largest linear group that the method treats as one, an fp32 copy and
a temporary of the same size, and what the method itself needs. Measured by the kernel in a process of its own, from
one call of the quantizer to the next; glibc is told to give every tensor back when it is freed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HIDDEN, INTERMEDIATE, BLOCKS = 768, 1536, 16
SEQUENCES, WINDOW = 4, 128

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

LAYER = 8 * INTERMEDIATE * HIDDEN
PAIR = 2 * LAYER  # gate and up are one group for a calibrated method
# fp64 [in, in]: H, its damped copy and its factor, or H, the factor and its inverse
FACTORS = 3 * 8 * INTERMEDIATE**2
# X^T X of q/k/v, o, gate/up and down, and at the same depth all hidden states; then activations of one sequence
HIDDEN_STATES = 4 * SEQUENCES * WINDOW * HIDDEN
STATISTICS = 4 * (3 * HIDDEN**2 + INTERMEDIATE**2) + HIDDEN_STATES
# the rows of inputs that a scale search multiplies, of a block's four linear groups; and the product with an error
SAMPLE = 4 * SEQUENCES * WINDOW * (3 * HIDDEN + 2 * INTERMEDIATE)
ACTIVATIONS = 4 * WINDOW * (8 * HIDDEN + 4 * INTERMEDIATE)
SLACK = 3 * 2**20  # the interpreter's own small objects and thread-local buffers of the matrix library

BOUNDS = {
    "rtn": 2 * LAYER + SLACK,
    "sinq": 2 * LAYER + SLACK,
    "hqq": 2 * LAYER + SLACK,
    "nf4": 2 * LAYER + SLACK,
    "awq": 2 * PAIR + SAMPLE + HIDDEN_STATES + ACTIVATIONS + SLACK,
    "asinq": 2 * PAIR + SAMPLE + HIDDEN_STATES + ACTIVATIONS + SLACK,
    "gptq": max(2 * PAIR, PAIR + FACTORS) + STATISTICS + ACTIVATIONS + SLACK,
}


def quantize(name, *, hoard):
    """Prints the bytes of the model, and its excess: the most that was held beside the model as it was then."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from qbench.passes.calibrate import Calibration
    from qbench.passes.collect import Collector
    from qbench.passes.quantize import quantize_model
    from qbench.registry import quantizer_class

    torch.manual_seed(0)
    shape = dict(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=BLOCKS, vocab_size=256)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=12)).eval().requires_grad_(False)
    ids = np.random.default_rng(0).integers(0, 256, (SEQUENCES, WINDOW))
    # the libraries allocate what they keep: 20 MB for the factors of the largest layer
    model(torch.from_numpy(ids[:1]), use_cache=False)
    method = quantizer_class(name)
    collector = Collector(method.needs, INTERMEDIATE, SEQUENCES * WINDOW, torch.device("cpu"))
    collector(torch.randn(SEQUENCES * WINDOW, INTERMEDIATE))
    method().quantize([torch.randn(HIDDEN, INTERMEDIATE)], collector.statistics("down"))
    del collector

    def resident(key):
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return 1024 * int(line.split()[1])

    def model_bytes():
        return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))

    started = model_bytes()
    rest = resident("VmRSS") - started
    excess, kept = [], []

    def measure():
        excess.append(resident("VmHWM") - rest - measure.model)
        measure.model = model_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here

    class Watched(method):
        def quantize(self, weights, stats):
            measure()
            if hoard:
                kept.extend(weights)
            return super().quantize(weights, stats)

    quantizer = Watched()
    measure.model = started
    Path("/proc/self/clear_refs").write_text("5")
    quantize_model(model, quantizer, Calibration(ids, "test", "0") if quantizer.needs else None)
    measure()
    print(json.dumps({"model": started, "quantized": model_bytes(), "excess": max(excess)}))


def measured(name, *, hoard=False):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = f"from tests.passes.test_memory import quantize; quantize({name!r}, hoard={hoard})"
    done = subprocess.run(
        [sys.executable, "-c", command],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", BOUNDS)
def test_no_more_is_held_than_the_model_and_two_working_copies(name):
    found = measured(name)
    assert found["model"] > 300e6
    assert found["model"] > 2 * BOUNDS[name]  # large enough to tell
    assert found["quantized"] < 0.2 * found["model"]
    assert 0 < found["excess"] < BOUNDS[name]


def test_a_second_copy_of_the_model_would_be_seen():
    found = measured("rtn", hoard=True)
    assert found["excess"] > 5 * BOUNDS["rtn"]
