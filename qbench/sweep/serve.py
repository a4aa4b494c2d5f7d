"""The process of a pass: `python -m qbench --pass FILE` runs the points of the file and says what becomes of each.

A line of JSON on stdout for each point, as soon as its result is on disk:

    {"run_id": ..., "status": "ok" or "failed", ...}         recorded; the point's summary
    {"run_id": ..., "status": "refused", "error": ...}       nothing is recorded: who started the process does that
    {"run_id": ..., "status": "unwritten", "error": ...}     measured, and there was no room to record it

Everything readable goes to stderr. Who no longer listens has died, and the points are recorded all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench import entry
from qbench.errors import PointError, RequestError, WriteError
from qbench.report import summary
from qbench.sweep import prepared

if TYPE_CHECKING:
    from qbench.record.result import Result
    from qbench.request.prepare import Prepared

    RunPass = Callable[[Sequence[Prepared], str | None], Iterator[tuple[Prepared, Result]]]


def serve(file: Path, run_pass: RunPass) -> Iterator[dict[str, Any]]:
    """The line of each point of the pass in `file`. Raises RequestError for a file that no sweep has written.

    What keeps one point from being prepared here refuses that point alone.
    """
    from qbench.evaluate import measure
    from qbench.evaluate.text import read_calibration

    sent = prepared.read(file)
    shared = [prepared.remembered(function) for function in (measure.read, read_calibration)]
    points = []
    for each in sent.points:
        try:
            points.append(prepared.prepare_again(each, *shared))
        except RequestError as error:
            yield _refused(each.run_id, str(error))
    yield from _run(points, run_pass, sent.group)


def _run(points: Sequence[Prepared], run_pass: RunPass, group: str) -> Iterator[dict[str, Any]]:
    """Runs the points together; what ends a pass without saying whose it is, is looked for in halves of what is left.

    So a request that turns out to be wrong once the model is here costs its own point, and no point pays for another's.
    """
    if not points:
        return
    left = {point.run_id: point for point in points}
    try:
        for point, result in run_pass(points, group):
            del left[point.run_id]
            summary.show(result)
            yield result.summary()
        reason = "its pass ended without a result for it"
    except WriteError as error:
        left.pop(error.result.run_id, None)
        yield {"run_id": error.result.run_id, "status": "unwritten", "error": str(error)}
        yield from _run(list(left.values()), run_pass, group)
        return
    except Exception as error:  # its frames hold the model: only the sentence is kept
        reason = _sentence(error)
    if left and len(points) == 1:
        yield _refused(points[0].run_id, reason)
    elif left:
        for half in halves(list(left.values())):
            yield from _run(half, run_pass, group)


def halves(points: Sequence[Any]) -> list[Sequence[Any]]:
    """Two, the first with one more where they cannot be equal; of one, one."""
    middle = (len(points) + 1) // 2
    return [half for half in (points[:middle], points[middle:]) if half]


def _refused(run_id: str, reason: str) -> dict[str, Any]:
    return {"run_id": run_id, "status": "refused", "error": reason}


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, RequestError | PointError) else entry.unexpected(error)
