"""One pass of a sweep in a process of its own: whatever happens to that process, what it recorded stays.

The process is `python -m qbench --pass FILE` (prepared.py, serve.py). It says on a pipe what becomes of each point, and
each is reported here as it comes. When it dies (a crash, the kernel's out-of-memory killer, `kill -9`), its unfinished
points are tried again in halves, each half in a new process, down to the single point that kills its process: that
one is recorded here as failed, with the signal or exit status and the last lines that the process wrote. A process that
was asked to end (SIGTERM, Ctrl-C) is an interrupt of the sweep, and no point's failure.

Passes that run side by side share a host: each takes one `Share` (share.py), a GPU or a part of the cores. The process
itself keeps its lock open, so the share is returned when the process ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qbench import __version__
from qbench.errors import WriteError
from qbench.record.identity import Identity
from qbench.record.result import Result
from qbench.record.store import Store, identity
from qbench.sweep.prepared import Sent, SentPass, write
from qbench.sweep.serve import halves
from qbench.sweep.share import Share, one_of

COMMAND = (sys.executable, "-X", "faulthandler", "-m", "qbench", "--pass")  # faulthandler: a segfault says where
TAIL_LINES, TAIL_BYTES = 5, 4000
DONE, FAILED, WRONG = 0, 1, 2
INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM)  # exit statuses of a process that was asked to end
SECONDS_TO_END = 20.0  # that a process has to give its locks back


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
    exports: bool = False

    @property
    def place(self) -> str:
        return f"[{self.number:>{len(str(self.total))}}/{self.total}]"


@dataclass(frozen=True)
class Pass:
    """Points that one process measures together, each with a run_id of its own."""

    name: str  # 3, and 3.1 and 3.2 for its halves
    points: tuple[Point, ...]
    folder: str  # of the sweep's logs
    sweep: str  # its name, by which trackers group its points
    shares: tuple[Share, ...] = ()  # of its host, one of which it needs; none: it takes the GPU that it uses by itself
    slots: tuple[Share, ...] = ()  # where fewer passes may run at a time than there are shares

    @property
    def log(self) -> Path:
        """The file that receives what the process writes; what it is sent lies beside it."""
        return Path(self.folder) / f"{self.name}-{identity(*(point.run_id for point in self.points))}.log"

    def __str__(self) -> str:
        if len(self.points) == 1:
            return f"{self.points[0].place} {self.points[0].label}"
        return f"pass {self.name} of {len(self.points)} points"

    def halves(self) -> list[Pass]:
        """What is tried instead of this pass when its process has died, each in a process of its own."""
        parts = enumerate(halves(self.points), 1)
        return [replace(self, name=f"{self.name}.{number}", points=tuple(half)) for number, half in parts]


@dataclass(frozen=True)
class Outcome:
    point: Point
    result: Result
    seconds: float = 0.0  # that the point took, so far as that is its own; of a pass of one, wall time of the process
    log: str = ""

    def __str__(self) -> str:
        return f"{self.point.place} {self.point.label}: {in_words(self.result)}, {self.seconds:.1f} s"


@dataclass
class Running:
    """The processes of passes that run now, so that an interrupt ends all of them."""

    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopped: bool = False

    def stop(self) -> None:
        """Asks each to end, waits until it has, and ends it if it does not."""
        self.stopped = True
        processes = list(self.processes)
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def said(outcome: Outcome) -> Outcome:
    """The outcome, which is also printed."""
    print(outcome, file=sys.stderr, flush=True)
    return outcome


def run(work: Pass, running: Running | None = None) -> Iterator[Outcome]:
    """Runs the pass in a fresh process; gives each point's outcome as it is recorded, and says it. None is missing.

    A failure is recorded, never raised. Raises KeyboardInterrupt when the process, or `running`, was asked to end.
    """
    running = Running() if running is None else running
    stores = {point.run_id: Store(point.config["outputs"]) for point in work.points}
    before = {run_id: _written(store, run_id) for run_id, store in stores.items()}
    left = {point.run_id: point for point in work.points}
    alone = len(work.points) == 1
    with one_of(work.slots, work.shares) as (descriptors, environment):
        print(f"{work}: started, log in {work.log}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        start = work.log.stat().st_size if work.log.exists() else 0
        status, why = FAILED, ""
        try:
            with contextlib.closing(_lines(work, running, descriptors, environment)) as lines:
                for line in lines:
                    if isinstance(line, int):
                        status = line
                    elif (point := left.pop(line["run_id"], None)) is not None:
                        result = _result(point, line)
                        seconds = time.perf_counter() - started if alone else own_seconds(result)
                        yield said(Outcome(point, result, seconds, str(work.log)))
        except OSError as error:  # no room for its log, no more processes
            why = f"its process could not be started: {error.strerror}"
        seconds = time.perf_counter() - started
    if running.stopped or status in INTERRUPTED:
        raise KeyboardInterrupt
    for run_id, point in list(left.items()):  # it died between recording a point and saying so
        after = stores[run_id].load(run_id)
        if after is not None and not point.exports and after.to_json() != before[run_id]:
            yield said(Outcome(left.pop(run_id), after, seconds, str(work.log)))
    if not left:
        if not alone:
            print(f"{work}: ended after {seconds:.1f} s", file=sys.stderr, flush=True)
        return
    why = why or explain_exit(status, _tail(work.log, start))
    if alone:
        point = work.points[0]
        yield said(Outcome(point, record_failure(point, why), seconds, str(work.log)))
        return
    rest = replace(work, points=tuple(left.values()))
    print(f"{work}: {why}\n{work}: {len(left)} unfinished, tried again in halves", file=sys.stderr, flush=True)
    for half in rest.halves():
        yield from run(half, running)


def _written(store: Store, run_id: str) -> str | None:
    """What is recorded, as a text: NaN is not equal to itself."""
    result = store.load(run_id)
    return result and result.to_json()


def _lines(
    work: Pass, running: Running, descriptors: list[int], environment: dict[str, str]
) -> Iterator[dict[str, Any] | int]:
    """What the process says of each point, and at last its exit status, negative for a signal.

    The process is ended with this iterator. It is in a process group of its own, so that Ctrl-C reaches it once.
    """
    inherited = dict(os.environ)
    if cpus := inherited.get("SLURM_CPUS_PER_TASK"):
        inherited.setdefault("OMP_NUM_THREADS", cpus)
    points = [Sent(p.run_id, asdict(p.identity), p.request, list(p.overrides)) for p in work.points]
    write(SentPass(work.sweep, points), work.log.with_suffix(".json"))
    with work.log.open("ab") as log:
        process = subprocess.Popen(
            [*COMMAND, str(work.log.with_suffix(".json"))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=inherited | environment,
            pass_fds=descriptors,
            process_group=0,
        )
    running.processes.add(process)
    if running.stopped:  # an interrupt that came in between
        process.terminate()
    try:
        for line in _read(process):
            told = _told(line)
            if told is not None:
                yield told
        yield process.wait()
    except BaseException:
        Running({process}).stop()
        raise
    finally:
        running.processes.discard(process)
        process.stdout.close()


def _told(line: bytes) -> dict[str, Any] | None:
    """What a line says of a point; None for what a library writes past Python's own stdout."""
    try:
        told = json.loads(line)
    except ValueError:
        return None
    return told if isinstance(told, dict) and "run_id" in told else None


def _read(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """The lines of its stdout, until it has ended: what it has started itself may hold the pipe for longer.

    It wakes once a second, for which an interrupt that is no signal, as Ray's, waits as well.
    """
    pipe, rest = process.stdout.fileno(), b""
    while True:
        if not select.select([pipe], [], [], 1.0)[0]:
            if process.poll() is not None:
                return
            continue
        if not (read := os.read(pipe, 1 << 16)):
            return
        *lines, rest = (rest + read).split(b"\n")
        yield from lines


def _result(point: Point, line: dict[str, Any]) -> Result:
    """The result of a point that its process says something of; what it did not record is recorded here."""
    if line["status"] == "unwritten":  # there was no room for it then either
        return _failed(point, line["error"])
    if line["status"] != "refused" and (result := Store(point.config["outputs"]).load(point.run_id)) is not None:
        # measuring again may fail and leave the earlier result where it is
        return result if result.status == line["status"] else _failed(point, line["error"])
    return record_failure(point, line["error"] or "its result was removed")


def own_seconds(result: Result) -> float:
    """What a point took of its pass: loading the model and running the original served all of its points."""
    return sum(seconds for phase, seconds in result.seconds.items() if phase not in ("load", "baseline"))


def record_failure(point: Point, error: str) -> Result:
    """A failed result for a point that could not write its own; a finished one of the same name is left alone."""
    result = _failed(point, error)
    store = Store(point.config["outputs"])
    with store.lock(f"point-{point.run_id}", f"point {point.run_id}"):
        there = store.load(point.run_id)
        if there is None or there.status != "ok":
            try:
                store.save(result)
            except WriteError as error:  # the sweep goes on, and its end tells this one
                return error.result
    return result


def _failed(point: Point, error: str) -> Result:
    return Result(
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


def in_words(result: Result) -> str:
    """The result in a few words."""
    if result.status != "ok":
        return f"FAILED: {result.error}"
    words = []
    tasks = [metric for record in result.tasks for metric in record.metrics]
    texts = [] if any(metric.kinds for metric in tasks) else [record.perplexity for record in result.evaluation]
    for number in (*texts, *tasks):  # of many kinds of text, what stands over all of them
        change = "" if number.delta is None else f" ({number.delta:+.{number.digits}f})"
        words.append(f"{number.called} {number.value:.{number.digits}f}{change}")
    return ", ".join(["ok", *words])


def _tail(log: Path, start: int) -> str:
    """The end of what the process wrote, from `start` bytes on."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
