"""A block float is what its formula says, and comes back from its description and its tensors."""

import json

import torch
from qbench_example.block_float import BlockFloat
from qbench_example.pow2 import Pow2

from qbench.testing import gaussian


def test_the_formula():
    codes = torch.tensor([[0, 8, 15, 9]])
    weight = BlockFloat.build(codes, torch.tensor([[-2.0, 1.0]]), nbits=4, group_size=2)
    assert weight.dequantize().tolist() == [[-8 / 4, 0.0, 7 * 2, 1 * 2]]
    assert weight.stored_bytes() == {"codes": 2, "exponent": 2}
    assert weight.bits_per_weight == 8


def test_it_comes_back_from_its_description():
    weight = Pow2(nbits=3, group_size=32).quantize_one(gaussian(16, 100))
    again = BlockFloat.rebuild(json.loads(json.dumps(weight.describe())), weight.tensors())
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert again.describe() == weight.describe()


def test_a_stack_is_its_matrices():
    weights = [Pow2().quantize_one(gaussian(16, 128, seed)) for seed in range(3)]
    stack = BlockFloat.stack(weights)
    assert stack.shape == (3, 16, 128)
    for index, weight in enumerate(weights):
        assert torch.equal(stack.dequantize()[index], weight.dequantize())
        assert torch.equal(stack.select(index).dequantize(), weight.dequantize())
