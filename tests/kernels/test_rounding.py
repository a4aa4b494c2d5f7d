"""The rounding, codebook and HQQ kernels give what plain torch gives, bit for bit."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreted import kernels  # noqa: F401  first: it sets Triton up

from qbench.kernels import rounding  # isort: skip
from qbench.plugins.hqq import HQQ
from qbench.plugins.nf4 import FP4, NF4
from qbench.plugins.sinq import SINQ
from qbench.quant import gpu
from qbench.quant.rounding import group_extremes, round_to_nearest, rounding_error

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about lanes that are masked

# rows, columns and group size: whole groups, a ragged tail, widths that are no power of two, one group, odd columns
SHAPES = [(5, 128, 64), (7, 100, 32), (3, 96, 48), (4, 33, 33), (6, 33, 16)]


def random_weight(generator, rows: int, columns: int, dtype=torch.float32, scale: float = 0.05):
    weight = torch.randn(rows, columns, generator=generator) * scale
    weight[0] = 0  # every divisor must survive a group of zeros
    weight[1, : columns // 2] = 0.7
    return weight.to(dtype)


def assert_same(plain, fast):
    mine, other = plain.tensors(), fast.tensors()
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name
    assert (plain.shape, plain.nbits, plain.group_size) == (fast.shape, fast.nbits, fast.group_size)
    assert plain.method == fast.method


@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "width"), SHAPES)
def test_uniform(kernels, generator, rows, columns, width, nbits):  # noqa: F811
    t = torch.rand(columns, generator=generator) + 0.5
    for dtype, symmetric, aux_dtype, scale in (
        (torch.float32, False, "fp16", None),
        (torch.bfloat16, True, "fp16", t),
        (torch.float16, False, "int8", t),
        (torch.float32, True, "int8", None),
    ):
        weight = random_weight(generator, rows, columns, dtype)
        plain, fast = kernels(
            lambda w=weight, s=symmetric, a=aux_dtype, t=scale: round_to_nearest(
                w, nbits=nbits, group_size=width, symmetric=s, aux_dtype=a, input_scale=t
            )
        )
        assert_same(plain, fast)


def test_rows_of_a_larger_matrix(kernels, generator):  # noqa: F811
    weight = random_weight(generator, 6, 160)[:, 32:]
    assert_same(*kernels(lambda: round_to_nearest(weight, nbits=4, group_size=64)))


@pytest.mark.parametrize("aux_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_error(kernels, generator, symmetric, aux_dtype):  # noqa: F811
    weight, t = random_weight(generator, 6, 100), torch.rand(100, generator=generator) + 0.5
    plain, fast = kernels(
        lambda: rounding_error(weight, nbits=3, group_size=32, symmetric=symmetric, aux_dtype=aux_dtype, input_scale=t)
    )
    assert fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast.float(), plain, rtol=2**-7, atol=1e-7)  # the interpreter cuts bf16 off
    assert plain.abs().max() > 1e-3


def test_extremes(kernels, generator):  # noqa: F811
    weight, t = random_weight(generator, 6, 100), torch.rand(100, generator=generator) + 0.5
    for plain, fast in zip(*kernels(lambda: group_extremes(weight, 48)), strict=True):
        assert torch.equal(plain, fast)
    for plain, fast in zip(group_extremes(weight / t, 48), rounding.extremes(weight, 48, t), strict=True):
        assert torch.equal(plain, fast)


@pytest.mark.parametrize("aux_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("quantizer", [NF4, FP4])
@pytest.mark.parametrize(("rows", "columns", "width"), SHAPES)
def test_codebook(kernels, generator, rows, columns, width, quantizer, aux_dtype):  # noqa: F811
    weight = random_weight(generator, rows, columns, torch.bfloat16)
    made = quantizer(group_size=width, aux_dtype=aux_dtype)
    assert_same(*kernels(lambda: made.quantize_one(weight)))


def test_a_value_on_a_midpoint_goes_to_the_lower_level(kernels):  # noqa: F811
    ordered = torch.tensor(FP4.levels).sort().values
    weight = torch.cat([torch.ones(1), (ordered[1:] + ordered[:-1]) / 2])[None].repeat(2, 1)
    assert_same(*kernels(lambda: FP4(group_size=16).quantize_one(weight)))


@pytest.mark.parametrize("inner", [{"codebook": "nf4"}, {"inner": "hqq", "nbits": 3}, {"nbits": 3}], ids=str)
def test_every_rounding_divides_by_the_input_scale_first(kernels, generator, inner):  # noqa: F811
    weight, t = random_weight(generator, 6, 100), torch.rand(100, generator=generator) + 0.5
    for aux_dtype in ("fp16", "int8"):
        quantizer = SINQ(group_size=32, aux_dtype=aux_dtype, **inner)
        plain, fast = kernels(lambda q=quantizer: q._round(weight, t, torch.tensor(1.0)))
        assert (plain.codes() == fast.codes()).float().mean() > 0.99
        torch.testing.assert_close(plain.dequantize(), fast.dequantize(), rtol=0.01, atol=0.01)
        assert plain.method == fast.method


@pytest.mark.parametrize("scale", [0.02, 5.0])  # without and with errors that the shrinkage lets through
@pytest.mark.parametrize("aux_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("nbits", [2, 4])
def test_hqq(kernels, generator, nbits, aux_dtype, scale):  # noqa: F811
    weight = torch.randn(12, 100, generator=generator) * scale
    plain, fast = kernels(lambda: HQQ(nbits=nbits, group_size=32, aux_dtype=aux_dtype).quantize_one(weight))
    assert plain.diagnostics["zero_updates"] > 2
    # near its end the search is flat, and the order of a sum decides whether one more round pays
    assert abs(fast.diagnostics["zero_updates"] - plain.diagnostics["zero_updates"]) <= 1
    torch.testing.assert_close(fast.zero.dense(), plain.zero.dense(), rtol=1e-2, atol=1e-2)
    assert (fast.codes() == plain.codes()).float().mean() > 0.99


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("call", [rounding.uniform, rounding.codebook])
def test_weights_that_fp16_scales_cannot_hold_are_refused(generator, call, bad):
    weight = random_weight(generator, 6, 100)
    weight[2, 98] = bad
    arguments = (4, False) if call is rounding.uniform else (NF4.levels,)
    with pytest.raises(ValueError, match="not a finite number"):
        call(weight, 32, *arguments)


def test_what_kernels_take(monkeypatch):
    monkeypatch.setattr(gpu, "enabled", lambda tensor: True)
    weight = torch.zeros(4, 96)
    assert gpu.fused(weight, 64)
    assert gpu.fused(weight, 96)
    assert not gpu.fused(weight, 12), "a group would start inside a byte"
    assert not gpu.fused(weight.T, 64), "columns are not neighbours"
    assert not gpu.fused(weight.double(), 64)
    assert gpu.fused(weight[None], 64)
    assert not gpu.fused(weight[None, None], 64)


def test_a_cpu_never_runs_kernels():
    assert not gpu.enabled(torch.zeros(2))


@pytest.mark.parametrize(("asked", "runs"), [(None, True), ("1", True), ("0", False)])
def test_plain_torch_can_be_asked_for(monkeypatch, asked, runs):
    class OnTheGPU:
        is_cuda = True

    monkeypatch.setenv("QBENCH_KERNELS", asked) if asked else monkeypatch.delenv("QBENCH_KERNELS", raising=False)
    assert gpu.enabled(OnTheGPU()) is runs
