"""Points that share a model and a text: each is measured, recorded, exported and told to its tracker, once.

A result is written as soon as it is known. A point that fails drops out alone, with its reason in its result.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch

from qbench.checkpoint import export as checkpoint
from qbench.config import Config
from qbench.errors import PointError, RequestError
from qbench.evaluate import limits
from qbench.model.blocks import NotAChainError
from qbench.record.result import Result
from qbench.record.store import identity
from qbench.request.prepare import Prepared, prepare
from qbench.run.outcome import Measured, failed
from qbench.run.walked import walked
from qbench.run.whole import whole
from qbench.sources import hashes
from qbench.sweep.share import gpu_of
from qbench.track.tracker import harmless

log = logging.getLogger(__name__)


def run_point(config: Config, command: list[str]) -> Result:
    """A point alone. Raises RequestError for a request that cannot be served; nothing is recorded then."""
    [(_, result)] = run_pass([prepare(config, command)])
    return result


def run_pass(points: Sequence[Prepared], group: str | None = None) -> Iterator[tuple[Prepared, Result]]:
    """Runs points that share model, text, precision and device; gives each as soon as it is recorded.

    What is in the store already is returned from it. `group` is the name of the sweep that the points belong to, for
    the tracker. Raises RequestError for a point alone that turns out to be wrong once the model is here, and for
    several whatever went wrong and is not known to be one point's.
    """
    with ExitStack() as held:
        if any(point.recorded() is None for point in points):
            # the GPU before the points: a sweep's processes hold theirs when they come here, and may wait for a point
            held.enter_context(gpu_of(points[0].device))
        for point in sorted(points, key=lambda point: point.run_id):  # in one order: who waits for two never deadlocks
            held.enter_context(point.store.lock(f"point-{point.run_id}", f"point {point.run_id}"))
        hashes.save(points[0].store.root)  # now that the folder is there
        todo = []
        for point in points:
            if (result := point.recorded()) is None:
                todo.append(point)
                if point.export is not None and not point.config.runtime.rerun and _known(point):
                    log.info("recorded, but export.dir needs the quantized model: the point is measured again")
            else:
                log.info("already recorded; runtime.rerun=true measures it again")
                yield point, _told(point, result, group)
        pass_id = identity("pass", sorted(point.run_id for point in todo))
        for measured in _measured(todo, alone=len(points) == 1):
            point = measured.point
            if len(todo) > 1:
                measured = measured.of_pass(pass_id, len(todo))
            _record(measured)
            yield point, _told(point, measured.result, group)


def _measured(todo: list[Prepared], alone: bool) -> Iterator[Measured]:
    """Each point as soon as it is known. Raises RequestError if the request `alone` is wrong, as `run_pass`."""
    waiting = {id(point): point for point in todo}
    try:
        for point in todo:
            limits.check_request(
                point.config, point.protocol, point.model.configuration(), point.calibration_text is not None
            )
        for measured in _walked_or_whole(todo):
            del waiting[id(measured.point)]
            if isinstance(measured.error, RequestError) and alone:
                raise measured.error
            yield measured
    except Exception as error:
        if isinstance(error, RequestError) and alone:
            raise
        if len(waiting) > 1 and not isinstance(error, PointError):
            raise  # whose it is, and whether fewer fit into memory, is found out in halves: sweep/serve.py
        for point in list(waiting.values()):
            yield failed(point, error)


def _walked_or_whole(todo: list[Prepared]) -> Iterator[Measured]:
    if not todo:
        return
    if todo[0].config.runtime.threads:
        torch.set_num_threads(todo[0].config.runtime.threads)
    if todo[0].model.original:
        try:
            yield from walked(todo)
            return
        except NotAChainError as reason:
            log.info("%s: it is loaded whole for each of its points", reason)
    for point in todo:
        yield whole(point)


def _known(point: Prepared) -> bool:
    return point.store.load(point.run_id) is not None


def _record(measured: Measured) -> None:
    """Writes the result and then the checkpoint; a failure leaves an earlier result alone."""
    point, result = measured.point, measured.result
    earlier = point.store.load(point.run_id) if result.status == "failed" else None
    if earlier is not None and earlier.status == "ok":
        log.error("measuring again failed; the earlier result of %s is kept", earlier.created_utc)
        return
    point.store.save(result, measured.files)
    if point.export is not None and measured.model is not None:  # after the result: a full disk must not lose it
        checkpoint.export(
            *(point.exporter, measured.model, measured.tokenizer, point.export, result), point.config.export["format"]
        )


def _told(point: Prepared, result: Result, group: str | None) -> Result:
    kept = point.store.load(point.run_id)  # an earlier result, if measuring again failed: its run stays as well
    if kept is None or kept.status == result.status:
        with harmless(point.tracker):
            point.tracker.point(result, point.store.root, group)
    return result
