"""Conformance suites for whoever extends qbench, one module a kind of extension; the only modules that import pytest.

from qbench.testing import QuantizerConformance
"""

from qbench.testing.exporters import ExporterConformance
from qbench.testing.formats import FormatConformance
from qbench.testing.protocols import ProtocolConformance
from qbench.testing.quantizers import QuantizerConformance, correlated_inputs, gaussian, same, statistics_of
from qbench.testing.readers import ReaderConformance
from qbench.testing.sources import SourceConformance
from qbench.testing.trackers import TrackerConformance
from qbench.testing.transforms import TransformConformance

__all__ = [
    "ExporterConformance",
    "FormatConformance",
    "ProtocolConformance",
    "QuantizerConformance",
    "ReaderConformance",
    "SourceConformance",
    "TrackerConformance",
    "TransformConformance",
    "correlated_inputs",
    "gaussian",
    "same",
    "statistics_of",
]
