"""Pow2 keeps qbench's contracts."""

from qbench_example.pow2 import Pow2

from qbench.testing import QuantizerConformance


class TestPow2(QuantizerConformance):
    def make(self):
        return Pow2()


class TestPow2At3Bits(QuantizerConformance):
    def make(self):
        return Pow2(nbits=3)
