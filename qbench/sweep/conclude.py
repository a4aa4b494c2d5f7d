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

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qbench import entry
from qbench.errors import RequestError
from qbench.request import explain as requests

if TYPE_CHECKING:
    from qbench.record.result import Result
    from qbench.sweep.plan import Planned
    from qbench.sweep.worker import Outcome


class Sweep(Callback):
    """Takes a multirun over from Hydra when it starts, and ends the program with the sweep's exit status."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Exit status: 0, 1 if a point failed, 2 if any point cannot be served, in which case none has been started."""
        try:
            status = _sweep(config)
        except RequestError as error:
            _say(f"qbench: {error}")
            status = 2
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            _say(f"qbench: {requests.explain(error, config.hydra.overrides.task)}")
            status = 2
        except Exception as error:  # Hydra would print it as a warning and go on
            _say(f"qbench: {entry.unexpected(error)}")
            status = 1
        sys.exit(status)


def _sweep(config: DictConfig) -> int:
    from qbench.sweep.launch import launch, placement, points
    from qbench.sweep.plan import expand, plan
    from qbench.track.wandb import sweep_name

    started = time.perf_counter()
    hydra, context = config.hydra, HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
    where = placement(hydra.launcher)
    arguments = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # ${...} is each point's own
    planned = plan(expand(arguments, hydra, context.config_loader), config, context.config_loader, where)
    if hydra.sweeper.dry_run:
        from qbench.request.estimate import show_plan

        _print_json(show_plan(planned))
        return 0
    todo = [p for p in planned if p.recorded is None]
    words, sent = points(todo, hydra, where, sweep_name([p.point.run_id for p in planned]))
    _say(
        f"sweep: {len(planned)} points, {len(planned) - len(todo)} recorded already, {len(todo)} to run"
        + (f", {words}" if todo else "")
    )
    outcomes = {outcome.point.run_id: outcome for outcome in launch(sent, config, context, where)} if sent else {}
    return _conclude(planned, outcomes, time.perf_counter() - started)


def _conclude(plan: list[Planned], outcomes: Mapping[str, Outcome], seconds: float) -> int:
    """The leaderboard and the failures on stderr, one JSON line on stdout; returns the exit status."""
    from qbench import leaderboard

    results = [p.recorded or outcomes[p.point.run_id].result for p in plan]
    for outputs in dict.fromkeys(p.point.config.outputs for p in plan):
        leaderboard.show(Path(outputs), {p.point.run_id for p in plan}, sys.stderr)
    _track(plan, results)
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


def _track(plan: list[Planned], results: list[Result]) -> None:
    """Tells each tracker of its points' sweep, and of those that were recorded already: the others told it themselves.

    All are in the group of this sweep, so one that was extended has its earlier points with it.
    """
    from qbench.track import wandb as wandb_tracker

    group = os.environ.get("WANDB_RUN_GROUP") or wandb_tracker.sweep_name([p.point.run_id for p in plan])
    told: dict[str, list[int]] = {}  # points may differ in their tracker, and in where they are recorded
    for index, planned in enumerate(plan):
        config = planned.point.config
        if config.tracker.name == "wandb":
            told.setdefault(repr((config.tracker, config.outputs)), []).append(index)
    for indices in told.values():
        config = plan[indices[0]].point.config
        tracker, folder = replace(config.tracker, group=config.tracker.group or group), Path(config.outputs)
        for index in indices:
            if plan[index].recorded is not None:
                wandb_tracker.track(results[index], tracker, folder)
        wandb_tracker.track_sweep([results[index] for index in indices], tracker, folder)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _print_json(value: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody reads it: what was done and recorded stays so
        print(json.dumps(value), flush=True)
