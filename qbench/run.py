"""One point, read top to bottom: load, baseline, quantize, evaluate, record. No step reaches back."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch

from qbench import __version__
from qbench.checkpoint import export as packed
from qbench.config import Config
from qbench.errors import PointError, RequestError
from qbench.evaluate import limits, measure, speed
from qbench.evaluate.measure import Evaluation
from qbench.evaluate.memory import Peak, weight_bytes
from qbench.evaluate.windowed import Scores
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
from qbench.record.store import Store
from qbench.request.prepare import Prepared, prepare
from qbench.sources import hashes, load
from qbench.sources.load import LoadedModel
from qbench.sweep.share import gpu_of
from qbench.track import wandb as wandb_tracker

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
    """Runs one point, or returns it from the store if it is already there; what fails while running is recorded.

    Raises RequestError for a request that cannot be served; nothing is recorded then.
    """
    point = prepare(config, command)
    # the GPU before the point: a sweep's processes hold theirs when they come here, and may wait for the point
    gpu = gpu_of(point.device) if point.recorded() is None else nullcontext()
    with gpu, point.store.lock(f"point-{point.run_id}", f"point {point.run_id}"):
        hashes.save(point.store.root)  # now that the folder is there
        result = point.recorded()
        if result is not None:
            log.info("already recorded; runtime.rerun=true measures it again")
        else:
            if point.export is not None and not config.runtime.rerun and point.store.load(point.run_id) is not None:
                log.info("recorded, but export.dir needs the quantized model: the point is measured again")
            result = _run(point)
    kept = point.store.load(point.run_id)  # an earlier result, if measuring again failed: its run stays as well
    if config.tracker.name == "wandb" and (kept is None or kept.status == result.status):
        wandb_tracker.track(result, config.tracker, point.store.root)
    return result


def _run(point: Prepared) -> Result:
    config, store = point.config, point.store
    limits.check_request(config, point.calibration_text is not None)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    started = Result(
        run_id=point.run_id,
        status="failed",
        error="interrupted",
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        qbench_version=__version__,
        command=point.command,
        config=asdict(config),
        identity=point.identity,
        environment=describe(str(point.device), str(point.dtype).removeprefix("torch.")),
    )
    calibration = None
    try:
        tokenizer = load.load_tokenizer(config.model, store.models)
        evaluation = measure.prepare(point.source, tokenizer, config.task, config.runtime)
        if point.calibration_text is not None:
            calibration = cut_sequences(point.calibration_text, tokenizer, config.calibration)
    except Exception as error:
        result, scores, loaded = _failed(started, error, {}), None, None
    else:
        result, scores, loaded = _measure(
            started, config, point.quantizer, calibration, point.device, point.dtype, evaluation, store
        )
    if result.status == "failed" and (earlier := store.load(point.run_id)) is not None and earlier.status == "ok":
        log.error("measuring again failed; the earlier result of %s is kept", earlier.created_utc)
        return result
    store.save(result, scores)
    if point.export is not None and loaded is not None:  # after the result: a full disk must not lose it
        packed.export(loaded, point.export, config.export.format, result, point.identity.quantizer)
    return result


def _measure(
    result: Result,
    config: Config,
    quantizer: Quantizer | None,
    calibration: Calibration | None,
    device: torch.device,
    dtype: torch.dtype,
    evaluation: Evaluation,
    store: Store,
) -> tuple[Result, dict[str, Scores] | None, LoadedModel | None]:
    """Fills the result in, up to the step that fails.

    Also returns the scores that it refers to, by file, and the quantized model; None for both when a step failed.
    """
    clock, offload = Clock(), config.runtime.offload
    try:
        with clock.phase("load"):
            loaded = load.load(config.model, dtype, device, store.models, offload, result.identity.weights)
            limits.check_model(loaded.model, config, evaluation.ids, calibration and calibration.ids)
            require_finite(loaded.model, offload)
            least = None if isinstance(quantizer, Original) else config.runtime.min_coverage
            settle_layers(loaded.model, least, offload)
            packed.check_model(config.export, loaded.model, quantizer)
        model = loaded.model
        quantized = sum(weight.numel for weight in quantized_weights(model))
        parameters = quantized + sum(p.numel() for p in model.parameters())
        result = replace(
            result,
            model=ModelRecord(
                name=config.model.name,
                fingerprint=loaded.fingerprint,
                note=loaded.note,
                parameters=parameters,
                linear_weights=linear_weights(model),
                baseline_bytes=2 * parameters,
                weight_bytes=None if quantizer is None else weight_bytes(model),
            ),
        )
        timed, baseline, baseline_speed, cached = config.speed.name != "none", None, None, False
        if quantizer is not None:
            if timed and offload:
                log.warning("the speed of the baseline is not measured: it would be that of copying its weights")
            elif timed:
                with clock.phase("baseline_speed"):
                    baseline_speed = speed.measure(model, config.speed)
            with clock.phase("baseline"), runs_offloaded(model, offload):
                baseline, cached = measure.baseline(evaluation, model, loaded.fingerprint, result.environment, store)

            with clock.phase("quantize"):
                quantization = _quantize(model, quantizer, calibration, config, parameters)
        else:
            left = skipped_rows(find_linears(model))
            quantization = _describe(model, config, parameters, None, [], left, wall_seconds=0, peak_rss_bytes=None)
        use_kernels(model)
        quantization = replace(quantization, weight_bytes=weight_bytes(model))  # in the layout that is measured
        result = replace(result, quantization=quantization)

        if timed:
            with clock.phase("speed"):
                quantized_speed = speed.measure(model, config.speed)
            result = replace(result, speed=speed.record(config.speed, quantized_speed, baseline_speed))

        still_on_host = offload and isinstance(quantizer, Original)  # what a quantizer packs stays on the device
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


def _quantize(
    model: Any, quantizer: Quantizer, calibration: Calibration | None, config: Config, parameters: int
) -> QuantizationRecord:
    if isinstance(quantizer, Original):
        left = skipped_rows(find_linears(model))
        return _describe(model, config, parameters, None, [], left, wall_seconds=0, peak_rss_bytes=None)
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    resident = Peak(torch.device("cpu"))  # this process's own: the maximum that the system keeps is inherited
    started = time.perf_counter()
    layers, skipped = quantize_model(model, quantizer, calibration, config.runtime.offload)
    wall_seconds = time.perf_counter() - started
    if reason := shortfall(coverage(model), config.runtime.min_coverage, skipped, "were"):
        raise PointError(reason)  # settled before but for linears that no calibration token reached
    return _describe(model, config, parameters, calibration, layers, skipped, wall_seconds, resident.rss_bytes)


def _describe(
    model: Any,
    config: Config,
    parameters: int,
    calibration: Calibration | None,
    layers: list[LayerRow],
    skipped: list[SkippedRow],
    wall_seconds: float,
    peak_rss_bytes: int | None,
) -> QuantizationRecord:
    """What a quantized model holds, counted from its buffers, and what making it took."""
    device = model.device
    stored = quantized_weights(model)
    packed_bytes = sum(weight.nbytes for weight in stored)
    weights = sum(weight.numel for weight in stored)
    return QuantizationRecord(
        quantizer=config.quantizer["name"],
        calibration=calibration
        and CalibrationRecord(
            text_source=calibration.source,
            text_sha256=calibration.text_sha256,
            token_ids_sha256=calibration.token_ids_sha256,
            sequences=calibration.ids.shape[0],
            tokens=calibration.ids.size,
            inputs=calibration.inputs,
        ),
        quant_seconds=sum(row.seconds for row in layers),
        wall_seconds=wall_seconds,
        bits_per_weight=8 * packed_bytes / weights if weights else BITS_PER_WEIGHT,  # none, of the original
        packed_bytes=packed_bytes,
        model_bytes=packed_bytes + 2 * (parameters - weights),
        coverage=coverage(model),
        peak_alloc_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        peak_rss_bytes=peak_rss_bytes,
        layers=layers,
        skipped=skipped,
    )
