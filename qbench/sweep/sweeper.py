"""A sweep: every point is checked before the first one starts, then they run in passes, each in a process of its own.

The command line and the configuration are Hydra's, and so is what they mean:

    python -m qbench -m quantizer=rtn,sinq quantizer.nbits=3,4          the product of what is listed
    python -m qbench -m experiment=demo                                 a product and more, from conf/experiment/

Points that share model, text, precision and device share a pass (passes.py), and hydra/launcher says where passes run
(launchers.py): one after the other here, side by side here, or on a cluster. Hydra itself has no resume, no failure
handling and no device per job; those are here, in plan.py, launch.py and worker.py. A point is known by its run_id:
recorded ones are skipped, and so the same command resumes a sweep.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import configure_log
from hydra.types import HydraContext
from omegaconf import DictConfig

from qbench import entry
from qbench.errors import SweepFailed
from qbench.sweep.launch import grouped, launcher, sent
from qbench.sweep.plan import expand, plan
from qbench.track.tracker import harmless, sweep_name

if TYPE_CHECKING:
    from qbench.record.result import Result
    from qbench.sweep.plan import Planned
    from qbench.sweep.worker import Outcome


def run_sweep(arguments: list[str], config: DictConfig, context: HydraContext) -> dict[str, Any]:
    """Runs what is not recorded yet, or shows the plan; prints one JSON object as the last line and returns it.

    Raises RequestError if any point cannot be served, in which case none has been started, and SweepFailed if a point
    failed.
    """
    started = time.perf_counter()
    hydra, loader = config.hydra, context.config_loader
    configure_log(hydra.job_logging, hydra.verbose)
    where = launcher(hydra.launcher)
    planned = plan(expand(arguments, hydra, loader), config, loader, where.elsewhere)
    todo = [p for p in planned if p.recorded is None]
    passes = grouped(todo, where) if todo else []
    if hydra.sweeper.dry_run:
        from qbench.sweep.dry_run import show

        return _print_json(show(planned, passes, where))
    entry.begin_work()
    name = sweep_name([p.point.run_id for p in planned])
    how = f" in {_count(len(passes), 'pass', 'es')}, {where.words(len(passes))}" if todo else ""
    _say(f"sweep: {_count(len(planned), 'point')}, {len(planned) - len(todo)} recorded, {len(todo)} to run{how}")
    work = sent(passes, todo, Path(str(hydra.sweep.dir)), name)
    outcomes = {outcome.point.number: outcome for outcome in where.launch(work)} if work else {}
    ran = {p.key: outcomes[number] for number, p in enumerate(todo, 1)}
    return _conclude(planned, ran, name, time.perf_counter() - started)


def _conclude(
    plan: list[Planned], outcomes: Mapping[tuple[str, ...], Outcome], name: str, seconds: float
) -> dict[str, Any]:
    """The leaderboard and the failures on stderr, one JSON line on stdout."""
    from qbench.report import terminal

    results = [p.recorded or outcomes[p.key].result for p in plan]
    for outputs in dict.fromkeys(p.point.config.outputs for p in plan):
        shown = {p.point.run_id for p in plan if p.point.config.outputs == outputs}
        terminal.show(Path(outputs), shown, sys.stderr)
    _tell(plan, results, name)
    failed = [o for o in outcomes.values() if o.result.status != "ok"]
    if failed:
        _say(f"{len(failed)} of {len(plan)} points failed; the same command tries them again:")
    for outcome in failed:
        _say(f"  {outcome.point.label}: {outcome.result.error}\n    log: {outcome.log}")
    summary = _print_json(
        {
            "points": len(plan),
            "ok": len(plan) - len(failed),
            "failed": len(failed),
            "skipped": len(plan) - len(outcomes),
            "seconds": round(seconds, 1),
            "results": [result.summary() for result in results],
        }
    )
    if failed:
        raise SweepFailed(f"{len(failed)} of {len(plan)} points failed")
    return summary


def _tell(plan: list[Planned], results: list[Result], name: str) -> None:
    """Tells each tracker of its points' sweep, and of those that were recorded already: the others told it themselves.

    All are in the group of this sweep, so one that was extended has its earlier points with it.
    """
    told: dict[str, list[int]] = {}  # points may differ in their tracker, and in where they are recorded
    for index, planned in enumerate(plan):
        told.setdefault(repr((planned.point.tracker, planned.point.config.outputs)), []).append(index)
    for indices in told.values():
        tracker, folder = plan[indices[0]].point.tracker, Path(plan[indices[0]].point.config.outputs)
        for index in indices:
            if plan[index].recorded is not None:
                with harmless(tracker):
                    tracker.point(results[index], folder, name)
        with harmless(tracker):
            tracker.sweep([results[index] for index in indices], folder, name)


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else plural}"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _print_json(value: dict[str, Any]) -> dict[str, Any]:
    with contextlib.suppress(BrokenPipeError):  # nobody reads it: what was done and recorded stays so
        print(json.dumps(value), flush=True)
    return value
