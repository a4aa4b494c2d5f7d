"""Points whose model is a chain of blocks: one pass measures all of them, read top to bottom.

Prepare (texts, the stream of weights, what each point asks), walk the blocks, read the logits, record. What needs the
whole variant (an export, a measurement of speed, a task that generates) has it assembled of its packed blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qbench.checkpoint import export as checkpoint
from qbench.errors import PointError
from qbench.evaluate import limits, measure, speed
from qbench.evaluate.memory import weight_bytes
from qbench.evaluate.protocol import Evaluation, Scores
from qbench.layers.linear import use_kernels
from qbench.model import coverage
from qbench.passes import account
from qbench.passes.calibrate import Calibration, cut_sequences
from qbench.passes.quantize import warn
from qbench.passes.reference import Reference
from qbench.passes.shown import Shown
from qbench.passes.states import States, wait_on_host
from qbench.passes.variant import Variant
from qbench.passes.walk import Reading, Walk
from qbench.quant.original import Original
from qbench.record.result import Result
from qbench.request.prepare import Prepared
from qbench.run.outcome import Clock, Measured, failed, started
from qbench.sources.stream import Stream, Whole

log = logging.getLogger(__name__)


@dataclass
class Asked:
    """One point of the pass on its way."""

    point: Prepared
    result: Result
    calibration: Calibration | None
    variant: Variant | None = None  # None: the original as a row
    reading: Reading | None = None

    @property
    def timed(self) -> bool:
        return self.point.config.speed.name != "none"


def walked(points: list[Prepared]) -> Iterator[Measured]:
    """Measures the points in one pass; gives each as soon as it is known, failed ones when they fail.

    Raises NotAChainError, before anything is measured, for a model that has to be run whole, and RequestError or
    PointError for what none of them could do without.
    """
    first, clock = points[0], Clock()
    tokenizer = first.model.tokenizer(first.store.models)
    evaluation: Evaluation = first.protocol.prepare(first.source, tokenizer, first.config.runtime)
    asks = getattr(evaluation, "asks", lambda: None)()
    asked = [Asked(point, started(point), _calibration(point, tokenizer)) for point in points]
    whole = asks is None or any(one.timed and not one.point.config.runtime.offload for one in asked)
    with clock.phase("load"):
        stream, note = _stream(first, whole)
        walk = Walk(stream, first.device)
    identity = first.identity.weights
    about = account.model_record(first.model.name, identity, note, walk.skeleton, weight_bytes(walk.skeleton))
    ids = evaluation.ids if asks is None else np.concatenate([batch.ravel() for batch in asks.batches])
    for one in list(asked):
        one.result = replace(one.result, model=about, seconds=dict(clock.seconds))
        try:
            _check(one, walk, ids)
        except Exception as error:
            asked.remove(one)
            yield failed(one.point, error, one.result)
    if not asked:
        return
    reference, scores, kept = None, None, None
    if asks is not None:
        reference = Reference(first.store, identity, evaluation.identity, asked[0].result.environment, asks.compares)
        scores, kept = reference.load(first.device)
        if kept is None and any(isinstance(one.point.quantizer, Original) for one in asked):
            scores = None  # the original as a row is read off its states, and those were not kept
    cached = scores is not None
    if asks is None:
        with clock.phase("baseline"):
            scores, cached = measure.baseline(
                evaluation, walk.model, identity, asked[0].result.environment, first.store
            )
    speeds = {id(one): _speed_of_original(one, walk.model, clock) for one in asked if one.timed}

    begun = None
    variants = [one for one in asked if not isinstance(one.point.quantizer, Original)]
    if asks is not None:
        begun = walk.begin(asks.batches, _wait_on_host(walk, asks.batches, len(variants) + (not cached), first))
    shown = _share_calibrations(walk, variants)
    for one in variants:
        one.variant = Variant(
            _label(one.point),
            one.point.quantizer,
            None if begun is None else States.like(begun),
            keep=asks is None or one.timed or one.point.export is not None,
            **shown(one),
        )
    original = None if begun is None or cached else States.like(begun)
    del begun
    by_variant = {id(one.variant): one for one in variants}
    shared = {id(one.variant.shares): one.variant.shares for one in variants if one.variant.shares is not None}
    with clock.phase("baseline"):
        for dropped in walk.run([one.variant for one in variants], original, [*shared.values()]):
            one = by_variant[id(dropped)]
            asked.remove(one)
            yield failed(one.point, dropped.error, _so_far(one, clock))
    about = replace(about, weight_bytes=walk.tally.record())
    spent = sum(sum(one.variant.seconds.values()) for one in variants)
    clock.seconds["baseline"] = round(max(0.0, clock.seconds["baseline"] - spent), 3)

    if asks is not None:
        own = None if cached else Reading(asks.reader(None), None, compares=False)
        scores = {} if scores is None else scores  # filled in below, before a variant's reader is asked for its scores
        for one in asked:
            one.reading = Reading(asks.reader(scores), one.variant and one.variant.states, asks.compares)
        readings = [own, *(one.reading for one in asked)] if own else [one.reading for one in asked]
        last = original if original is not None else kept
        for broken in walk.read(readings, last):
            if broken is own:
                raise broken.error
            [one] = [one for one in asked if one.reading is broken]
            asked.remove(one)
            yield failed(one.point, broken.error, _so_far(one, clock))
        if own is not None:
            scores.update(own.reader.scores())
            clock.seconds["baseline"] = round(clock.seconds["baseline"] + own.seconds, 3)
            reference.save(scores, original)
        original = last = None
    for one in asked:
        one.result = replace(one.result, model=about)
        try:
            yield _conclude(one, walk, evaluation, scores, cached, clock, speeds.get(id(one)), tokenizer)
        except Exception as error:
            yield failed(one.point, error, _so_far(one, clock))


def _calibration(point: Prepared, tokenizer: Any) -> Calibration | None:
    if point.calibration_text is None:
        return None
    return cut_sequences(point.calibration_text, tokenizer, point.config.calibration)


def _stream(point: Prepared, whole: bool) -> tuple[Stream, str]:
    """The model's weights a block at a time, or all of them where some point needs them at once or there is no way."""
    source, cache = point.model, point.store.models
    if not whole and (stream := getattr(source, "stream", None)) is not None:
        found = stream(point.dtype, point.device, cache, point.identity.weights)
        if found is not None:
            return found, found.note
    loaded = source.load(point.dtype, point.device, cache, False, point.identity.weights)
    return Whole(loaded.model, loaded.note), loaded.note


def _check(one: Asked, walk: Walk, scored: np.ndarray | None) -> None:
    """What can be known of a point before the first block. Raises RequestError or PointError."""
    point, ids = one.point, one.calibration and one.calibration.ids
    limits.check_model(walk.model, point.config, point.protocol, scored, ids)
    if not isinstance(point.quantizer, Original):
        if reason := coverage.too_few(walk.found, point.config.runtime.min_coverage):
            raise PointError(reason)
        if point.export is not None:
            checkpoint.check_model(point.exporter, walk.skeleton, point.quantizer, point.config.export["format"])


def _wait_on_host(walk: Walk, batches: Any, copies: int, point: Prepared) -> bool:
    hidden = walk.model.config.get_text_config(decoder=True).hidden_size
    largest = max(map(walk.stream.bytes_of_block, range(len(walk.stream))))
    tokens = sum(ids.size for ids in batches)
    return wait_on_host(tokens, hidden, point.dtype.itemsize, copies, largest, point.device)


def _share_calibrations(walk: Walk, variants: list[Asked]) -> Any:
    """Gives each variant its calibration: its own, or that which all with one text and `inputs=original` share."""
    shared: dict[str, Shown] = {}

    def shown(one: Asked) -> dict[str, Shown]:
        calibration, needs = one.calibration, one.point.quantizer.needs
        if calibration is None:
            return {}
        if calibration.inputs != "original":
            return {"shown": Shown(walk.chain, calibration.ids, needs, original=False)}
        key = calibration.token_ids_sha256
        if key not in shared:
            shared[key] = Shown(walk.chain, calibration.ids, needs, original=True)
        shared[key].needs |= needs
        return {"shares": shared[key]}

    return shown


def _label(point: Prepared) -> str:
    settings = point.config.quantizer
    return " ".join(str(settings[key]) for key in ("name", "nbits") if settings.get(key) is not None)


def _speed_of_original(one: Asked, model: Any, clock: Clock) -> Any:
    if isinstance(one.point.quantizer, Original):
        return None
    if one.point.config.runtime.offload:
        log.warning("the speed of the original is not measured: it would be that of copying its weights")
        return None
    with clock.phase("baseline_speed"):
        return speed.measure(model, one.point.config.speed)


def _so_far(one: Asked, clock: Clock) -> Result:
    spent = {} if one.variant is None else {key: round(value, 3) for key, value in one.variant.seconds.items()}
    return replace(one.result, seconds=clock.seconds | spent)


def _conclude(
    one: Asked,
    walk: Walk,
    evaluation: Evaluation,
    original: Scores | None,
    cached: bool,
    clock: Clock,
    original_speed: Any,
    tokenizer: Any,
) -> Measured:
    """The result of a point whose variant has gone through all blocks."""
    point, result, about = one.point, one.result, one.result.model
    assert about is not None
    if one.variant is None:
        quantization = account.of_original(about, walk.found)
    else:
        quantization = account.of_variant(
            one.variant, point.config.quantizer["name"], about, walk.found, one.calibration
        )
        warn(one.variant.rows)
        if reason := coverage.shortfall(
            quantization.coverage, point.config.runtime.min_coverage, quantization.skipped, "were"
        ):
            raise PointError(reason)  # settled before but for linears that no calibration token reached
    model = walk.model if one.variant is None else walk.assembled(one.variant) if one.variant.keep else None
    measures_whole = one.timed or one.reading is None
    if model is not None and one.variant is not None and measures_whole:
        use_kernels(model)
        quantization = replace(quantization, weight_bytes=weight_bytes(model))  # in the layout that is measured
    result = replace(result, quantization=quantization)
    own = Clock({key: round(value, 3) for key, value in (one.variant.seconds if one.variant else {}).items()})
    if one.timed:
        with own.phase("speed"):
            measured = speed.measure(model, point.config.speed)
        result = replace(result, speed=speed.record(point.config.speed, measured, original_speed))
    with own.phase("evaluate"):
        scores = evaluation.score(model, original) if one.reading is None else one.reading.reader.scores()
    if one.reading is not None:
        own.seconds["evaluate"] = round(own.seconds["evaluate"] + one.reading.seconds, 3)
    records, tasks, files = evaluation.records(scores, original, cached)
    result = replace(
        *(result,), status="ok", error=None, evaluation=records, tasks=tasks, seconds=clock.seconds | own.seconds
    )
    exported = model if point.export is not None and one.variant is not None else None
    return Measured(point, result, files, exported, tokenizer)
