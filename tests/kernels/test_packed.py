"""Packed weights are read back by the kernels as plain torch reads them, and described alike."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreted import kernels  # noqa: F401  first: it sets Triton up

from qbench.kernels import packed  # isort: skip
from qbench.passes.measured import measured
from qbench.plugins.fp8 import FP8
from qbench.plugins.hqq import HQQ
from qbench.plugins.nf4 import NF4
from qbench.plugins.rtn import RTN
from qbench.plugins.sinq import SINQ
from tests.quant.test_stacks import stacks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about lanes that are masked
METHODS = [
    RTN(nbits=3, symmetric=True, group_size=48),
    RTN(nbits=8, aux_dtype="int8"),
    NF4(),
    HQQ(nbits=2),
    SINQ(t_dtype="fp8"),
    SINQ(codebook="nf4", group_size=32),
]


@pytest.mark.parametrize("quantizer", METHODS, ids=str)
def test_dense_again(quantizer):
    for weight in (stacks(2, 9, 100)[1], stacks(1, 7, 64)[0][0]):
        made = quantizer.quantize([weight], None)[0]
        out = torch.empty(*weight.shape[:-2], weight.shape[-1], weight.shape[-2]).mT
        packed.restore(made, out)
        assert torch.equal(out, made.dequantize())


@pytest.mark.parametrize("quantizer", [*METHODS, RTN(rotation="hadamard"), FP8()], ids=str)
def test_rows_say_what_plain_torch_says(kernels, quantizer):  # noqa: F811
    for weight in (stacks(2, 70, 200)[0], stacks(2, 40, 64)[1][1]):
        made = quantizer.quantize([weight], None)[0]
        plain, fast = kernels(lambda w=weight, q=made: measured(w, q))
        assert plain.keys() == fast.keys()
        for name, number in plain.items():
            torch.testing.assert_close(fast[name].float(), number.float(), rtol=2e-5, atol=1e-7, msg=name)
