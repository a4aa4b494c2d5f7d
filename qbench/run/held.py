"""A point whose variant is a file: the file is opened for the model, and what it is goes into the result."""

from __future__ import annotations

from typing import Any

from qbench.errors import PointError
from qbench.model.coverage import shortfall
from qbench.model.linears import Skipped, find_linears
from qbench.quant.quantizer import Quantizer
from qbench.readers.file import Opened
from qbench.record.quantization import FileRecord
from qbench.request.prepare import Prepared


def for_model(quantizer: Quantizer, point: Prepared, skeleton: Any) -> Quantizer:
    """The quantizer, which is the point's, for this model, before a weight is read.

    Raises PointError for a file that cannot be used with it, or that holds too much of it in 16 bit.
    """
    try:
        quantizer = quantizer.for_model(skeleton)
    except ValueError as error:
        raise PointError(str(error)) from error
    if isinstance(quantizer, Opened):
        found = find_linears(skeleton)
        left = [
            Skipped(name, quantizer.weights(name), f"{quantizer.entry(name).kind} in the file")
            for name in quantizer.plain(found)
        ]
        covered = 1 - (sum(s.weights for s in [*left, *found.skipped] if s.counted)) / max(1, found.weights)
        if reason := shortfall(covered, point.config.runtime.min_coverage, [*left, *found.skipped], "are"):
            raise PointError(reason)
    return quantizer


def file_record(quantizer: Quantizer, point: Prepared) -> FileRecord | None:
    return quantizer.record(point.identity.quantizer["sha256"]) if isinstance(quantizer, Opened) else None
