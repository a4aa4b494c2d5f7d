"""quantizer=upstream/...: what the official packages return is converted without loss, and agrees with ours.

Two comparisons each (`make test-oracle`). With the package's own dequantization, entered at its front door and with
aux in the fp16 that both store: bit for bit. With our plugin of the same method: within the tolerances that
test_hqq.py, test_nf4.py and test_sinq_oracle.py state and explain.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from qbench.layers.linear import relative_error
from qbench.plugins.hqq import HQQ
from qbench.plugins.nf4 import NF4
from qbench.plugins.rtn import RTN
from qbench.plugins.sinq import SINQ
from qbench.registry import make_quantizer

pytestmark = pytest.mark.oracle
pytest.importorskip("hqq", reason="run `make test-oracle`")
pytest.importorskip("sinq", reason="run `make test-oracle`")
pytest.importorskip("bitsandbytes", reason="run `make test-oracle`")

GATE = 5.0  # kurtosis above which the official SINQ falls back to plain rounding


def upstream(name: str, **settings):
    return make_quantizer({"name": f"upstream/{name}", **settings})


@pytest.fixture(scope="module")
def weights(smollm2_folder) -> dict[str, Tensor]:
    """Random weights and linears of the reference model, fp32 `[out, in]`, by name."""
    generator = torch.Generator().manual_seed(0)
    found = {
        "gaussian": 0.02 * torch.randn(512, 1024, generator=generator),
        "large": torch.randn(192, 576, generator=generator),
        "uneven columns": 0.02 * torch.randn(256, 512, generator=generator) * torch.randn(512, generator=generator),
    }
    with safe_open(smollm2_folder / "model.safetensors", "pt") as file:
        names = sorted(name for name in file.keys() if "_proj" in name)[::20]  # noqa: SIM118
        return found | {name: file.get_tensor(name).float() for name in names}


def differing(ours, theirs) -> float:
    return float((ours.codes() != theirs.codes()).float().mean())


def apart(ours, theirs) -> float:
    return float((ours.dequantize() - theirs.dequantize()).norm() / theirs.dequantize().norm())


@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
def test_hqq(weights, nbits):
    from hqq.core.quantize import Quantizer

    for name, weight in weights.items():
        made = upstream("hqq", nbits=nbits).quantize_one(weight)
        packed, meta = Quantizer.quantize(weight, nbits=nbits, group_size=64, axis=1, device="cpu")
        meta |= {key: meta[key].half().float() for key in ("scale", "zero")}
        assert torch.equal(made.dequantize(), Quantizer.dequantize(packed, meta | {"compute_dtype": torch.float32}))
        assert made.method == "hqq (official 0.2.8.post1)"
        ours = HQQ(nbits=nbits).quantize_one(weight)
        if nbits in (3, 4):
            assert differing(ours, made) < 0.01, name
            assert relative_error(weight, ours) < 1.003 * relative_error(weight, made), name


def test_nf4(weights):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, weight in weights.items():
        made = upstream("nf4").quantize_one(weight)
        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        state.absmax = state.absmax.half().float()
        assert torch.equal(made.dequantize(), dequantize_4bit(packed, state)), name
        assert made.method == "nf4 (bitsandbytes 0.50.2)"
        ours = NF4().quantize_one(weight)
        for part, tensor in ours.tensors().items():
            assert torch.equal(made.tensors()[part], tensor), f"{name}: {part}"


@pytest.mark.parametrize("nbits", [2, 3, 4])
def test_sinq_with_its_gate(weights, nbits):
    """As the package runs it: its gate may replace the method, and the row then says so."""
    from sinq.optimize import kurtosis
    from sinq.quantizer import Quantizer

    methods = set()
    for name, weight in weights.items():
        made = upstream("sinq", nbits=nbits).quantize_one(weight)
        settings = {"nbits": nbits, "group_size": 64, "axis": 1, "method": "sinq_nogemlite", "device": "cpu"}
        packed, meta = Quantizer.quantize(weight, None, compute_dtype=torch.float32, **settings)
        meta |= {key: meta[key].half().float() for key in ("scale", "zero", "scale2")}
        assert torch.equal(made.dequantize(), Quantizer.dequantize(packed, meta)), name
        gated = float(kurtosis(weight)) > GATE
        assert made.method == ("rtn (official sinq 0.2.0)" if gated else "sinq (official 0.2.0)"), name
        ours = (RTN if gated else SINQ)(nbits=nbits).quantize_one(weight)
        assert differing(ours, made) <= 1e-3, name
        methods.add(made.method)
    assert len(methods) == 2, "some weights should be gated and some not"


@pytest.mark.parametrize("nbits", [3, 4])
def test_sinq_without_its_gate(weights, nbits):
    for name, weight in weights.items():
        made = upstream("sinq", nbits=nbits, kurtosis_threshold=None).quantize_one(weight)
        ours = SINQ(nbits=nbits).quantize_one(weight)
        assert made.method == "sinq (official 0.2.0)"
        torch.testing.assert_close(ours.input_scale, made.input_scale, rtol=1.1e-3, atol=0)  # an ulp of fp16
        assert differing(ours, made) <= 1e-3, name
        assert apart(ours, made) <= 5e-3, name


@pytest.mark.parametrize("name", ["hqq", "nf4", "sinq"])
def test_a_ragged_group_is_refused_with_a_sentence(name):
    with pytest.raises(ValueError, match="group_size 64 does not divide 100 input channels"):
        upstream(name).quantize_one(torch.randn(32, 100))


@pytest.mark.parametrize("name", ["hqq", "nf4", "sinq"])
def test_weights_of_16_bit_are_quantized_in_fp32(name):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    half, full = (upstream(name).quantize_one(w) for w in (weight, weight.float()))
    assert torch.equal(half.dequantize(), full.dequantize())


def test_a_sweep_of_them_leaves_stdout_to_the_summary(tmp_path):
    names = ["hqq", "upstream/hqq", "upstream/nf4", "upstream/sinq"]
    command = [sys.executable, "-m", "qbench", "-m", f"quantizer={','.join(names)}"]
    done = subprocess.run(
        [*command, "model=tiny-dense", "task.max_windows=1"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    points = json.loads(line)["results"]
    assert [point["quantizer"] for point in points] == names
    assert len({point["run_id"] for point in points}) == 4
    assert all(point["status"] == "ok" for point in points)


def test_running_a_point_of_ours_does_not_import_them():
    code = "import sys, qbench.run; print({'hqq', 'bitsandbytes', 'sinq'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
