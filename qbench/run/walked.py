"""Points whose model is a chain of blocks: one pass measures all of them, read top to bottom.

Prepare (texts, the stream of weights, what each point asks), walk the blocks, read the logits, record. What needs the
whole variant (an export, a measurement of speed, a task that generates) has it assembled of its packed blocks. Where
the original is timed it is there whole as well, but gone before the walk: a GPU holds one of the two at a time.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qbench.checkpoint import export as checkpoint
from qbench.errors import PointError
from qbench.evaluate import limits, measure, speed
from qbench.evaluate.draws import Records, merged
from qbench.evaluate.memory import weight_bytes
from qbench.evaluate.protocol import Evaluation, Scores
from qbench.layers.linear import use_kernels
from qbench.model import coverage
from qbench.passes import account
from qbench.passes.quantize import warn
from qbench.passes.reference import Kept, Reference
from qbench.passes.shown import Shown
from qbench.passes.states import States, wait_on_host
from qbench.passes.transformed import Transformed
from qbench.passes.variant import Variant
from qbench.passes.walk import Reading, Walk
from qbench.quant.noise import Noise
from qbench.quant.original import Original
from qbench.readers.file import Opened
from qbench.request.prepare import Prepared
from qbench.run.asked import Asked, drawn
from qbench.run.held import file_record, for_model
from qbench.run.outcome import Clock, Measured, failed
from qbench.run.search import search
from qbench.sources.stream import Stream, Whole

log = logging.getLogger(__name__)


def walked(points: list[Prepared]) -> Iterator[Measured]:
    """Measures the points in one pass; gives each as soon as it is known, failed ones when they fail.

    Raises NotAChainError, before anything is measured, for a model that has to be run whole, and RequestError or
    PointError for what none of them could do without.
    """
    together = Together(points)
    yield from together.check()
    if together.asked:
        yield from together.choose()
        together.find_reference()
        yield from together.walk_blocks()
        yield from together.read_logits()
        yield from together.conclude()


class Together:
    """The points of a pass, and what they share; those that fail leave `asked`."""

    def __init__(self, points: list[Prepared]) -> None:
        """Prepares texts and the stream of weights, without a block being read."""
        self.first, self.clock = points[0], Clock()
        self.tokenizer = self.first.model.tokenizer(self.first.store.models)
        self.evaluation: Evaluation = self.first.protocol.prepare(
            self.first.source, self.tokenizer, self.first.config.runtime
        )
        self.asks = getattr(self.evaluation, "asks", lambda: None)()
        self.asked = [one for point in points for one in drawn(point, self.tokenizer)]
        with self.clock.phase("load"):
            stream, note = _stream(self.first, whole=self.asks is None)
            self.walk = Walk(stream, self.first.device)
        self.fingerprint, skeleton = self.first.identity.weights, self.walk.skeleton
        self.about = account.model_record(
            self.first.model.name, self.fingerprint, note, skeleton, weight_bytes(skeleton)
        )
        self.environment = self.asked[0].result.environment
        self.reference: Reference | None = None
        self.scores: Scores | None = None  # the original's
        self.cached = False
        self.last: States | Kept | None = None  # the original's states after the last block

    def check(self) -> Iterator[Measured]:
        """What can be known of each point before the first block."""
        ids = self.evaluation.ids
        if self.asks is not None:
            ids = np.concatenate([batch.ravel() for batch in self.asks.batches])
        for one in [one for one in self.asked if one.draw == 0]:
            one.result = replace(one.result, model=self.about, seconds=dict(self.clock.seconds))
            try:
                _check(one, self.walk, ids, self.asks is None)
                for other in self._draws(one)[1:]:
                    other.quantizer = for_model(other.quantizer, one.point, self.walk.skeleton)
            except Exception as error:
                yield self._drop(one, error)

    def choose(self) -> Iterator[Measured]:
        """The settings of transforms that the calibration text chooses, in a walk of its own over that text."""
        asking = [one for one in self.asked if one.point.searches]
        if asking:
            with self.clock.phase("search"):
                for one, error in search(asking, Walk(self.walk.stream, self.first.device)):
                    yield self._drop(one, error)

    def find_reference(self) -> None:
        """The original's numbers if they are kept; measured at once where the whole model answers, and its speed."""
        if self.asks is not None:
            self.reference = Reference(
                self.first.store, self.fingerprint, self.evaluation.identity, self.environment, self.asks.compares
            )
            self.scores, self.last = self.reference.load(self.first.device)
            if self.last is None and any(one.original for one in self.asked):
                self.scores = None  # the original as a row is read off its states, and those were not kept
            self.cached = self.scores is not None
        else:
            with self.clock.phase("baseline"):
                self.scores, self.cached = measure.baseline(
                    self.evaluation, self.walk.model, self.fingerprint, self.environment, self.first.store
                )
        for one in self.asked:
            if one.timed:
                one.original_speed = self._speed_of_original(one)

    def walk_blocks(self) -> Iterator[Measured]:
        """Quantizes every block for every variant, and sends the states of all through it."""
        variants = [one for one in self.asked if not one.original]
        begun, original = None, None
        if self.asks is not None:
            copies = len(variants) + (not self.cached)
            begun = self.walk.begin(self.asks.batches, _wait_on_host(self.walk, self.asks.batches, copies, self.first))
            original = None if self.cached else States.like(begun)
        shown = _share_calibrations(self.walk)
        for one in variants:
            keep = self.asks is None or one.timed or (one.point.export is not None and one.draw == 0)
            one.variant = Variant(one.label, one.quantizer, None, keep=keep)
        for one in variants:
            try:
                if one in self.asked:
                    if one.transform is not None:
                        one.variant.transformed = Transformed(one.transform, self.walk)
                    self.walk.begin_own(one.variant, begun)
                    shown(one)
            except Exception as error:
                yield self._drop(one, error)
        variants = [one for one in variants if one in self.asked]
        del begun  # the states exist once a variant
        made = {id(one.variant): one for one in variants}
        shared = {id(one.variant.shares): one.variant.shares for one in variants if one.variant.shares is not None}
        with self.clock.phase("baseline"):
            for dropped in self.walk.run([one.variant for one in variants], original, [*shared.values()]):
                yield self._drop(made[id(dropped)], dropped.error)
        if variants or original is not None:  # all blocks have come by
            self.about = replace(self.about, weight_bytes=self.walk.tally.record())
        spent = sum(sum(one.variant.seconds.values()) for one in variants)
        self.clock.seconds["baseline"] = round(max(0.0, self.clock.seconds["baseline"] - spent), 3)
        if original is not None:
            self.last = original

    def read_logits(self) -> Iterator[Measured]:
        """Reads the scores of the original, if they are not kept, and of every variant off their logits."""
        if self.asks is None:
            return
        own = None if self.cached else Reading(self.asks.reader(None), None, compares=False)
        self.scores = self.scores or {}  # filled in below, before a variant's reader is asked for its scores
        for one in self.asked:
            states, chain = (one.variant.states, one.variant.chain) if one.variant else (None, None)
            one.reading = Reading(self.asks.reader(self.scores), states, self.asks.compares, chain)
        by_reading = {id(one.reading): one for one in self.asked}
        readings = [one.reading for one in self.asked]
        for broken in self.walk.read([own, *readings] if own else readings, self.last):
            if broken is own:
                raise broken.error
            yield self._drop(by_reading[id(broken)], broken.error)
        if own is not None:
            self.scores.update(own.reader.scores())
            self.clock.seconds["baseline"] = round(self.clock.seconds["baseline"] + own.seconds, 3)
            self.reference.save(self.scores, self.last)
        self.last = None

    def conclude(self) -> Iterator[Measured]:
        for one in [one for one in self.asked if one.draw == 0]:
            one.result = replace(one.result, model=self.about)
            try:
                yield self._conclude(one, self._draws(one))
            except Exception as error:
                yield self._drop(one, error)

    def _draws(self, one: Asked) -> list[Asked]:
        """The draws of its point, in order."""
        return [other for other in self.asked if other.point is one.point]

    def _conclude(self, one: Asked, draws: list[Asked]) -> Measured:
        """The result of a point whose variants have gone through all blocks; of the first but for the scores."""
        point, result, walk = one.point, one.result, self.walk
        name = point.config.quantizer["name"]
        if one.variant is None or (isinstance(one.quantizer, Original) and one.transform is None):
            quantization = account.of_original(self.about, walk.found, name)
        else:
            if not isinstance(one.quantizer, Opened):  # a file may well be of the original's own grid
                warn(one.variant.rows)
            quantization = account.of_variant(one.variant, name, self.about, walk.found, one.calibration)
            others = [draw.calibration.token_ids_sha256 for draw in draws[1:] if draw.calibration is not None]
            shown = account.calibration_record(one.calibration, others)
            quantization = replace(quantization, calibration=shown, file=file_record(one.quantizer, point))
            if one.transform is not None:
                name = point.config.transform["name"]
                about = one.variant.transformed.record(name, walk.found.weights, one.searched)
                quantization = replace(quantization, transform=about)
            least = 0.0 if isinstance(one.quantizer, Original) else point.config.runtime.min_coverage
            if reason := coverage.shortfall(quantization.coverage, least, quantization.skipped, "were"):
                raise PointError(reason)  # settled before but for linears that no calibration token reached
        model = walk.assembled(one.variant) if one.variant is not None and one.variant.keep else None
        if one.variant is None and (one.timed or one.reading is None):
            model = walk.original()
        if one.variant is not None:
            one.variant.kept = []  # the model has them now, and goes when it is written
        if model is not None and one.variant is not None and (one.timed or one.reading is None):
            use_kernels(model)
            quantization = replace(quantization, weight_bytes=weight_bytes(model))  # in the layout that is measured
        result = replace(result, quantization=quantization)
        own = Clock(one.seconds)
        if one.timed:
            with own.phase("speed"):
                measured = speed.measure(model, point.config.speed)
            result = replace(result, speed=speed.record(point.config.speed, measured, one.original_speed))
        records, tasks, files = merged([self._scored(draw, model if draw is one else None, own) for draw in draws])
        seconds = self.clock.seconds | own.seconds
        result = replace(result, status="ok", error=None, evaluation=records, tasks=tasks, seconds=seconds)
        exported = model if point.export is not None and one.variant is not None else None
        return Measured(point, result, files, exported, self.tokenizer)

    def _speed_of_original(self, one: Asked) -> Any:
        if isinstance(one.point.quantizer, Original):
            return None
        if one.point.config.runtime.offload:
            log.warning("the speed of the original is not measured: it would be that of copying its weights")
            return None
        try:
            with self.clock.phase("load"):
                model = self.walk.original()
        except torch.OutOfMemoryError:
            no_room = (
                f"{one.point.model.name} does not fit on the GPU as it is; runtime.offload=true times it quantized"
            )
            raise PointError(no_room) from None
        try:
            with self.clock.phase("baseline_speed"):
                return speed.measure(model, one.point.config.speed)
        finally:
            del model
            _let_go()

    def _scored(self, one: Asked, model: Any, clock: Clock) -> Records:
        """What the protocol records of one draw; `model` is the whole of it, where that has been assembled."""
        with clock.phase("evaluate"):
            if one.reading is not None:
                scores = one.reading.reader.scores()
            else:
                scores = self.evaluation.score(model or self.walk.assembled(one.variant), self.scores)
        if one.reading is not None:
            clock.seconds["evaluate"] = round(clock.seconds["evaluate"] + one.reading.seconds, 3)
        return self.evaluation.records(scores, self.scores, self.cached)

    def _drop(self, one: Asked, error: Exception) -> Measured:
        """The point, failed, with what is known of it; its other draws go with it."""
        for draw in self._draws(one):
            self.asked.remove(draw)
            if draw.variant is not None and draw.variant.alive:
                draw.variant.drop_out(error)
            if draw.reading is not None:
                draw.reading.error = error
        dropped = failed(one.point, error, replace(one.result, seconds=self.clock.seconds | one.seconds))
        error.__traceback__ = None  # shown by now; its frames hold what is to be let go
        return dropped


def _stream(point: Prepared, whole: bool) -> tuple[Stream, str]:
    """The model's weights a block at a time, or all of them where some point needs them at once or there is no way."""
    source, cache = point.model, point.store.models
    if not whole and (stream := getattr(source, "stream", None)) is not None:
        found = stream(point.dtype, point.device, cache, point.identity.weights)
        if found is not None:
            return found, found.note
    loaded = source.load(point.dtype, point.device, cache, False, point.identity.weights)
    return Whole(loaded.model, loaded.note), loaded.note


def _let_go() -> None:
    """Frees what nothing holds any more: a model, with what a compiler and a graph made of it, is full of cycles."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _check(one: Asked, walk: Walk, scored: np.ndarray | None, generates: bool) -> None:
    """What can be known of a point before the first block. Raises RequestError or PointError."""
    point, ids = one.point, one.calibration and one.calibration.ids
    limits.check_model(walk.model, point.config, point.protocol, scored, ids)
    if generates and isinstance(point.quantizer, Noise):
        raise PointError("quantizer=noise changes the states of a pass, and this task runs the model as a whole")
    if not isinstance(point.quantizer, Original):
        if reason := coverage.too_few(walk.found, point.config.runtime.min_coverage):
            raise PointError(reason)
        one.quantizer = for_model(one.quantizer, point, walk.skeleton)
        if point.export is not None:
            checkpoint.check_model(point.exporter, walk.skeleton, point.quantizer, point.config.export["format"])


def _wait_on_host(walk: Walk, batches: Any, copies: int, point: Prepared) -> bool:
    hidden = walk.model.config.get_text_config(decoder=True).hidden_size
    largest = max(map(walk.stream.bytes_of_block, range(len(walk.stream))))
    tokens = sum(ids.size for ids in batches)
    return wait_on_host(tokens, hidden, point.dtype.itemsize, copies, largest, point.device)


def _share_calibrations(walk: Walk) -> Callable[[Asked], None]:
    """Gives a variant its calibration: its own, or that which all with one text and `inputs=original` share."""
    shared: dict[str, Shown] = {}

    def shown(one: Asked) -> None:
        calibration, needs, variant = one.calibration, one.quantizer.needs, one.variant
        if calibration is None or not needs:
            return
        original = calibration.inputs == "original"
        if not original or one.transform is not None:  # a norm that was changed gives out something else
            variant.shown = Shown(variant.chain or walk.chain, calibration.ids, needs, original)
            return
        key = calibration.token_ids_sha256
        if key not in shared:
            shared[key] = Shown(walk.chain, calibration.ids, needs, original=True)
        shared[key].needs |= needs
        variant.shares = shared[key]

    return shown
