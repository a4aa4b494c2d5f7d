"""A block float keeps qbench's contracts and is what its formula says."""

import torch
from qbench_example.block_float import BlockFloat
from qbench_example.pow2 import Pow2

from qbench.testing import FormatConformance


class TestBlockFloat(FormatConformance):
    def make(self, generator, shape):
        return Pow2(nbits=3).quantize_one(torch.randn(shape, generator=generator))


def test_the_formula():
    codes = torch.tensor([[0, 8, 15, 9]])
    weight = BlockFloat.build(codes, torch.tensor([[-2.0, 1.0]]), nbits=4, group_size=2)
    assert weight.dequantize().tolist() == [[-8 / 4, 0.0, 7 * 2, 1 * 2]]
    assert weight.stored_bytes() == {"codes": 2, "exponent": 2}
    assert weight.bits_per_weight == 8
