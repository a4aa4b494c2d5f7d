"""A point's packed checkpoint: writing the one that export.dir asks for, and running one that model=packed names."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from qbench.config import Config, ExportConfig
from qbench.errors import RequestError
from qbench.models import load
from qbench.quant import checkpoint, manifest
from qbench.record.result import Result

log = logging.getLogger(__name__)


def export_target(config: ExportConfig, run_id: str) -> Path | None:
    """Where the checkpoint will go, if one is asked for; raises RequestError now when it could not be written."""
    if not config.dir:
        return None
    folder = Path(config.dir).expanduser()
    checkpoint.check_target(folder, run_id)
    return folder


def export(loaded: load.LoadedModel, folder: Path, result: Result, quantizer: dict[str, Any]) -> None:
    """Writes the quantized model of a point that is recorded; its folder names no other folder."""
    assert result.model is not None
    origin = {
        "run_id": result.run_id,
        "qbench_version": result.qbench_version,
        "model": {"name": result.model.name, "fingerprint": result.model.fingerprint, "note": result.model.note},
        "quantizer": quantizer,
    }
    try:
        checkpoint.save(loaded.model, loaded.tokenizer, folder, origin=origin)
    except RequestError as error:
        raise RequestError(f"the result is recorded, but there is no checkpoint: {error}") from error
    log.info("packed checkpoint written to %s", folder)


def as_recorded(config: Config, command: list[str]) -> Config:
    """The configuration of a packed checkpoint's point: what quantized it is read from it, not asked for."""
    if chosen := [c for c in command if c.lstrip("+").startswith(("quantizer=", "quantizer.", "calibration"))]:
        raise RequestError(f"model=packed is quantized already; leave out {' '.join(chosen)}")
    if config.export.dir:
        raise RequestError("model=packed is a packed checkpoint already; leave out export.dir")
    origin = manifest.read(load.packed_folder(config.model))["origin"]
    name = origin.get("model", {}).get("name", "unknown")
    model = replace(config.model, name=f"{name}-packed") if config.model.name == "packed" else config.model
    return replace(config, model=model, quantizer=origin.get("quantizer", {"name": "unknown"}))
