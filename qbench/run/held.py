"""A point whose variant is a file: the file is opened for the model, and what it is goes into the result."""

from __future__ import annotations

from typing import Any

from qbench.errors import PointError
from qbench.quant.quantizer import Quantizer
from qbench.readers.file import Opened
from qbench.record.quantization import FileRecord
from qbench.request.prepare import Prepared


def for_model(quantizer: Quantizer, point: Prepared, skeleton: Any) -> Quantizer:
    """The quantizer, which is the point's, for this model, before a weight is read.

    Raises PointError for a file that cannot be used with it.
    """
    try:
        return quantizer.for_model(skeleton)
    except ValueError as error:
        raise PointError(str(error)) from error


def file_record(quantizer: Quantizer, point: Prepared) -> FileRecord | None:
    return quantizer.record(point.identity.quantizer["sha256"]) if isinstance(quantizer, Opened) else None
