"""The compiled quantization kernels against plain torch on the CPU, at the sizes of real layers (run with: -m gpu)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qbench.layers.linear import relative_error
from qbench.plugins.asinq import ASINQ
from qbench.plugins.awq import AWQ
from qbench.plugins.gptq import GPTQ
from qbench.plugins.hqq import HQQ
from qbench.plugins.nf4 import FP4, NF4
from qbench.plugins.rtn import RTN
from qbench.plugins.sinq import SINQ
from qbench.quant import gpu
from qbench.testing import correlated_inputs, same, statistics_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu.has_triton(), reason="Triton is not installed"),
]


SHAPES = [(1024, 4096), (1536, 1100), (300, 576)]


def uneven(rows: int, columns: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(0.5 * torch.randn(n, generator=generator)).exp() for n in (rows, columns)]
    weight = torch.randn(rows, columns, generator=generator) * 0.02 * sizes[0][:, None] * sizes[1]
    return weight.bfloat16()


ROUNDING = pytest.mark.parametrize(
    "quantizer",
    [RTN(nbits=n) for n in (2, 3, 4, 8)]
    + [RTN(nbits=3, group_size=128, symmetric=True), RTN(group_size=48), RTN(group_size=-1), NF4(), FP4(group_size=-1)],
    ids=str,
)


@ROUNDING
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_is_the_same_bit_for_bit(quantizer, shape):
    weight = uneven(*shape)
    fast, plain = quantizer.quantize_one(weight.cuda()), quantizer.quantize_one(weight)
    assert same(fast.with_tensors({name: tensor.cpu() for name, tensor in fast.tensors().items()}), plain)


@ROUNDING
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_on_int8_scales(quantizer, shape):
    """torch divides by a number otherwise on a GPU, which moves an int8 scale that lies on a tie by one step."""
    weight, quantizer = uneven(*shape), replace(quantizer, aux_dtype="int8")
    fast, plain = quantizer.quantize_one(weight.cuda()), quantizer.quantize_one(weight)
    assert (fast.codes().cpu() == plain.codes()).float().mean() > 0.999
    assert float(relative_error(weight.cuda(), fast)) == pytest.approx(float(relative_error(weight, plain)), rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("quantizer", [SINQ(), SINQ(nbits=3, group_size=128), HQQ(), HQQ(nbits=2)], ids=str)
def test_searches_agree(quantizer, shape):
    weight = uneven(*shape)
    fast, plain = quantizer.quantize_one(weight.cuda()), quantizer.quantize_one(weight)
    # HQQ's search is flat near its end: which of two rounds is kept, the order of a sum decides
    assert (fast.codes().cpu() == plain.codes()).float().mean() > (0.99 if isinstance(quantizer, HQQ) else 0.999)
    assert float(relative_error(weight.cuda(), fast)) == pytest.approx(float(relative_error(weight, plain)), rel=1e-3)


@pytest.mark.parametrize(("shape", "width"), [((4096, 4096), 64), ((12288, 1024), 64), ((1000, 1100), 128)], ids=str)
def test_column_factors(shape, width):
    weight = uneven(*shape)
    (fast, left), (plain, expected) = (SINQ(group_size=width).input_scale(w, width) for w in (weight.cuda(), weight))
    torch.testing.assert_close(fast.cpu(), plain, rtol=1e-4, atol=0)
    assert float(left) == pytest.approx(float(expected), rel=1e-4)


def test_programs_that_wait_for_each_other_give_the_same_bits_every_time():
    weights = [uneven(rows, 4096, rows).cuda() for rows in (4096, 1024, 1024)]
    first = SINQ().quantize(weights, None)
    for _ in range(20):
        assert all(same(a, b) for a, b in zip(first, SINQ().quantize(weights, None), strict=True))


@pytest.mark.parametrize(
    "quantizer",
    [
        GPTQ(act_order=False, static_groups=False),
        GPTQ(act_order=True, static_groups=False, nbits=3, aux_dtype="int8"),
        GPTQ(act_order=True, static_groups=True),
        AWQ(),
        ASINQ(),
    ],
    ids=str,
)
def test_calibrated_methods_reach_the_same_output_error(quantizer):
    weights, inputs = [uneven(512, 1024), uneven(256, 1024, 1)], correlated_inputs(1024, 4096)
    results = []
    for device in ("cuda", "cpu"):
        stats = statistics_of(inputs.to(device), quantizer.needs)
        results.append(quantizer.quantize([weight.to(device) for weight in weights], stats))
    for weight, fast, plain in zip(weights, *results, strict=True):
        errors = [((q.dequantize().cpu() - weight.float()) @ inputs.T).norm() for q in (fast, plain)]
        assert float(errors[0] / errors[1]) == pytest.approx(1, abs=0.01)


def test_plain_torch_can_be_asked_for(monkeypatch):
    weight = uneven(64, 128).cuda()
    assert gpu.fused(weight, 64)
    monkeypatch.setenv("QBENCH_KERNELS", "0")
    assert not gpu.fused(weight, 64)
