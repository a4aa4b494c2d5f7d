"""What people read of an identity: the words of `--where`, and the settings in which rows and histories differ.

Nothing here decides what is the same measurement: that is qbench/record/identity.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qbench.record.result import Result
from qbench.record.titles import SHORT

FOR_PEOPLE = ("model", "task", "calibration")  # groups of the configuration whose other keys may be asked for as well


def words(result: Result) -> dict[str, Any]:
    """What `--where` may ask for, flat: the identity, and what the configuration says of model and texts besides.

    Paths are no words, since a file that is moved is the same file, nor is the calibration of a method without any.
    """
    groups = [name for name in FOR_PEOPLE if name != "calibration" or result.identity.calibration is not None]
    config = {name: result.config.get(name) for name in groups}
    named = {key: value for key, value in _flatten(config) if not key.endswith("path")}
    if result.model is not None:
        named["model.name"] = result.model.name
    return named | result.identity.flat()


def described(result: Result) -> dict[str, Any]:
    """The identity, flat, with texts and files of weights called by their name and the start of their hash.

    Also `speed`, since a row that was not timed has no setting in which another that was could differ.
    """
    flat = result.identity.flat() | {"speed": "timed" if result.identity.speed is not None else None}
    if (file := result.quantization and result.quantization.file) is not None:
        flat["quantizer.file"] = f"{file.name}@{str(flat.pop('quantizer.sha256', ''))[:SHORT]}"
    calibration = result.quantization.calibration if result.quantization is not None else None
    sources = {"task": {record.text_source for record in (*result.evaluation, *result.tasks)}}
    sources["calibration"] = {calibration.text_source} if calibration is not None else set()
    for group, names in sources.items():
        if (sha256 := flat.pop(f"{group}.text_sha256", None)) is not None:
            flat[f"{group}.text"] = f"{'+'.join(sorted(names))}@{str(sha256)[:SHORT]}"
    return flat


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flatten(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
