"""A point whose model has to be there whole: it is quantized already, or it is no plain chain of blocks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qbench.checkpoint import export as checkpoint
from qbench.errors import PointError
from qbench.evaluate import limits, measure, speed
from qbench.evaluate.memory import Peak, linear_names, weight_bytes
from qbench.layers.linear import use_kernels
from qbench.model.coverage import settle_layers, shortfall
from qbench.model.linears import coverage, find_linears
from qbench.model.offload import runs_offloaded
from qbench.passes import account
from qbench.passes.calibrate import Calibration, cut_sequences
from qbench.passes.own import take_own
from qbench.passes.quantize import quantize_model, require_finite, skipped_rows
from qbench.quant.noise import Noise
from qbench.quant.original import Original
from qbench.quant.quantizer import Quantizer
from qbench.record.quantization import FileRecord, LayerRow, OtherRow, SkippedRow
from qbench.request.prepare import Prepared
from qbench.run.held import file_record, for_model
from qbench.run.outcome import Clock, Measured, failed, started
from qbench.sources.source import LoadedModel

log = logging.getLogger(__name__)


def whole(point: Prepared) -> Measured:
    """Loads, scores the original, quantizes in place, evaluates; up to the step that fails."""
    config, quantizer, runtime = point.config, point.quantizer, point.config.runtime
    clock, result = Clock(), started(point)
    try:
        if reason := _needs_blocks(point):
            raise PointError(f"{reason} needs a model that is a plain chain of blocks, and {point.model.name} is none")
        tokenizer = point.model.tokenizer(point.store.models)
        evaluation = point.protocol.prepare(point.source, tokenizer, runtime)
        calibration = None
        if point.calibration_text is not None:
            calibration = cut_sequences(point.calibration_text, tokenizer, config.calibration)

        with clock.phase("load"):
            loaded = _load(point, evaluation.ids, calibration)
        model = loaded.model
        bytes_before = None if quantizer is None else weight_bytes(model)
        about = account.model_record(point.model.name, loaded.fingerprint, loaded.note, model, bytes_before)
        result = replace(result, model=about)
        timed, baseline, baseline_speed, cached = config.speed.name != "none", None, None, False
        if quantizer is not None:
            if timed and runtime.offload:
                log.warning("the speed of the original is not measured: it would be that of copying its weights")
            elif timed:
                with clock.phase("baseline_speed"):
                    baseline_speed = speed.measure(model, config.speed)
            with clock.phase("baseline"), runs_offloaded(model, runtime.offload):
                baseline, cached = measure.baseline(
                    evaluation, model, loaded.fingerprint, result.environment, point.store
                )

        with clock.phase("quantize") if quantizer is not None else nullcontext():
            made = _quantize(model, quantizer, calibration, point)
        use_kernels(model)
        quantization = account.of_whole(  # its bytes are those of the layout that is measured
            model,
            config.quantizer["name"],
            about.parameters,
            made.layers,
            made.skipped,
            made.calibration,
            made.wall_seconds,
            made.peak_rss_bytes,
            made.others,
        )
        result = replace(result, quantization=replace(quantization, file=made.file))

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
        return Measured(point, done, kept, loaded.model, loaded.tokenizer)
    except Exception as error:
        return failed(point, error, replace(result, seconds=clock.seconds))


def _needs_blocks(point: Prepared) -> str | None:
    """The setting that a pass serves and a model as a whole does not."""
    if point.draws > 1:
        return f"calibration.draws={point.draws}"
    if point.drawn.start and point.quantizer is not None and point.quantizer.seed_field:
        return f"calibration.first_draw={point.drawn.start}"
    if point.transform is not None:
        return f"transform={point.config.transform['name']}"
    return "quantizer=noise" if isinstance(point.quantizer, Noise) else None


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


@dataclass(frozen=True)
class Made:
    """What quantizing the model took and left behind."""

    layers: list[LayerRow]
    skipped: list[SkippedRow]
    calibration: Calibration | None = None
    wall_seconds: float = 0
    peak_rss_bytes: int | None = None
    others: Sequence[OtherRow] = ()
    file: FileRecord | None = None


def _quantize(model: Any, quantizer: Quantizer | None, calibration: Calibration | None, point: Prepared) -> Made:
    """Quantizes in place; what is the original, or was quantized before it was loaded, stays as it is."""
    runtime = point.config.runtime
    if quantizer is None or isinstance(quantizer, Original):
        return Made([], skipped_rows(find_linears(model)))
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    resident = Peak(torch.device("cpu"))  # this process's own: the maximum that the system keeps is inherited
    started = time.perf_counter()
    quantizer, found = for_model(quantizer, point, model), find_linears(model)
    packed = linear_names(model) - {s.name for s in found.skipped} - {f"{s.name}.weight" for s in found.skipped}
    others = take_own(model, quantizer, without=packed, places=model)
    layers, skipped = quantize_model(model, quantizer, calibration, runtime.offload)
    wall_seconds = time.perf_counter() - started
    if reason := shortfall(coverage(model), runtime.min_coverage, skipped, "were"):
        raise PointError(reason)  # settled before but for linears that no calibration token reached
    about = file_record(quantizer, point)
    return Made(layers, skipped, calibration, wall_seconds, resident.rss_bytes, others, about)
