"""Pow2 keeps qbench's contracts, and its scales are what it says they are."""

import torch
from qbench_pow2.pow2 import Pow2

from qbench.testing import QuantizerConformance, gaussian


class TestPow2(QuantizerConformance):
    def make(self):
        return Pow2()


class TestPow2At3Bits(QuantizerConformance):
    def make(self):
        return Pow2(nbits=3)


def test_scales_are_powers_of_two():
    mantissa, _ = torch.frexp(Pow2().quantize_one(gaussian(16, 128)).scale.dense())
    assert bool((mantissa == 0.5).all())
