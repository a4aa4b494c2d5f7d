"""Calibration on a GPU: sums on tensor cores, and experts in a batch (run with: -m gpu)."""

from __future__ import annotations

import pytest
import torch

from qbench.passes.collect import Collector
from qbench.plugins.asinq import ASINQ
from qbench.plugins.awq import AWQ
from qbench.plugins.gptq import GPTQ
from qbench.quant import gpu, gram
from qbench.quant.quantizer import Statistic
from qbench.testing import correlated_inputs, same, statistics_of
from tests.kernels.test_quantize_gpu import uneven

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu.has_triton(), reason="Triton is not installed"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "columns"), [(16384, 4096), (3 * gram.ROWS + 5, 2500), (7, 100)])
def test_the_sums_of_a_hessian_are_fp32s(dtype, tokens, columns):
    """The error of an entry, of what Cauchy and Schwarz allow it, as gram.py states it."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator, device="cuda")
    x = ((x + 0.5 * x.roll(1, 1)) * (0.7 * torch.randn(columns, generator=generator, device="cuda")).exp()).to(dtype)
    made = torch.zeros(columns, columns, device="cuda")
    gram.add(made, x)
    gram.complete(made)
    exact = x.double().T @ x.double()
    sizes = exact.diagonal().sqrt()
    assert float(((made - exact).abs() / (sizes[:, None] * sizes)).max()) < gram.LARGEST_ERROR
    assert torch.equal(made, made.T) or float((made - made.T).abs().max()) < 1e-6 * float(made.max())


def test_statistics_of_16_bit_inputs_are_those_of_fp32():
    x = correlated_inputs(300, 5000).bfloat16()
    collectors = [Collector(frozenset(Statistic), 300, 5000, torch.device(device)) for device in ("cuda", "cpu")]
    for part in x.split(1999):
        collectors[0](part.cuda()[None])
        collectors[1](part.float()[None])
    fast, plain = (collector.statistics("x") for collector in collectors)
    torch.testing.assert_close(fast.absmean.cpu(), plain.absmean, rtol=1e-5, atol=0)
    torch.testing.assert_close(fast.squares.cpu(), plain.squares, rtol=1e-5, atol=0)
    torch.testing.assert_close(fast.hessian.cpu(), plain.hessian, rtol=1e-4, atol=1e-3)
    assert torch.equal(fast.inputs.cpu(), plain.inputs)


@pytest.mark.parametrize("quantizer", [GPTQ(), GPTQ(nbits=3, static_groups=False), AWQ(), ASINQ()], ids=str)
def test_an_expert_in_a_batch_is_what_it_is_alone(quantizer):
    stack = torch.stack([uneven(256, 1024, e) for e in range(5)]).cuda()
    inputs = [correlated_inputs(1024, 4096)[: 500 + 700 * e].cuda() * (1 + e) for e in range(5)]
    stats = [statistics_of(one, quantizer.needs) for one in inputs]
    names = [[str(e) for e in range(5)]]
    [together] = quantizer.quantize_stacks(names, [stack], stats)
    [again] = quantizer.quantize_stacks(names, [stack], stats)
    assert same(together, again)
    for e, x in enumerate(inputs):
        [alone] = quantizer.quantize([stack[e]], stats[e])
        errors = [((q.dequantize() - stack[e].float()) @ x.T).norm() for q in (together.select(e), alone)]
        assert float(errors[0] / errors[1]) == pytest.approx(1, abs=0.002)
