"""A result as a table reads it: everything but its layers, of which only the relative error is looked at.

A thousand results have hundreds of thousands of layers, and building a checked object of each takes longer than all the
rest of a leaderboard. The other fields are validated as those of `Result` are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from qbench.record.quantization import QuantizationRecord
from qbench.record.result import Result


@dataclass(frozen=True, slots=True)
class LayerError:
    """A LayerRow, whose other fields are passed over."""

    relative_error: float

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")


@dataclass(frozen=True)
class QuantizationOutline(QuantizationRecord):
    layers: list[LayerError]


@dataclass(frozen=True)
class Outline(Result):
    """To read, with `Outline.from_json`; what it was read from cannot be written again."""

    quantization: QuantizationOutline | None = None
