"""Conformance suites for whoever extends qbench, one module a kind of extension; the only modules that import pytest.

from qbench.testing import QuantizerConformance
"""

from qbench.testing.protocols import ProtocolConformance
from qbench.testing.quantizers import QuantizerConformance, correlated_inputs, gaussian, same, statistics_of

__all__ = ["ProtocolConformance", "QuantizerConformance", "correlated_inputs", "gaussian", "same", "statistics_of"]
