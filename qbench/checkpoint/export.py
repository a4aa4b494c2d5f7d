"""Writing the checkpoint that a request asks for with `export.dir`, in the format that `export.format` names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qbench.checkpoint.exporter import Exporter
from qbench.errors import RequestError, WriteError
from qbench.quant.noise import Noise
from qbench.quant.original import Original
from qbench.quant.quantizer import Quantizer
from qbench.record.result import Result
from qbench.registry import EXPORTER, make
from qbench.values import typed

log = logging.getLogger(__name__)


def make_exporter(config: Mapping[str, Any]) -> tuple[Exporter, Path | None]:
    """The format and the folder that the node `export` asks for, no folder where it asks for no checkpoint.

    Raises RequestError for an unknown format, a setting that it does not have, or a value of another type.
    """
    settings = {key: value for key, value in config.items() if key != "dir"}
    folder = typed("export.dir", config.get("dir"), str | None)
    return make(EXPORTER, settings), Path(folder).expanduser() if folder else None


def check_target(exporter: Exporter, folder: Path, run_id: str, quantizer: Quantizer, name: str) -> None:
    """Raises RequestError now when the checkpoint of this point could not be written in the format `name`."""
    if isinstance(quantizer, Original):
        name = "noise" if isinstance(quantizer, Noise) else "none"
        raise RequestError(f"quantizer={name} changes no weight, so there is nothing to export; leave out export.dir")
    exporter.check_target(folder, run_id)
    if reason := exporter.refuse(quantizer):
        raise RequestError(f"export.format={name} cannot express {type(quantizer).__name__}: {reason}")


def check_model(exporter: Exporter, model: Any, quantizer: Quantizer, name: str) -> None:
    """Raises RequestError, before anything is measured, naming a layer that the export would have to refuse."""
    if reason := exporter.refuse_model(model, quantizer):
        raise RequestError(f"export.format={name}: {reason}")


def is_exported(folder: Path) -> bool:
    """True if the point's checkpoint is there: written in one step, and `check_target` refuses whatever else is."""
    return folder.is_dir() and any(folder.iterdir())


def export(exporter: Exporter, model: Any, tokenizer: Any, folder: Path, result: Result, name: str) -> None:
    """Writes the quantized model of a point that is recorded; its folder names no other folder. Raises WriteError."""
    assert result.model is not None
    assert result.identity is not None
    origin = {
        "run_id": result.run_id,
        "qbench_version": result.qbench_version,
        "model": {"name": result.model.name, "fingerprint": result.model.fingerprint, "note": result.model.note},
        "quantizer": result.identity.quantizer,
    }
    if result.identity.transform is not None:
        origin["transform"] = result.identity.transform
    try:
        exporter.save(model, tokenizer, folder, origin)
    except RequestError as error:
        raise WriteError(result, f"the result is recorded, but there is no checkpoint: {error}") from error
    log.info("%s checkpoint written to %s", name, folder)
