"""One point of a sweep in a process of its own: whatever happens to that process costs this point only.

The process is `python -m qbench --point FILE` (prepared.py), which measures and records as the single command does. A
process that dies without a result (a crash, the kernel's out-of-memory killer, `kill -9`) is recorded here as a
failed point, with the signal or exit status and the last lines that it wrote.

Points that run side by side share a host: each takes one `Share` (share.py), a GPU or a part of the cores. The process
itself keeps its lock open, so the share is returned when the process ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qbench import __version__
from qbench.errors import WriteError
from qbench.record.identity import Identity
from qbench.record.result import Result
from qbench.record.store import Store
from qbench.sweep.prepared import Sent, write
from qbench.sweep.share import Share, one_of

COMMAND = (sys.executable, "-X", "faulthandler", "-m", "qbench", "--point")  # faulthandler: a segfault says where
TAIL_LINES, TAIL_BYTES = 5, 4000
DONE, FAILED, WRONG = 0, 1, 2


@dataclass(frozen=True)
class Point:
    """One point of a sweep, as it is sent to another process or machine."""

    number: int
    total: int
    label: str  # the overrides that tell it from the others
    overrides: tuple[str, ...]
    run_id: str
    identity: Identity
    request: dict[str, Any]  # the configuration as it was asked for, which its process prepares
    config: dict[str, Any]  # the same once prepared, which its result records
    device: str
    dtype: str
    log: str  # file that receives what the process writes
    sweep: str  # its name, by which trackers group its points
    exports: bool = False
    shares: tuple[Share, ...] = ()  # of its host, one of which it needs; none: it takes the GPU that it uses by itself
    slots: tuple[Share, ...] = ()  # where fewer points may run at a time than there are shares

    @property
    def place(self) -> str:
        return f"[{self.number:>{len(str(self.total))}}/{self.total}]"


@dataclass(frozen=True)
class Outcome:
    point: Point
    result: Result
    seconds: float = 0.0  # wall time of the process

    def __str__(self) -> str:
        return f"{self.point.place} {self.point.label}: {describe(self.result)}, {self.seconds:.1f} s"


@dataclass(frozen=True)
class Work:
    """The job of a Hydra launcher: runs the point that has its job's number."""

    points: tuple[Point, ...] = field(repr=False)

    def __call__(self, composed: Any) -> Outcome:
        from hydra.core.hydra_config import HydraConfig

        return said(run(self.points[HydraConfig.get().job.num]))


def said(outcome: Outcome) -> Outcome:
    """The outcome, which is also printed."""
    print(outcome, file=sys.stderr, flush=True)
    return outcome


def run(point: Point) -> Outcome:
    """Runs the point in a fresh process and returns what came of it; a failure is recorded, never raised."""
    store = Store(point.config["outputs"])
    before = store.load(point.run_id)
    with one_of(point.slots, point.shares) as (descriptors, environment):
        print(f"{point.place} {point.label}: started, log in {point.log}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        try:
            status, said = _spawn(point, descriptors, environment)
        except OSError as error:  # no room for its log, no more processes
            reason = f"its process could not be started: {error.strerror}"
            return Outcome(point, record_failure(point, reason))
        seconds = time.perf_counter() - started
    after = store.load(point.run_id)
    written = after is not None and (before is None or after.to_json() != before.to_json())  # as JSON: NaN != NaN
    if after is not None and after.status == "ok" and (status == DONE or (written and not point.exports)):
        return Outcome(point, after, seconds)  # also when it was killed on its way out
    if after is not None and after.status == "failed" and written:
        return Outcome(point, after, seconds)  # by itself, with its own reason
    return Outcome(point, record_failure(point, explain_exit(status, said)), seconds)


def record_failure(point: Point, error: str) -> Result:
    """A failed result for a point that could not write its own; a finished one of the same name is left alone."""
    result = Result(
        run_id=point.run_id,
        status="failed",
        error=error,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        qbench_version=__version__,
        command=list(point.overrides),
        config=point.config,
        identity=point.identity,
        environment={"device": point.device, "dtype": point.dtype},
    )
    store = Store(point.config["outputs"])
    with store.lock(f"point-{point.run_id}", f"point {point.run_id}"):
        there = store.load(point.run_id)
        if there is None or there.status != "ok":
            try:
                store.save(result)
            except WriteError as error:  # the sweep goes on, and its end tells this one
                return error.result
    return result


def explain_exit(status: int, said: str) -> str:
    """One sentence for a process that ended with `status` (negative: by that signal) and without a result."""
    if status in (FAILED, WRONG) and (refusals := [line for line in said.splitlines() if line.startswith("qbench: ")]):
        return refusals[-1].removeprefix("qbench: ")
    number = -status if status < 0 else status - 128 if 128 < status < 160 else 0
    if number:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        likely = "; often a sign that memory ran out" if number == signal.SIGKILL else ""
        reason = f"the process was killed by {name} (signal {number}{likely})"
    else:
        reason = f"the process ended with exit status {status} and no result"
    # of a line that a progress bar rewrites, only its last state
    lines = [last for line in said.split("\n") if (last := line.rstrip("\r").rpartition("\r")[2].strip())]
    tail = " | ".join(lines[-TAIL_LINES:])
    for folder, short in ((str(Path.cwd()), "."), (sys.prefix, "PREFIX"), (str(Path.home()), "~")):
        if folder != "/":
            tail = tail.replace(folder, short)  # results name no folders of a machine
    return f"{reason}; last lines: {tail}" if tail else reason


def describe(result: Result) -> str:
    """The result in a few words."""
    if result.status != "ok":
        return f"FAILED: {result.error}"
    words = []
    tasks = [metric for record in result.tasks for metric in record.metrics]
    for number in (*(record.perplexity for record in result.evaluation), *tasks):
        change = "" if number.delta is None else f" ({number.delta:+.{number.digits}f})"
        words.append(f"{number.called} {number.value:.{number.digits}f}{change}")
    return ", ".join(["ok", *words])


def _spawn(point: Point, descriptors: Sequence[int], environment: dict[str, str]) -> tuple[int, str]:
    """Exit status, negative for a signal, and the end of what the process wrote."""
    inherited = dict(os.environ)
    if cpus := inherited.get("SLURM_CPUS_PER_TASK"):
        inherited.setdefault("OMP_NUM_THREADS", cpus)
    log = Path(point.log)
    sent = Sent(point.run_id, asdict(point.identity), point.request, list(point.overrides), point.sweep)
    write(sent, log.with_suffix(".json"))
    with log.open("ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            [*COMMAND, str(log.with_suffix(".json"))],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=inherited | environment,
            pass_fds=descriptors,
        )
        try:
            status = process.wait()
        except BaseException:  # interrupted: the point is retried on resume
            process.terminate()
            process.wait()
            raise
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - TAIL_BYTES))
        return status, file.read().decode(errors="replace")


class Job:
    """A submitit job: runs a point, and starts it over when Slurm preempts it."""

    def __call__(self, point: Point) -> Outcome:
        return run(point)

    def checkpoint(self, point: Point) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, point)
