"""A request, checked as far as that is possible without loading anything, and the identity of the point it asks for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qbench import __version__
from qbench.checkpoint import export as packed
from qbench.config import CalibrationConfig, Config, ModelConfig, RuntimeConfig, TaskConfig
from qbench.device import check_offload, pick_device, pick_dtype
from qbench.errors import RequestError
from qbench.evaluate import measure, speed
from qbench.evaluate.text import Text, read_text
from qbench.model import coverage
from qbench.passes import calibrate
from qbench.quant.original import Original
from qbench.quant.quantizer import Quantizer
from qbench.record.identity import Identity, identify
from qbench.record.result import Result
from qbench.record.store import Store, identity
from qbench.registry import make_quantizer
from qbench.sources import hashes, hub, load
from qbench.track import wandb as wandb_tracker


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
    identity: Identity  # its `weights` is the model's fingerprint
    run_id: str  # of the identity and this version of qbench
    export: Path | None  # where the packed checkpoint will go
    store: Store

    def recorded(self) -> Result | None:
        """The finished point if there is nothing left to do, else None.

        Raises RequestError when the recorded point covers too little of the model for this request.
        """
        result = None if self.config.runtime.rerun else self.store.load(self.run_id)
        if result is None or result.status != "ok":
            return None
        self._check_coverage(result)
        return result if self.export is None or packed.is_exported(self.export) else None

    def _check_coverage(self, result: Result) -> None:
        """What one request was content with may be too little for another, and neither changes a number."""
        covered = result.quantization.coverage if result.quantization is not None else 1.0
        least = self.config.runtime.min_coverage
        if self.quantizer is not None and covered < least:
            raise RequestError(
                f"this point is recorded with {covered:.1%} of the linear weights quantized, runtime.min_coverage "
                f"asks for {least:.0%}; ask for less, or leave the point out"
            )


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
    if isinstance(quantizer, Original) and config.runtime.offload and config.speed.name != "none":
        raise RequestError("quantizer=none with runtime.offload=true would time the copying of weights; use speed=none")
    if config.tracker.name == "wandb":
        wandb_tracker.check(config.tracker)
    store = Store(config.outputs)
    config = replace(config, model=hub.pinned(named(config.model, command)))  # a branch moves, a point does not
    with hashes.remembered_in(store.root):
        weights = fingerprint(config.model)
    calibration_text = read_calibration(config.calibration) if quantizer is not None and quantizer.needs else None
    if calibration_text is not None:
        calibrate.check(calibration_text, config.calibration)
    point = identify(
        config,
        _every_field(config.quantizer, quantizer),
        weights=weights,
        text_sha256=source.sha256,
        calibration_sha256=calibration_text and calibration_text.sha256,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
    )
    run_id = identity(point.key, __version__)
    export = packed.export_target(config.export, run_id, quantizer)
    return Prepared(config, command, quantizer, device, dtype, source, calibration_text, point, run_id, export, store)


def _every_field(asked: dict[str, Any], quantizer: Quantizer | None) -> dict[str, Any]:
    """The settings of a method, those included that nobody named; of a packed checkpoint, what made it."""
    return asked if quantizer is None else {"name": asked["name"], **asdict(quantizer)}


def named(model: ModelConfig, command: list[str]) -> ModelConfig:
    """The model under a name that is its own, unless the command line gave it one with `model.name=`.

    A folder is called by its name. Another repository, revision or seed than the configuration's makes another model,
    which must not go by the configuration's name: published numbers and plots would take it for that one.
    """
    given = {part.lstrip("+").partition("=")[0] for part in command}
    if "model.name" in given:
        return model
    if model.source == "local" and model.path and model.name == "local":
        return replace(model, name=os.path.basename(os.path.abspath(os.path.expanduser(model.path))) or model.name)
    name = model.name
    if model.source == "hub":
        name = model.id if "model.id" in given and model.id else name
        name += f"@{model.revision[:8]}" if "model.revision" in given and model.revision else ""
    elif "model.seed" in given and model.seed != 0:
        name += f"-seed{model.seed}"
    return replace(model, name=name)
