"""Our transforms pass the suite that a third party's must pass."""

from qbench.testing import TransformConformance
from qbench.transforms.hadamard import Hadamard
from qbench.transforms.presinq import PreSINQ
from qbench.transforms.transform import NoTransform


class TestPreSINQ(TransformConformance):
    def make(self):
        return PreSINQ()


class TestHadamard(TransformConformance):
    def make(self):
        return Hadamard()


class TestNone(TransformConformance):
    changes_nothing = True

    def make(self):
        return NoTransform()
