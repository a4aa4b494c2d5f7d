"""Where passes run: `hydra/launcher=NAME` chooses one of these classes, and its YAML holds the fields.

| hydra/launcher= | passes run | needs |
|---|---|---|
| basic (the default) | here, one after the other, each with all that this host has | |
| local | side by side on this host, one per GPU or per part of the cores | |
| slurm | as jobs of a cluster, one each, through submitit | `qbench-llm[slurm]` |
| ray | as tasks of a Ray cluster, or of a Ray of this host, one each | `qbench-llm[ray]` |

Another class with these three methods serves as well: its YAML says `_target_: MODULE.CLASS`. Whatever becomes of a
launcher, of a job or of a task, every point has an outcome.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from qbench.errors import RequestError
from qbench.record.store import Store
from qbench.sweep.share import cores, gpus, host_shares
from qbench.sweep.worker import SECONDS_TO_END, Outcome, Pass, Point, Running, own_seconds, record_failure, run, said

CORES_PER_PASS = 4  # on a CPU host, unless the launcher is told a number of jobs


class Launcher(Protocol):
    elsewhere: bool  # on machines whose devices are not known here

    def jobs(self, cuda: bool) -> int:
        """Over how many processes at a time the points are dealt out; `cuda` says whether they run on GPUs.

        Raises RequestError for a launcher that is not installed, or that cannot place them.
        """
        ...

    def words(self, passes: int) -> str:
        """How so many passes will run, as a sentence ends."""
        ...

    def launch(self, passes: Sequence[Pass]) -> Iterator[Outcome]:
        """Gives the outcome of every point of every pass, each as soon as it is known."""
        ...


class Here:
    elsewhere = False

    def jobs(self, cuda: bool) -> int:
        return 1

    def words(self, passes: int) -> str:
        return "one after the other"

    def launch(self, passes: Sequence[Pass]) -> Iterator[Outcome]:
        for each in passes:
            yield from run(each)


@dataclass
class Local:
    """Each pass takes one share of the host: a GPU, where the points run on GPUs, else an equal part of the cores.

    `n_jobs` is how many run at a time, -1: as many as there are GPUs, or one per 4 cores.
    """

    n_jobs: int = -1
    elsewhere = False

    def jobs(self, cuda: bool) -> int:
        self.cards = gpus() if cuda else []
        most = self.n_jobs if self.n_jobs > 0 else len(self.cards) or max(1, cores() // CORES_PER_PASS)
        self.at_a_time = min(most, len(self.cards)) if self.cards else most
        return self.at_a_time

    def words(self, passes: int) -> str:
        jobs = min(passes, self.at_a_time)
        shares, _ = host_shares(self.cards, jobs, Path())
        threads = shares[0].environment.get("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS"))
        return f"{jobs} at a time, {threads} threads each{', one GPU each' if self.cards else ''}"

    def launch(self, passes: Sequence[Pass]) -> Iterator[Outcome]:
        jobs = min(len(passes), self.at_a_time)
        shares, slots = host_shares(self.cards, jobs, Path(passes[0].folder))
        todo: queue.SimpleQueue[Pass] = queue.SimpleQueue()
        for each in passes:
            todo.put(replace(each, shares=shares, slots=slots))
        told: queue.SimpleQueue[Outcome | BaseException | None] = queue.SimpleQueue()
        running = Running()

        def work() -> None:
            try:
                while True:
                    for outcome in run(todo.get_nowait(), running):
                        told.put(outcome)
            except queue.Empty:
                told.put(None)
            except BaseException as error:
                told.put(error)

        workers = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
        try:
            for worker in workers:
                worker.start()
            ended = 0
            while ended < len(workers):
                if isinstance(found := told.get(), BaseException):
                    raise found
                if found is None:
                    ended += 1
                else:
                    yield found
        finally:
            running.stop()


class Slurm:
    """One submitit job a pass, as one array, with the fields of conf/hydra/launcher/slurm.yaml.

    `n_jobs` is over how many jobs the points of a model are dealt out at most, -1: no more than there are passes.
    """

    elsewhere = True
    SHARED = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")

    def __init__(self, submitit_folder: str, n_jobs: int = -1, max_num_timeout: int = 0, **parameters: Any) -> None:
        self.folder, self.n_jobs, self.max_num_timeout = submitit_folder, n_jobs, max_num_timeout
        shared = (*self.SHARED, "stderr_to_stdout")
        self.parameters = {key if key in shared else f"slurm_{key}": value for key, value in parameters.items()}

    def jobs(self, cuda: bool) -> int:
        _require("submitit", "slurm")
        if shutil.which("sbatch") is None:
            raise RequestError(
                "hydra/launcher=slurm: there is no sbatch here; give the command on a machine of the cluster"
            )
        return self.n_jobs

    def words(self, passes: int) -> str:
        return f"as a job array of {passes}"

    def launch(self, passes: Sequence[Pass]) -> Iterator[Outcome]:
        import submitit

        executor = submitit.AutoExecutor(
            folder=self.folder, cluster="slurm", slurm_max_num_timeout=self.max_num_timeout
        )
        executor.update_parameters(**self.parameters)
        jobs = executor.map_array(Job(), passes)
        yield from _follow(list(zip(jobs, passes, strict=True)), lambda job: f"job {job.job_id} was lost", 10)


class Job:
    """A submitit job: runs a pass, and starts it over when Slurm preempts it; what is recorded is not done again."""

    def __call__(self, work: Pass) -> list[Outcome]:
        return list(run(work))

    def checkpoint(self, work: Pass) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, work)


@dataclass
class Ray:
    """One task of Ray a pass, on the cluster at `address` (null: RAY_ADDRESS, else a Ray of this host is started).

    Ray gives each its `num_gpus` (null: 1 for points on GPUs, else 0) and `num_cpus`. `n_jobs` is over how many tasks
    at a time the points are dealt out, -1: as many as the cluster has room for.
    """

    address: str | None = None
    num_cpus: int = CORES_PER_PASS
    num_gpus: float | None = None
    n_jobs: int = -1

    @property
    def elsewhere(self) -> bool:
        return bool(self.address or os.environ.get("RAY_ADDRESS"))

    def jobs(self, cuda: bool) -> int:
        ray = _require("ray", "ray")
        ours = signal.getsignal(signal.SIGTERM)
        address = self.address or os.environ.get("RAY_ADDRESS")
        try:
            host, _, port = (address or "").removeprefix("ray://").rpartition(":")
            if port.isdigit():  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        except (OSError, ValueError, RuntimeError) as error:  # ConnectionError is an OSError
            reason = " ".join(str(error).split())
            raise RequestError(f"hydra.launcher.address={address}: no Ray answers there: {reason}") from None
        signal.signal(signal.SIGTERM, ours)  # Ray's ends this process at once, and leaves the tasks
        has = ray.cluster_resources()
        num_gpus = float(cuda) if self.num_gpus is None else self.num_gpus
        num_cpus = min(self.num_cpus, has.get("CPU", 1))
        rooms = [has.get(k, 0) / wanted for k, wanted in (("CPU", num_cpus), ("GPU", num_gpus)) if wanted]
        if rooms and min(rooms) < 1:
            ray.shutdown()
            raise RequestError(
                f"this Ray has {has.get('GPU', 0):g} GPUs and a pass wants {num_gpus:g}: set hydra.launcher.num_gpus, "
                "or say runtime.device=cpu"
            )
        self.wants = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self.at_a_time = self.n_jobs if self.n_jobs > 0 else max(1, int(min(rooms, default=1)))
        return self.at_a_time

    def words(self, passes: int) -> str:
        return f"as {passes} tasks of Ray"

    def launch(self, passes: Sequence[Pass]) -> Iterator[Outcome]:
        import ray

        task = ray.remote(max_retries=0, **self.wants)(_ray_task)
        tasks = [task.remote(each, str(Path.cwd())) for each in passes]
        jobs = [reference.future() for reference in tasks]
        try:
            yield from _follow(list(zip(jobs, passes, strict=True)), lambda _: "its Ray task was lost", 0.5)
        except BaseException:
            for reference in tasks:
                ray.cancel(reference, recursive=False)  # an interrupt of the task, which ends its process
            wait(jobs, SECONDS_TO_END + 10)
            raise
        finally:
            ray.shutdown()


def _ray_task(work: Pass, folder: str) -> list[Outcome]:
    os.chdir(folder)  # where the sweep was started: `outputs` may be a relative path
    return list(run(work))


def _follow(jobs: list[tuple[Any, Pass]], lost: Callable[[Any], str], poll_seconds: float) -> Iterator[Outcome]:
    """The outcomes of points whose passes run elsewhere; each is said as soon as its result is in the store.

    A job has `done()` and `result()`, the outcomes of its pass; of one without, `lost` says what became of it.
    """
    known = {id(point): _written(point) for _, work in jobs for point in work.points}
    pending = [(job, list(work.points)) for job, work in jobs]
    while pending:
        for job, left in list(pending):
            ended = job.done()
            for point in list(left):
                if point.exports or _written(point) == known[id(point)]:
                    continue
                if (result := Store(point.config["outputs"]).load(point.run_id)) is not None:
                    left.remove(point)
                    yield said(Outcome(point, result, own_seconds(result)))
            if ended:
                pending.remove((job, left))
                try:
                    outcomes = {outcome.point.run_id: outcome for outcome in job.result()}
                except Exception as error:
                    first_line = str(error).strip().partition("\n")[0]
                    outcomes = {point.run_id: _settle(point, f"{lost(job)}: {first_line}") for point in left}
                yield from (said(outcomes[point.run_id]) for point in left)
        if pending:
            time.sleep(poll_seconds)


def _written(point: Point) -> tuple[int, int] | None:
    """What changes when the point's result is written; None while there is none."""
    path = Store(point.config["outputs"]).results / point.run_id / "result.json"
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_ino


def _settle(point: Point, reason: str) -> Outcome:
    """The outcome of a point whose job did not come back: what it has recorded, or a failure for this reason."""
    failure = record_failure(point, reason)  # waits if the point's own process has outlived its job
    if point.config["runtime"]["rerun"]:
        return Outcome(point, failure)
    return Outcome(point, Store(point.config["outputs"]).load(point.run_id) or failure)


def _require(module: str, extra: str) -> Any:
    try:
        return __import__(module)
    except ImportError:
        raise RequestError(f"this launcher is not installed: pip install 'qbench-llm[{extra}]'") from None
