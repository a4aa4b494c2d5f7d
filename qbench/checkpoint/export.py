"""A point's checkpoint: writing the one that export.dir asks for, and running a packed one that model=packed names."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qbench.checkpoint import autogptq, manifest
from qbench.checkpoint import packed as checkpoint
from qbench.config import Config, ExportConfig
from qbench.errors import RequestError, WriteError, unknown
from qbench.model.linears import find_linears, matrix
from qbench.quant.original import Original
from qbench.quant.quantizer import InputStatistics, Quantizer
from qbench.record.result import Result
from qbench.sources import load

log = logging.getLogger(__name__)

FORMATS: dict[str, Any] = {"packed": checkpoint, "autogptq": autogptq}  # each has check_target and save


def export_target(config: ExportConfig, run_id: str, quantizer: Quantizer | None) -> Path | None:
    """Where the checkpoint will go, if one is asked for; raises RequestError now when it could not be written."""
    if config.format not in FORMATS:
        raise unknown("export.format", config.format, FORMATS)
    if not config.dir:
        return None
    if isinstance(quantizer, Original):
        raise RequestError("quantizer=none changes no weight, so there is nothing to export; leave out export.dir")
    folder = Path(config.dir).expanduser()
    FORMATS[config.format].check_target(folder, run_id)
    if config.format == "autogptq" and quantizer is not None and (reason := _refusal(quantizer)):
        raise RequestError(f"export.format=autogptq cannot express {type(quantizer).__name__}: {reason}")
    return folder


def check_model(config: ExportConfig, model: Any, quantizer: Quantizer | None) -> None:
    """Raises RequestError, before anything is measured, naming a layer that the export would have to refuse."""
    if not config.dir or config.format != "autogptq" or quantizer is None:
        return
    found = find_linears(model)
    for name in found.experts:
        raise RequestError(f"export.format=autogptq has no place for fused experts ({name}); use export.format=packed")
    sizes = set()
    for name, layer in found.layers.items():
        weight = matrix(layer)
        rows, columns = weight.shape
        group_size = quantizer.columns(weight)
        if reason := autogptq.shape_refusal(rows, columns, group_size):
            raise RequestError(f"layer {name}: {reason}")
        sizes.add((group_size, columns))
    if autogptq.common_group(sizes) is None:
        raise RequestError(f"export.format=autogptq: {autogptq.DIFFERENT}")


def _refusal(quantizer: Quantizer) -> str | None:
    """Why the format cannot hold what this quantizer makes, seen from a small weight that it quantizes here."""
    group_size: int = getattr(quantizer, "group_size", -1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64 if group_size == -1 else group_size, generator=generator)
    inputs = torch.randn(64, weight.shape[1], generator=generator)
    stats = InputStatistics(len(inputs), inputs.abs().mean(0), inputs, inputs.T @ inputs)
    try:
        [quantized] = quantizer.quantize([weight], stats if quantizer.needs else None)
    except ValueError:  # said better where it meets the model
        return None
    return autogptq.format_refusal(quantized)


def is_exported(folder: Path) -> bool:
    """True if the point's checkpoint is there: written in one step, and `export_target` refuses whatever else is."""
    return folder.is_dir() and any(folder.iterdir())


def export(loaded: load.LoadedModel, folder: Path, format: str, result: Result, quantizer: dict[str, Any]) -> None:
    """Writes the quantized model of a point that is recorded; its folder names no other folder. Raises WriteError."""
    assert result.model is not None
    origin = {
        "run_id": result.run_id,
        "qbench_version": result.qbench_version,
        "model": {"name": result.model.name, "fingerprint": result.model.fingerprint, "note": result.model.note},
        "quantizer": quantizer,
    }
    try:
        FORMATS[format].save(loaded.model, loaded.tokenizer, folder, origin=origin)
    except RequestError as error:
        raise WriteError(result, f"the result is recorded, but there is no checkpoint: {error}") from error
    log.info("%s checkpoint written to %s", format, folder)


def as_recorded(config: Config, command: list[str]) -> Config:
    """The configuration of a packed checkpoint's point: what quantized it is read from it, not asked for."""
    if chosen := [c for c in command if c.lstrip("+").startswith(("quantizer=", "quantizer.", "calibration"))]:
        raise RequestError(f"model=packed is quantized already; leave out {' '.join(chosen)}")
    if config.export.dir:
        raise RequestError("model=packed is a packed checkpoint already; leave out export.dir")
    if config.runtime.offload:
        raise RequestError("model=packed is loaded as it is packed, in full; leave out runtime.offload")
    origin = manifest.read(load.packed_folder(config.model))["origin"]
    name = origin.get("model", {}).get("name", "unknown")
    model = replace(config.model, name=f"{name}-packed") if config.model.name == "packed" else config.model
    return replace(config, model=model, quantizer=origin.get("quantizer", {"name": "unknown"}))
