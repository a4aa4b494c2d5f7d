"""A sweep: every point is checked before the first one starts, then each runs in a process of its own.

The command line and the configuration are Hydra's, and so is what they mean:

    python -m qbench -m quantizer=rtn,sinq quantizer.nbits=3,4          the product of what is listed
    python -m qbench -m experiment=demo                                 a product and more, from conf/experiment/

Hydra's launcher says where points run: one after the other here (basic), side by side here (joblib, submitit_local),
or on a cluster (slurm). Hydra itself has no resume, no failure handling and no device per job; those are here and in
child.py, so a Hydra callback takes its multirun over. A point is known by its run_id: recorded ones are skipped, and
so the same command resumes a sweep.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from qbench import requests
from qbench.config import Config
from qbench.errors import RequestError

if TYPE_CHECKING:
    from qbench.child import Outcome, Point
    from qbench.record.result import Result
    from qbench.run import Prepared

CORES_PER_POINT = 4  # on a CPU host, unless the launcher is told a number of jobs


@dataclass(frozen=True)
class Planned:
    overrides: tuple[str, ...]
    label: str
    point: Prepared
    recorded: Result | None


class Sweep(Callback):
    """Takes a multirun over from Hydra when it starts, and ends the program with the sweep's exit status."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Exit status: 0, 1 if a point failed, 2 if any point cannot be served, in which case none has been started."""
        try:
            status = self._sweep(config)
        except RequestError as error:
            _say(f"qbench: {error}")
            status = 2
        except (HydraException, OmegaConfBaseException) as error:
            _say(f"qbench: {requests.explain(error, config.hydra.overrides.task)}")
            status = 2
        except Exception:  # Hydra would print it as a warning and go on
            traceback.print_exc()
            status = 1
        sys.exit(status)

    def _sweep(self, config: DictConfig) -> int:
        from qbench.record.wandb_tracker import sweep_name

        started = time.perf_counter()
        self.config = config
        self.hydra_context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
        where = _check_launcher(config.hydra.launcher)
        task = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # ${...} is each point's own
        plan = self._plan(self._expand(task), where)
        todo = [p for p in plan if p.recorded is None]
        if config.hydra.sweeper.dry_run:
            from qbench.estimate import show_plan

            _print_json(show_plan(plan))
            return 0
        words, points = self._points(todo, where, sweep_name([p.point.run_id for p in plan]))
        _say(
            f"sweep: {len(plan)} points, {len(plan) - len(todo)} recorded already, {len(todo)} to run"
            + (f", {words}" if todo else "")
        )
        outcomes = {outcome.point.run_id: outcome for outcome in self._launch(points, where)} if points else {}
        return _conclude(plan, outcomes, time.perf_counter() - started)

    def _expand(self, arguments: list[str]) -> list[tuple[str, ...]]:
        """The overrides of every point: each product in turn; what the command line says comes last and wins."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        found: list[tuple[str, ...]] = []
        sweeper = OmegaConf.to_container(self.config.hydra.sweeper, resolve=False)
        products = list(sweeper["also"])
        if sweeper["params"] or not products:
            products.insert(0, sweeper["params"] or {})
        for product in products:
            overrides = parser.parse_overrides([*(f"{k}={v}" for k, v in product.items()), *arguments])
            for override in overrides:
                if override.is_sweep_override() and override.get_key_element() == "experiment":
                    raise RequestError("one experiment at a time: an experiment is a sweep already")
            found += [tuple(p) for p in BasicSweeper.split_arguments(overrides, None)[0]]
        return list(dict.fromkeys(found))

    def _plan(self, found: list[tuple[str, ...]], where: str) -> list[Planned]:
        from qbench.evaluate import measure
        from qbench.evaluate.text import read_text
        from qbench.models import load
        from qbench.run import prepare

        common = set(found[0]).intersection(*found[1:])
        shared = [_remembered(function) for function in (load.fingerprint, measure.read, read_text)]
        plan: dict[str, Planned] = {}
        refused: dict[str, list[str]] = {}  # sentence -> the points it is about
        exports: dict[Path, str] = {}
        for overrides in found:
            label = " ".join(o for o in overrides if o not in common) or " ".join(overrides) or "defaults"
            try:
                config = self._compose(overrides)
                if where == "slurm" and config.runtime.device == "auto":
                    raise RequestError(
                        "runtime.device=auto would mean this machine; with a Slurm launcher say cuda or cpu"
                    )
                point = prepare(config, list(overrides), where != "slurm", *shared)
                if point.export is not None and exports.setdefault(point.export, point.run_id) != point.run_id:
                    raise RequestError(
                        f"export.dir={point.export} would hold the checkpoint of another point of this sweep; use "
                        "'${quantizer.name}' and '${quantizer.nbits}' in the name"
                    )
            except RequestError as error:
                refused.setdefault(str(error), []).append(label)
            else:
                plan.setdefault(point.run_id, Planned(overrides, label, point, point.recorded()))
        if refused:
            raise RequestError(_refusal(refused, len(found)))
        return list(plan.values())

    def _compose(self, overrides: tuple[str, ...]) -> Config:
        try:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(composed):
                del composed["hydra"]
            return OmegaConf.to_object(composed)  # type: ignore[return-value]
        except MissingMandatoryValue as error:
            raise RequestError(f"{error.full_key} must be set: {error.full_key}=VALUE") from None
        except (HydraException, OmegaConfBaseException) as error:
            raise RequestError(requests.explain(error, overrides)) from None

    def _points(self, todo: list[Planned], where: str, name: str) -> tuple[str, list[Point]]:
        """How many run at a time, in words, and what is sent to where they run."""
        from qbench.child import Point, host_shares

        folder = Path(self.config.hydra.sweep.dir)
        shares, words = (), "one after the other"
        if where == "slurm":
            words = "as a job array"
        elif where != "here":
            gpus = _gpus() if any(p.point.device.type == "cuda" for p in todo) else []
            if gpus and any(p.point.device.index for p in todo):
                raise RequestError("every job is given one GPU of its own here: say runtime.device=cuda")
            jobs = _jobs(self.config.hydra.launcher, len(gpus))
            shares = host_shares(jobs, gpus, folder)
            threads = shares[0].environment.get("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS"))
            words = f"{len(shares)} at a time, {threads} threads each" + (", one GPU each" if gpus else "")
        hydra = self.config.hydra
        flags = [a for a in hydra.overrides.hydra if a.startswith("hydra.searchpath=")]
        for source in hydra.runtime.config_sources:
            flags += ["--config-dir", source.path] if source.provider == "command-line" else []
        points = []
        for number, planned in enumerate(todo, 1):
            point = planned.point
            points.append(
                Point(
                    number=number,
                    total=len(todo),
                    label=planned.label,
                    overrides=planned.overrides,
                    run_id=point.run_id,
                    config=asdict(point.config),
                    device=str(point.device),
                    dtype=str(point.dtype).removeprefix("torch."),
                    log=str(folder / f"{number}-{point.run_id}.log"),
                    sweep=name,
                    exports=point.export is not None,
                    flags=tuple(flags),
                    shares=shares,
                )
            )
        return words, points

    def _launch(self, points: list[Point], where: str) -> Iterator[Outcome]:
        """Hands the points to the launcher and gives each one's outcome, whatever became of it."""
        from qbench.child import Work

        with open_dict(self.config.hydra):
            self.config.hydra.sweep.dir = str(self.config.hydra.sweep.dir)  # ${now:} is another time in another process
            if where == "joblib":
                self.config.hydra.launcher.n_jobs = len(points[0].shares)
        launcher = Plugins.instance().instantiate_launcher(self.hydra_context, Work(tuple(points)), self.config)
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

    from qbench.child import Job

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
        _say(str(outcome))
        yield outcome


def _settle(point: Point, reason: str) -> Outcome:
    """The outcome of a point whose job did not come back: what it has recorded, or a failure for this reason."""
    from qbench.child import Outcome, record_failure
    from qbench.record.store import Store

    failure = record_failure(point, reason)  # waits if the point's own process has outlived its job
    if point.config["runtime"]["rerun"]:
        return Outcome(point, failure)
    return Outcome(point, Store(point.config["outputs"]).load(point.run_id) or failure)


def _check_launcher(launcher: DictConfig) -> str:
    """Where the points run: here, joblib, submitit (this host), slurm, other. Raises RequestError if it is missing."""
    target = str(launcher._target_)
    if target not in Plugins.instance().class_name_to_class:
        raise RequestError(f"this launcher ({target}) is not installed: pip install 'qbench-llm[launchers]'")
    names = {"BasicLauncher": "here", "JoblibLauncher": "joblib", "LocalLauncher": "submitit", "SlurmLauncher": "slurm"}
    return names.get(target.rpartition(".")[2], "other")


def _jobs(launcher: DictConfig, gpus: int) -> int:
    """How many points run at a time on this host, as the launcher is told; by default one a GPU, or one per 4 cores.

    joblib's own default, n_jobs=-1, is one per core, which suits no point that computes.
    """
    from qbench.child import cores

    if (asked := launcher.get("n_jobs", -1)) > 0:
        return asked
    if per_point := launcher.get("cpus_per_task"):
        return max(1, cores() // per_point)
    return gpus or max(1, cores() // CORES_PER_POINT)


def _gpus() -> list[str]:
    import torch

    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return [str(i) for i in range(torch.cuda.device_count())]


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Points of a sweep share models and texts: each is fingerprinted or read once."""
    known: dict[str, Any] = {}

    def call(*configs: Any) -> Any:
        if (name := repr(configs)) not in known:
            known[name] = function(*configs)
        return known[name]

    return call


def _refusal(refused: Mapping[str, list[str]], total: int) -> str:
    if len(refused) == 1 and len(next(iter(refused.values()))) == total:
        return next(iter(refused))
    count = sum(map(len, refused.values()))
    lines = [f"  {label}: {sentence}" for sentence, labels in refused.items() for label in labels]
    return "\n".join([f"{count} of {total} points cannot run, so none was started:", *lines])


def _conclude(plan: list[Planned], outcomes: Mapping[str, Outcome], seconds: float) -> int:
    """The leaderboard and the failures on stderr, one JSON line on stdout; returns the exit status."""
    from qbench import leaderboard
    from qbench.record import wandb_tracker

    results = [p.recorded or outcomes[p.point.run_id].result for p in plan]
    for outputs in dict.fromkeys(p.point.config.outputs for p in plan):
        leaderboard.show(Path(outputs), {p.point.run_id for p in plan}, sys.stderr)
    config = plan[0].point.config
    if config.tracker.name == "wandb":
        wandb_tracker.track_sweep(results, config.tracker, Path(config.outputs))
    failed = [o for o in outcomes.values() if o.result.status != "ok"]
    if failed:
        _say(f"{len(failed)} of {len(plan)} points failed; the same command tries them again:")
    for outcome in failed:
        _say(f"  {outcome.point.label}: {outcome.result.error}\n    log: {outcome.point.log}")
    _print_json(
        {
            "points": len(plan),
            "ok": len(plan) - len(failed),
            "failed": len(failed),
            "skipped": len(plan) - len(outcomes),
            "seconds": round(seconds, 1),
            "results": [result.summary() for result in results],
        }
    )
    return 1 if failed else 0


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)
