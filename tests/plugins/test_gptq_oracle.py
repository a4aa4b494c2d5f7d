"""plugins/gptq.py against auto-gptq's own GPTQ class on real layers and the same Hessian (`make test-oracle`).

Both are judged by the error of the output, ||X W^T - X Q^T||. The official code gives a group of columns its grid when
it reaches it, from columns that still lack the corrections of the block of columns around it. With blocks of 64, the
group size, none are missing and both must agree. With its default of 128 every other group's grid lags: at 3 and 4
bits ours must not be worse by more than the same tolerance. At 2 bits lagging grids can end better (measured: 6 % for
q, k, v of block 0, symmetric with act-order), so there only equal blocks are compared.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qbench.plugins.gptq import GPTQ
from qbench.plugins.rtn import RTN
from qbench.testing import statistics_of

pytestmark = pytest.mark.oracle

GROUP = 64
DEFAULT_BLOCK = 128
TOLERANCE = 0.01
DAMPING = 0.01


@pytest.fixture
def official(auto_gptq, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # called whatever the device

    def quantize(weight: Tensor, hessian: Tensor, nbits: int, symmetric: bool, act_order: bool, block: int) -> Tensor:
        """The official dequantized weight `[out, in]`."""
        layer = nn.Linear(*reversed(weight.shape), bias=False)
        layer.weight.data = weight.clone()
        oracle = auto_gptq.GPTQ(layer)
        oracle.quantizer.configure(nbits, perchannel=True, sym=symmetric, mse=False)
        oracle.H, oracle.nsamples = hessian.clone(), 1
        oracle.fasterquant(blocksize=block, percdamp=DAMPING, group_size=GROUP, actorder=act_order)
        return layer.weight.data

    return quantize


def output_error(weight: Tensor, dense: Tensor, hessian: Tensor) -> float:
    error = (weight - dense).double()
    return float(torch.linalg.vecdot(error @ hessian.double(), error).sum().sqrt())


@pytest.mark.parametrize(
    ("nbits", "symmetric", "act_order", "block"),
    [
        (4, False, False, GROUP),
        (4, True, False, GROUP),
        (3, False, True, GROUP),
        (2, True, True, GROUP),
        (4, False, False, DEFAULT_BLOCK),
        (3, False, False, DEFAULT_BLOCK),
    ],
)
@torch.no_grad()
def test_output_error_agrees_on_real_layers(official, real_groups, nbits, symmetric, act_order, block):
    terms = {"nbits": nbits, "group_size": GROUP, "symmetric": symmetric, "damping": DAMPING}
    method = GPTQ(**terms, act_order=act_order, static_groups=False)
    for group in real_groups:
        hessian = group.inputs.T @ group.inputs
        results = method.quantize(group.weights, statistics_of(group.inputs, method.needs))
        mine, theirs, rtn = 0.0, 0.0, 0.0
        for weight, result in zip(group.weights, results, strict=True):
            mine += output_error(weight, result.dequantize(), hessian)
            theirs += output_error(weight, official(weight, hessian, nbits, symmetric, act_order, block), hessian)
            plain = RTN(nbits=nbits, group_size=GROUP, symmetric=symmetric).quantize_one(weight)
            rtn += output_error(weight, plain.dequantize(), hessian)
        print(f"{group.name}: {mine / theirs - 1:+.3%}")
        assert theirs < 0.9 * rtn, f"{group.name}: the official result is no better than RTN, the comparison is empty"
        assert mine <= (1 + TOLERANCE) * theirs, group.name
        assert block == DEFAULT_BLOCK or mine >= (1 - TOLERANCE) * theirs, group.name
