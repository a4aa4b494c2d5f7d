"""What became of a point: its result, up to the step that failed, and what is kept beside it."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from qbench import __version__
from qbench.errors import PointError, RequestError
from qbench.evaluate.protocol import Scores
from qbench.record.environment import this_environment
from qbench.record.result import Result
from qbench.request.prepare import Prepared


@dataclass(frozen=True)
class Measured:
    point: Prepared
    result: Result
    files: Mapping[str, Scores] | None = None  # scores that the result refers to, by file
    model: Any = None  # the quantized one, if it is to be exported
    tokenizer: Any = None
    error: Exception | None = None

    def of_pass(self, pass_id: str, points: int) -> Measured:
        return replace(self, result=replace(self.result, pass_id=pass_id, pass_points=points))


@dataclass
class Clock:
    """Wall seconds per phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - started, 3)


def started(point: Prepared) -> Result:
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
        environment=this_environment(str(point.device), str(point.dtype).removeprefix("torch.")),
    )


def failed(point: Prepared, error: Exception, result: Result | None = None) -> Measured:
    """The point that `error` ended, with what is known of it in `result`; an error that nobody foresaw is shown."""
    message = str(error)
    if not isinstance(error, PointError | RequestError):
        traceback.print_exception(error, file=sys.stderr)
        message = f"{type(error).__name__}: {error}"
    return Measured(point, replace(result or started(point), status="failed", error=message), error=error)
