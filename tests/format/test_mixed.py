"""A stack whose matrices are stored in different ways, as files hold them."""

import json

import pytest
import torch

from qbench.format.mixed import Mixed, quantized_numel
from qbench.format.plain import Plain
from qbench.plugins.nf4 import NF4
from qbench.plugins.rtn import RTN
from qbench.testing import FormatConformance


class TestMixed(FormatConformance):
    def make(self, generator, shape):
        return Mixed.of(RTN(group_size=-1).quantize_one(torch.randn(shape, generator=generator)))


@pytest.mark.parametrize("first", [0, 1, 2])
def test_any_formats_in_one_stack(generator, first):
    weights = [torch.randn(8, 64, generator=generator) for _ in range(3)]
    one, other = RTN(nbits=3).quantize_one(weights[0]), NF4().quantize_one(weights[1])
    stored = [Mixed.of(one), Plain.of(weights[2], "F32"), Mixed.of(other)]
    stored = stored[first:] + stored[:first]
    stack = type(stored[0]).stack(stored)
    assert stack.shape == (3, 8, 64)
    assert quantized_numel(stack) == one.numel + other.numel
    assert stack.nbytes == sum(weight.nbytes for weight in stored)
    for i, weight in enumerate(stored):
        assert torch.equal(stack.select(i).dequantize(), weight.dequantize())
        assert torch.equal(stack.dequantize(torch.float16)[i], weight.dequantize(torch.float16))
    again = Mixed.rebuild(json.loads(json.dumps(stack.describe())), stack.tensors())
    assert torch.equal(again.dequantize(), stack.dequantize())


def test_other_shapes_are_refused(generator):
    weights = [Plain.of(torch.zeros(4, 32)), Mixed.of(RTN(group_size=-1).quantize_one(torch.randn(4, 64)))]
    with pytest.raises(ValueError, match="must share their shape"):
        Plain.stack(weights)


def test_quantized_weights_are_those_below_16_bits():
    assert quantized_numel(Plain.of(torch.zeros(4, 32))) == 0
    assert quantized_numel(RTN(group_size=-1).quantize_one(torch.randn(4, 64))) == 256
