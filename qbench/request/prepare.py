"""A request, checked as far as that is possible without loading anything, and the identity of the point it asks for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qbench import __version__
from qbench.checkpoint import export as checkpoint
from qbench.checkpoint.exporter import Exporter
from qbench.config import CalibrationConfig, Config
from qbench.errors import RequestError
from qbench.evaluate import measure, speed
from qbench.evaluate.limits import batch_size
from qbench.evaluate.protocol import Corpus, Protocol
from qbench.evaluate.text import Text, read_calibration
from qbench.evaluate.written import Author
from qbench.model import coverage
from qbench.parts.allocate import resolved
from qbench.parts.mixed import Mixed
from qbench.passes import calibrate
from qbench.quant.noise import Noise
from qbench.quant.original import Original
from qbench.quant.quantizer import Quantizer
from qbench.record.identity import Identity, identify
from qbench.record.result import Result
from qbench.record.store import Store, identity
from qbench.registry import PROTOCOL, SOURCE, TRACKER, TRANSFORM, make, make_quantizer
from qbench.request.device import check_offload, pick_device, pick_dtype
from qbench.sources import hashes
from qbench.sources.source import Source
from qbench.track.tracker import Tracker
from qbench.transforms.transform import NoTransform, Transform


@dataclass(frozen=True)
class Prepared:
    """A request that can be served, and the identity of its point."""

    config: Config
    command: list[str]
    quantizer: Quantizer | None
    device: torch.device
    dtype: torch.dtype
    protocol: Protocol
    source: Corpus  # what the protocol scores
    calibration_text: Text | None
    identity: Identity  # its `weights` is the model's fingerprint
    run_id: str  # of the identity and this version of qbench
    export: Path | None  # where the checkpoint will go
    store: Store
    model: Source
    pinned: dict[str, Any]  # of the model's settings, those that may move (a branch), as they are now (a commit)
    exporter: Exporter
    tracker: Tracker
    transform: Transform | None = None  # what is done to the weights before they are quantized

    @property
    def draws(self) -> int:
        """How many variants the point is: one for each draw of calibration text, or of the method's seed."""
        return len(self.drawn)

    @property
    def drawn(self) -> range:
        """The draws' numbers."""
        return draws(self.quantizer, self.config.calibration, self.searches)

    @property
    def searches(self) -> bool:
        """Whether the calibration text chooses a transform's settings."""
        return _searches(self.transform, self.quantizer, self.config)

    def recorded(self) -> Result | None:
        """The finished point if there is nothing left to do, else None.

        Raises RequestError when the recorded point covers too little of the model for this request.
        """
        result = None if self.config.runtime.rerun else self.store.load(self.run_id)
        if result is None or result.status != "ok":
            return None
        self._check_coverage(result)
        return result if self.export is None or checkpoint.is_exported(self.export) else None

    def _check_coverage(self, result: Result) -> None:
        """What one request was content with may be too little for another, and neither changes a number."""
        covered = result.quantization.coverage if result.quantization is not None else 1.0
        least = self.config.runtime.min_coverage
        if self.quantizer is not None and not isinstance(self.quantizer, Original) and covered < least:
            raise RequestError(
                f"this point is recorded with {covered:.1%} of the linear weights quantized, runtime.min_coverage "
                f"asks for {least:.0%}; ask for less, or leave the point out"
            )


def draws(quantizer: Quantizer | None, calibration: CalibrationConfig, shown: bool = False) -> range:
    """The numbers of a point's draws; what is shown no text and has no seed is the same in every one."""
    if quantizer is None or not (shown or quantizer.needs or quantizer.seed_field):
        return range(1)
    return range(calibration.first_draw, calibration.first_draw + calibration.draws)


def fingerprint(source: Source) -> str:
    return source.fingerprint()


def prepare(
    config: Config,
    command: list[str],
    here: bool = True,
    fingerprint: Callable[[Source], str] = fingerprint,
    read: Callable[[Protocol], Corpus] = measure.read,
    read_calibration: Callable[[CalibrationConfig], Text] = read_calibration,
) -> Prepared:
    """Checks all that can be checked without loading anything; a sweep does this for every point before its first.

    `here` is False when the point will run on another machine, whose devices are not known. Raises RequestError for a
    request that cannot be served.
    """
    model: Source = make(SOURCE, config.model)
    exporter, folder = checkpoint.make_exporter(config.export)
    if model.original:
        quantizer = make_quantizer(config.quantizer).pinned()
    else:
        _check_quantized(config, command)
        config, quantizer = replace(config, quantizer=model.made_by()), None
    if quantizer is not None and quantizer.partial:
        config = replace(config, runtime=replace(config.runtime, min_coverage=0.0))
    transform = _transform(config, quantizer)
    changed = transform and {TRANSFORM.key: config.transform[TRANSFORM.key], **transform.settings()}
    device = pick_device(config.runtime, here)
    check_offload(config.runtime, device)
    coverage.check_setting(config.runtime)
    dtype = pick_dtype(config.runtime, device)
    config = replace(config, runtime=replace(config.runtime, batch_size=batch_size(config.runtime, device.type)))
    protocol: Protocol = make(PROTOCOL, config.task)
    protocol.check(config.runtime)
    source = read(protocol)
    protocol.check_length(source)
    speed.check(config.speed)
    if isinstance(quantizer, Original) and config.runtime.offload and config.speed.name != "none":
        raise RequestError("quantizer=none with runtime.offload=true would time the copying of weights; use speed=none")
    if isinstance(quantizer, Noise) and config.speed.name != "none":
        raise RequestError("quantizer=noise is the original with noise in its states, and as fast; use speed=none")
    tracker = make(TRACKER, config.tracker)
    tracker.check()
    store = Store(config.outputs)
    asked = model if "name" in (given := _given(command)) else model.named(given)
    model = asked.pinned()  # a branch moves, a point does not
    config = replace(config, model={"name": model.name, "source": config.model["source"]} | asdict(model))
    with hashes.remembered_in(store.root):
        weights = fingerprint(model)
        if isinstance(quantizer, Mixed) and quantizer.assignment is None:
            settings = {PROTOCOL.key: config.task[PROTOCOL.key], **protocol.settings()}
            quantizer = resolved(quantizer, store.results, weights, source.sha256, settings, changed)
            config = replace(config, quantizer=config.quantizer | {"assignment": quantizer.assignment})
            command = [*command, f"quantizer.assignment='{quantizer.assignment}'"]
        contents = [] if quantizer is None else hashes.sha256_of(quantizer.files())
    if (write := getattr(protocol, "write", None)) is not None:
        source = write(source, Author(model, weights, dtype, device, config.runtime, store, here))
        protocol.check_length(source)
    searches = _searches(transform, quantizer, config)
    shown = quantizer is not None and (searches or bool(quantizer.needs))
    calibration_text = read_calibration(config.calibration) if shown else None
    if calibration_text is not None:
        calibrate.check_text(calibration_text, config.calibration)
    if config.calibration.draws < 1:
        raise RequestError(f"calibration.draws must be at least 1, got {config.calibration.draws}")
    if config.calibration.first_draw < 0:
        raise RequestError(f"calibration.first_draw must be at least 0, got {config.calibration.first_draw}")
    point = identify(
        config,
        _every_field(config.quantizer, quantizer, contents),
        {PROTOCOL.key: config.task[PROTOCOL.key], **protocol.settings()},
        weights=weights,
        text_sha256=source.sha256,
        calibration_sha256=calibration_text and calibration_text.sha256,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        draws=draws(quantizer, config.calibration, searches),
        transform=changed,
    )
    run_id = identity(point.key, __version__)
    if folder is not None and quantizer is not None:
        checkpoint.check_target(exporter, folder, run_id, quantizer, config.export["format"])
    return Prepared(
        config=config,
        command=command,
        quantizer=quantizer,
        device=device,
        dtype=dtype,
        protocol=protocol,
        source=source,
        calibration_text=calibration_text,
        identity=point,
        run_id=run_id,
        export=folder,
        store=store,
        model=model,
        pinned=_changed(asked, model, given),
        exporter=exporter,
        tracker=tracker,
        transform=transform,
    )


def _check_quantized(config: Config, command: list[str]) -> None:
    """Raises RequestError for what cannot be asked of a model that is quantized already."""
    model = f"model={config.model['source']}"
    if chosen := [c for c in command if c.lstrip("+").startswith(("quantizer=", "quantizer.", "calibration"))]:
        raise RequestError(f"{model} is quantized already; leave out {' '.join(chosen)}")
    if config.export.get("dir"):
        raise RequestError(f"{model} is quantized already, and what was exported stays as it is; leave out export.dir")
    if config.runtime.offload:
        raise RequestError(f"{model} is loaded as it is quantized, in full; leave out runtime.offload")


def _transform(config: Config, quantizer: Quantizer | None) -> Transform | None:
    """Raises RequestError for a transform that is unknown or cannot be had with what quantizes."""
    made: Transform = make(TRANSFORM, config.transform)
    if isinstance(made, NoTransform):
        return None
    chosen = f"transform={config.transform[TRANSFORM.key]}"
    if quantizer is None or quantizer.files() or isinstance(quantizer, Noise):
        what = f"model={config.model['source']}" if quantizer is None else f"quantizer={config.quantizer['name']}"
        raise RequestError(f"{what} has no weights that {chosen} could change before they are quantized; leave it out")
    return made


def _searches(transform: Transform | None, quantizer: Quantizer | None, config: Config) -> bool:
    if transform is None or quantizer is None or isinstance(quantizer, Original):
        return False
    return len(transform.choices(config.quantizer["name"])) > 1


def _given(command: list[str]) -> set[str]:
    """The fields of the model that the command line sets."""
    keys = {part.lstrip("+").partition("=")[0] for part in command}
    return {key.removeprefix("model.") for key in keys if key.startswith("model.")}


def _changed(before: Source, after: Source, given: Collection[str]) -> dict[str, Any]:
    """The settings that pinning changed; the name as well, which a revision on the command line would add to."""
    old, new = asdict(before), asdict(after)
    changed = {key: value for key, value in new.items() if key != "name" and value != old[key]}
    return {"name": after.name, **changed} if changed and "name" not in given else changed


def _every_field(asked: dict[str, Any], quantizer: Quantizer | None, contents: list[str]) -> dict[str, Any]:
    """The settings of a method, those included that nobody named, and the sha256 over its files, if it has any.

    Of a packed checkpoint, what made it.
    """
    if quantizer is None:
        return asked
    content = {"sha256": hashes.of_all(contents)} if contents else {}
    return {"name": asked["name"], **quantizer.settings(), **content}
