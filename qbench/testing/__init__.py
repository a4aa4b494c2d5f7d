"""Conformance suites for whoever extends qbench, one module a kind of extension; the only modules that import pytest.

from qbench.testing import QuantizerConformance
"""

from qbench.testing.exporters import ExporterConformance
from qbench.testing.quantizers import QuantizerConformance, correlated_inputs, gaussian, same, statistics_of
from qbench.testing.sources import SourceConformance

__all__ = [
    "ExporterConformance",
    "QuantizerConformance",
    "SourceConformance",
    "correlated_inputs",
    "gaussian",
    "same",
    "statistics_of",
]
