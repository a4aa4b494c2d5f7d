"""Moving gains keeps qbench's contract: the model computes what it did."""

from qbench_example.gains import Gains

from qbench.testing import TransformConformance


class TestGains(TransformConformance):
    def make(self):
        return Gains()
