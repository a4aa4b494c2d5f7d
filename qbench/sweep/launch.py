"""Where the points of a sweep run: here, side by side on this host, or as jobs of a cluster.

Whatever becomes of a launcher or of a job, every point has an outcome.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from qbench.errors import RequestError
from qbench.record.store import Store
from qbench.sweep.plan import Planned
from qbench.sweep.share import cores, gpus, host_shares
from qbench.sweep.worker import Job, Outcome, Point, Work, record_failure, run, said

CORES_PER_POINT = 4  # on a CPU host, unless the launcher is told a number of jobs


def placement(launcher: DictConfig) -> str:
    """Where points will run: here, joblib, submitit (this host), slurm or other.

    Raises RequestError for a launcher that is not installed.
    """
    target = str(launcher._target_)
    if target not in Plugins.instance().class_name_to_class:
        raise RequestError(f"this launcher ({target}) is not installed: pip install 'qbench-llm[launchers]'")
    names = {"BasicLauncher": "here", "JoblibLauncher": "joblib", "LocalLauncher": "submitit", "SlurmLauncher": "slurm"}
    return names.get(target.rpartition(".")[2], "other")


def points(todo: list[Planned], hydra: DictConfig, where: str, sweep: str) -> tuple[str, list[Point]]:
    """How many run at a time, in words, and what is sent to where they run; `sweep` is the sweep's name."""
    folder = Path(hydra.sweep.dir)
    shares, slots, words = (), (), "one after the other"
    if where == "slurm":
        words = "as a job array"
    elif where != "here":
        cards = gpus() if any(p.point.device.type == "cuda" for p in todo) else []
        if cards and any(p.point.device.index for p in todo):
            raise RequestError("every job is given one GPU of its own here: say runtime.device=cuda")
        shares, slots = host_shares(cards, _jobs(hydra.launcher, len(cards)), folder)
        threads = shares[0].environment.get("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS"))
        words = f"{len(slots or shares)} at a time, {threads} threads each" + (", one GPU each" if cards else "")
    found = []
    for number, planned in enumerate(todo, 1):
        point = planned.point
        found.append(
            Point(
                number=number,
                total=len(todo),
                label=planned.label,
                overrides=planned.overrides,
                run_id=point.run_id,
                identity=point.identity,
                request=planned.request,
                config=asdict(point.config),
                device=str(point.device),
                dtype=str(point.dtype).removeprefix("torch."),
                log=str(folder / f"{number}-{point.run_id}.log"),
                sweep=sweep,
                exports=point.export is not None,
                shares=shares,
                slots=slots,
            )
        )
    return words, found


def _jobs(launcher: DictConfig, gpus: int) -> int:
    """How many points run at a time on this host, as the launcher is told; by default one a GPU, or one per 4 cores.

    joblib's own default, n_jobs=-1, is one per core, which suits no point that computes.
    """
    if (asked := launcher.get("n_jobs", -1)) > 0:
        return asked
    if per_point := launcher.get("cpus_per_task"):
        return max(1, cores() // per_point)
    return gpus or max(1, cores() // CORES_PER_POINT)


def launch(points: list[Point], config: DictConfig, context: HydraContext, where: str) -> Iterator[Outcome]:
    """Hands the points to the launcher and gives each one's outcome, whatever became of it.

    Those that run here, one after the other, need none: Hydra's would compose each of them once more.
    """
    if where == "here":
        for point in points:
            yield said(run(point))
        return
    with open_dict(config.hydra):
        config.hydra.sweep.dir = str(config.hydra.sweep.dir)  # ${now:} is another time in another process
        if where == "joblib":
            config.hydra.launcher.n_jobs = len(points[0].slots or points[0].shares)
    launcher = Plugins.instance().instantiate_launcher(context, Work(tuple(points)), config)
    if where in ("submitit", "slurm"):
        yield from _submit(launcher, points)
        return
    try:
        jobs = launcher.launch([list(p.overrides) for p in points], initial_job_idx=0)
    except Exception as error:
        yield from (_settle(point, f"the launcher ended with {type(error).__name__}: {error}") for point in points)
        return
    for point, job in zip(points, jobs, strict=True):
        try:
            yield job.return_value
        except Exception as error:
            yield _settle(point, f"its job ended with {type(error).__name__}: {error}")


def _submit(launcher: Any, points: list[Point]) -> Iterator[Outcome]:
    """One submitit job a point, as one array, with the launcher's parameters; yields as they end.

    Hydra's launcher would give up on all jobs when the first one is lost (killed by Slurm, a node that fails).
    """
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    cluster, parameters = launcher._EXECUTOR, dict(launcher.params)
    first = {"folder": parameters.pop("submitit_folder")}
    if "max_num_timeout" in parameters:
        first[f"{cluster}_max_num_timeout"] = parameters.pop("max_num_timeout")
    executor = submitit.AutoExecutor(cluster=cluster, **first)
    shared = BaseQueueConf.__dataclass_fields__
    executor.update_parameters(**{k if k in shared else f"{cluster}_{k}": v for k, v in parameters.items()})
    jobs = executor.map_array(Job(), points)
    waiting = dict(zip((job.job_id for job in jobs), points, strict=True))
    for job in submitit.helpers.as_completed(jobs, poll_frequency=1 if cluster == "local" else 10):
        point = waiting.pop(job.job_id)
        try:
            outcome = job.result()
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            outcome = _settle(point, f"job {job.job_id} was lost: {first_line}")
        yield said(outcome)


def _settle(point: Point, reason: str) -> Outcome:
    """The outcome of a point whose job did not come back: what it has recorded, or a failure for this reason."""
    failure = record_failure(point, reason)  # waits if the point's own process has outlived its job
    if point.config["runtime"]["rerun"]:
        return Outcome(point, failure)
    return Outcome(point, Store(point.config["outputs"]).load(point.run_id) or failure)
