"""A point whose variant is a file: the file is opened for the model, and what it is goes into the result."""

from __future__ import annotations

from typing import Any

from qbench.errors import PointError
from qbench.quant.quantizer import Quantizer
from qbench.readers.file import Opened
from qbench.record.quantization import FileRecord
from qbench.request.prepare import Prepared
from qbench.sources import hashes


def for_model(quantizer: Quantizer, point: Prepared, skeleton: Any) -> Quantizer:
    """The quantizer, which is the point's, for this model, before a weight is read.

    Raises PointError for a file that cannot be used with it.
    """
    try:
        return quantizer.for_model(skeleton)
    except ValueError as error:
        raise PointError(str(error)) from error


def file_record(quantizer: Quantizer, point: Prepared) -> FileRecord | None:
    """What is recorded of the file, once all of it has been read; None for any other variant.

    Raises PointError unless it is still the file that the point was named after.
    """
    if not isinstance(quantizer, Opened):
        return None
    sha256 = point.identity.quantizer["sha256"]
    try:
        quantizer.check_unchanged()
        with hashes.remembered_in(point.store.root):
            contents = hashes.sha256_of(quantizer.states)
    except ValueError as error:
        raise PointError(str(error)) from error
    if hashes.of_all(contents) != sha256:
        raise PointError(
            f"{quantizer.name} was changed or replaced after the point was prepared; run the point again when the file "
            "stays as it is"
        )
    return quantizer.record(sha256)
