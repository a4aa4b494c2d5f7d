"""One point, read top to bottom: load, original, quantize, evaluate, record. No step reaches back."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from qbench import __version__
from qbench.checkpoint import export as checkpoint
from qbench.config import Config, RuntimeConfig
from qbench.errors import PointError, RequestError
from qbench.evaluate import limits, measure, speed
from qbench.evaluate.memory import Peak, weight_bytes
from qbench.evaluate.protocol import Scores
from qbench.layers.linear import use_kernels
from qbench.model.coverage import settle_layers, shortfall
from qbench.model.linears import coverage, find_linears, linear_weights, quantized_weights
from qbench.model.offload import runs_offloaded
from qbench.passes.calibrate import Calibration, cut_sequences
from qbench.passes.quantize import quantize_model, require_finite, skipped_rows
from qbench.quant.original import BITS_PER_WEIGHT, Original
from qbench.quant.quantizer import Quantizer
from qbench.record.environment import describe
from qbench.record.quantization import CalibrationRecord, LayerRow, ModelRecord, QuantizationRecord, SkippedRow
from qbench.record.result import Result
from qbench.request.prepare import Prepared, prepare
from qbench.sources import hashes
from qbench.sources.source import LoadedModel
from qbench.sweep.share import gpu_of
from qbench.track.tracker import harmless

log = logging.getLogger(__name__)


@dataclass
class Clock:
    """Wall seconds per phase of the point."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 3)


def run_point(config: Config, command: list[str]) -> Result:
    """`run_prepared` of a point alone. Raises RequestError for a request that cannot be served."""
    return run_prepared(prepare(config, command))


def run_pass(points: Sequence[Prepared], group: str | None = None) -> Iterator[tuple[Prepared, Result]]:
    """Runs points that share model, text, precision and device (sweep/passes.py); gives each as soon as it is recorded.

    A point that fails drops out alone. `group` and what is raised are as in `run_prepared`.
    """
    for point in points:
        yield point, run_prepared(point, group)


def run_prepared(point: Prepared, group: str | None = None) -> Result:
    """Runs one point, or returns it from the store if it is already there; what fails while running is recorded.

    `group` is the name of the sweep that the point belongs to, for the tracker. Raises RequestError for a request that
    turns out to be wrong once the model is here; nothing is recorded then.
    """
    # the GPU before the point: a sweep's processes hold theirs when they come here, and may wait for the point
    gpu = gpu_of(point.device) if point.recorded() is None else nullcontext()
    with gpu, point.store.lock(f"point-{point.run_id}", f"point {point.run_id}"):
        hashes.save(point.store.root)  # now that the folder is there
        result = point.recorded()
        if result is not None:
            log.info("already recorded; runtime.rerun=true measures it again")
        else:
            rerun = point.config.runtime.rerun
            if point.export is not None and not rerun and point.store.load(point.run_id) is not None:
                log.info("recorded, but export.dir needs the quantized model: the point is measured again")
            result = _run(point)
    kept = point.store.load(point.run_id)  # an earlier result, if measuring again failed: its run stays as well
    if kept is None or kept.status == result.status:
        with harmless(point.tracker):
            point.tracker.point(result, point.store.root, group)
    return result


def _run(point: Prepared) -> Result:
    limits.check_request(point.config, point.protocol, point.model.configuration(), point.calibration_text is not None)
    if point.config.runtime.threads:
        torch.set_num_threads(point.config.runtime.threads)
    result, scores, loaded = _measure(point)
    earlier = point.store.load(point.run_id) if result.status == "failed" else None
    if earlier is not None and earlier.status == "ok":
        log.error("measuring again failed; the earlier result of %s is kept", earlier.created_utc)
        return result
    point.store.save(result, scores)
    if point.export is not None and loaded is not None:  # after the result: a full disk must not lose it
        checkpoint.export(
            *(point.exporter, loaded.model, loaded.tokenizer, point.export, result), point.config.export["format"]
        )
    return result


def _started(point: Prepared) -> Result:
    """What is known before anything is loaded."""
    return Result(
        run_id=point.run_id,
        status="failed",
        error="interrupted",
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        qbench_version=__version__,
        command=point.command,
        config=asdict(point.config),
        identity=point.identity,
        environment=describe(str(point.device), str(point.dtype).removeprefix("torch.")),
    )


def _measure(point: Prepared) -> tuple[Result, dict[str, Scores] | None, LoadedModel | None]:
    """Fills the result in, up to the step that fails: load, original, quantize, evaluate, record.

    Also returns the scores that it refers to, by file, and the quantized model; None for both when a step failed.
    """
    config, quantizer, runtime = point.config, point.quantizer, point.config.runtime
    clock, result = Clock(), _started(point)
    try:
        tokenizer = point.model.tokenizer(point.store.models)
        evaluation = point.protocol.prepare(point.source, tokenizer, runtime)
        calibration = None
        if point.calibration_text is not None:
            calibration = cut_sequences(point.calibration_text, tokenizer, config.calibration)

        with clock.phase("load"):
            loaded = _load(point, evaluation.ids, calibration)
        model, about = loaded.model, _describe_model(point, loaded)
        result = replace(result, model=about)
        timed, baseline, baseline_speed, cached = config.speed.name != "none", None, None, False
        if quantizer is not None:
            if timed and runtime.offload:
                log.warning("the speed of the baseline is not measured: it would be that of copying its weights")
            elif timed:
                with clock.phase("baseline_speed"):
                    baseline_speed = speed.measure(model, config.speed)
            with clock.phase("baseline"), runs_offloaded(model, runtime.offload):
                baseline, cached = measure.baseline(
                    evaluation, model, loaded.fingerprint, result.environment, point.store
                )

        with clock.phase("quantize") if quantizer is not None else nullcontext():
            made = _quantize(model, quantizer, calibration, runtime)
            quantization = _describe(model, config.quantizer["name"], about.parameters, made)
        use_kernels(model)
        quantization = replace(quantization, weight_bytes=weight_bytes(model))  # in the layout that is measured
        result = replace(result, quantization=quantization)

        if timed:
            with clock.phase("speed"):
                quantized_speed = speed.measure(model, config.speed)
            result = replace(result, speed=speed.record(config.speed, quantized_speed, baseline_speed))

        # what a quantizer packs stays on the device
        still_on_host = runtime.offload and isinstance(quantizer, Original)
        with clock.phase("evaluate"), runs_offloaded(model, still_on_host):
            scores = evaluation.score(model, baseline)
        records, tasks, kept = evaluation.records(scores, baseline, cached)
        done = replace(result, status="ok", error=None, evaluation=records, tasks=tasks, seconds=clock.seconds)
        return done, kept, loaded
    except Exception as error:
        return _failed(result, error, clock.seconds), None, None


def _failed(result: Result, error: Exception, seconds: dict[str, float]) -> Result:
    """The result of a point that `error` ended; a wrong request is no result, and is raised again."""
    if isinstance(error, RequestError):
        raise error
    message = str(error)
    if not isinstance(error, PointError):
        traceback.print_exception(error, file=sys.stderr)
        message = f"{type(error).__name__}: {error}"
    return replace(result, status="failed", error=message, seconds=seconds)


def _load(point: Prepared, scored: np.ndarray | None, calibration: Calibration | None) -> LoadedModel:
    """The original, or what a packed checkpoint holds, once all is checked that can be before the first forward pass.

    `scored` are the ids that will be, `[windows, tokens]`, where they are known. Raises RequestError or PointError.
    """
    config, offload = point.config, point.config.runtime.offload
    loaded = point.model.load(point.dtype, point.device, point.store.models, offload, point.identity.weights)
    limits.check_model(loaded.model, config, point.protocol, scored, calibration and calibration.ids)
    require_finite(loaded.model, offload)
    least = None if isinstance(point.quantizer, Original) else config.runtime.min_coverage
    settle_layers(loaded.model, least, offload)
    if point.export is not None and point.quantizer is not None:
        checkpoint.check_model(point.exporter, loaded.model, point.quantizer, config.export["format"])
    return loaded


def _describe_model(point: Prepared, loaded: LoadedModel) -> ModelRecord:
    model = loaded.model
    parameters = sum(weight.numel for weight in quantized_weights(model)) + sum(p.numel() for p in model.parameters())
    return ModelRecord(
        name=point.model.name,
        fingerprint=loaded.fingerprint,
        note=loaded.note,
        parameters=parameters,
        linear_weights=linear_weights(model),
        baseline_bytes=2 * parameters,
        weight_bytes=None if point.quantizer is None else weight_bytes(model),
    )


@dataclass(frozen=True)
class Made:
    """What quantizing the model took and left behind."""

    layers: list[LayerRow]
    skipped: list[SkippedRow]
    calibration: Calibration | None = None
    wall_seconds: float = 0
    peak_rss_bytes: int | None = None


def _quantize(model: Any, quantizer: Quantizer | None, calibration: Calibration | None, runtime: RuntimeConfig) -> Made:
    """Quantizes in place; what is the original, or was quantized before it was loaded, stays as it is."""
    if quantizer is None or isinstance(quantizer, Original):
        return Made([], skipped_rows(find_linears(model)))
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    resident = Peak(torch.device("cpu"))  # this process's own: the maximum that the system keeps is inherited
    started = time.perf_counter()
    layers, skipped = quantize_model(model, quantizer, calibration, runtime.offload)
    wall_seconds = time.perf_counter() - started
    if reason := shortfall(coverage(model), runtime.min_coverage, skipped, "were"):
        raise PointError(reason)  # settled before but for linears that no calibration token reached
    return Made(layers, skipped, calibration, wall_seconds, resident.rss_bytes)


def _describe(model: Any, quantizer: str, parameters: int, made: Made) -> QuantizationRecord:
    """What a quantized model of so many `parameters` holds, counted from its buffers, and what making it took."""
    device, calibration = model.device, made.calibration
    stored = quantized_weights(model)
    packed_bytes = sum(weight.nbytes for weight in stored)
    weights = sum(weight.numel for weight in stored)
    return QuantizationRecord(
        quantizer=quantizer,
        calibration=calibration
        and CalibrationRecord(
            text_source=calibration.source,
            text_sha256=calibration.text_sha256,
            token_ids_sha256=calibration.token_ids_sha256,
            sequences=calibration.ids.shape[0],
            tokens=calibration.ids.size,
            inputs=calibration.inputs,
        ),
        quant_seconds=sum(row.seconds for row in made.layers),
        wall_seconds=made.wall_seconds,
        bits_per_weight=8 * packed_bytes / weights if weights else BITS_PER_WEIGHT,  # none, of the original
        packed_bytes=packed_bytes,
        model_bytes=packed_bytes + 2 * (parameters - weights),
        coverage=coverage(model),
        peak_alloc_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        peak_rss_bytes=made.peak_rss_bytes,
        layers=made.layers,
        skipped=made.skipped,
    )
