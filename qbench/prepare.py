"""A request, checked as far as that is possible without loading anything, and the identity of the point it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qbench import __version__, calibrate, packed
from qbench.config import CalibrationConfig, Config, ModelConfig, RuntimeConfig, TaskConfig
from qbench.evaluate import measure, speed
from qbench.evaluate.text import Text, read_text
from qbench.models import coverage, load
from qbench.quant.quantizer import Quantizer
from qbench.record import wandb_tracker
from qbench.record.result import Result
from qbench.record.store import Store, identity
from qbench.registry import make_quantizer
from qbench.runtime import check_offload, pick_device, pick_dtype


@dataclass(frozen=True)
class Prepared:
    """A request that can be served, and the identity of its point."""

    config: Config
    command: list[str]
    quantizer: Quantizer | None
    device: torch.device
    dtype: torch.dtype
    source: measure.Source
    calibration_text: Text | None
    settings: dict[str, Any]  # what of the configuration can change a number
    run_id: str
    export: Path | None  # where the packed checkpoint will go
    store: Store

    def recorded(self) -> Result | None:
        """The finished point if there is nothing left to do, else None."""
        result = None if self.config.runtime.rerun else self.store.load(self.run_id)
        if result is None or result.status != "ok":
            return None
        return result if self.export is None or packed.is_exported(self.export) else None


def prepare(
    config: Config,
    command: list[str],
    here: bool = True,
    fingerprint: Callable[[ModelConfig], str] = load.fingerprint,
    read_task: Callable[[TaskConfig, RuntimeConfig], measure.Source] = measure.read,
    read_calibration: Callable[[CalibrationConfig], Text] = read_text,
) -> Prepared:
    """Checks all that can be checked without loading anything; a sweep does this for every point before its first.

    `here` is False when the point will run on another machine, whose devices are not known. Raises RequestError for a
    request that cannot be served.
    """
    if config.model.source == "packed":
        config, quantizer = packed.as_recorded(config, command), None
    else:
        quantizer = make_quantizer(config.quantizer)
    device = pick_device(config.runtime, here)
    check_offload(config.runtime, device)
    coverage.check_setting(config.runtime)
    dtype = pick_dtype(config.runtime, device)
    source = read_task(config.task, config.runtime)
    measure.check_length(source, config.task)
    speed.check(config.speed)
    if config.tracker.name == "wandb":
        wandb_tracker.check(config.tracker)
    store = Store(config.outputs)
    model_id = fingerprint(config.model)
    calibration_text = read_calibration(config.calibration) if quantizer is not None and quantizer.needs else None
    if calibration_text is not None:
        calibrate.check(calibration_text, config.calibration)
    texts = (source.sha256, calibration_text and calibration_text.sha256)
    settings = _what_matters(config, quantizer)
    run_id = identity(settings, model_id, texts, str(device.type), str(dtype), __version__)
    export = packed.export_target(config.export, run_id, quantizer)
    return Prepared(
        config, command, quantizer, device, dtype, source, calibration_text, settings, run_id, export, store
    )


def _what_matters(config: Config, quantizer: Quantizer | None) -> dict[str, Any]:
    """The part of the configuration that can change a number: not what is written where, or who is told."""
    settings = asdict(config)
    for key in ("tracker", "outputs", "export"):
        del settings[key]
    for key in ("rerun", "device", "dtype"):  # device and dtype enter the run_id as resolved
        del settings["runtime"][key]
    if not config.runtime.offload:  # what it changes is the peak of the GPU's memory, and that no baseline is timed
        del settings["runtime"]["offload"]
    for group in ("model", "task", "calibration"):  # the contents are in the fingerprints
        del settings[group]["path"]
    del settings["task"]["include_path"]
    if config.calibration.inputs == "quantized":  # there was no other once: points recorded then keep their run_id
        del settings["calibration"]["inputs"]
    if quantizer is None or not quantizer.needs:
        del settings["calibration"]
    if config.speed.name == "none":
        del settings["speed"]
    return settings
