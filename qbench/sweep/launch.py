"""From the points of a plan to the passes that a launcher runs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from qbench.errors import PointError, RequestError
from qbench.request import estimate
from qbench.sweep.launchers import Here, Launcher
from qbench.sweep.passes import deal, fitting, group
from qbench.sweep.prepared import remembered
from qbench.sweep.worker import Pass, Point

if TYPE_CHECKING:
    from qbench.request.prepare import Prepared
    from qbench.sweep.passes import Group
    from qbench.sweep.plan import Planned


def grouped(todo: Sequence[Planned], where: Launcher) -> list[Group]:
    """The passes of points that are not recorded, as many as `where` has processes for.

    Raises RequestError when the launcher cannot place them.
    """
    cuda = any(planned.point.device.type == "cuda" for planned in todo)
    jobs = max(1, where.jobs(cuda))
    if jobs > 1 and any(planned.point.device.index for planned in todo):
        raise RequestError("every pass is given one GPU of its own here: say runtime.device=cuda")
    free = float("inf") if where.elsewhere else psutil.virtual_memory().available / jobs
    skeleton, coefficients = remembered(estimate.skeleton), remembered(estimate.coefficients)

    def weights(point: Prepared) -> int | None:
        known = skeleton(point.model)
        return known and known.parameters

    def held(point: Prepared) -> int | None:
        """Bytes of a variant in host memory from block to block; None where they are not known."""
        states, kept = estimate.state_bytes(point), 0
        if point.export is not None:
            with contextlib.suppress(PointError):  # a method that fails on random matrices may suit the model's
                _, kept = estimate.quantized(point, skeleton(point.model), coefficients) or (None, None)
        return None if states is None or (not kept and point.export is not None) else states + kept

    return deal(fitting(group(todo), held, free), jobs, weights)


def sent(passes: Sequence[Group], todo: Sequence[Planned], folder: Path, sweep: str) -> list[Pass]:
    """What the launcher is handed: `todo` numbers the points, logs go to `folder`, `sweep` is the sweep's name."""
    numbers = {planned.key: number for number, planned in enumerate(todo, 1)}
    return [
        Pass(
            name=str(name),
            points=tuple(_point(planned, numbers[planned.key], len(todo)) for planned in each),
            folder=str(folder),
            sweep=sweep,
        )
        for name, each in enumerate(passes, 1)
    ]


def _point(planned: Planned, number: int, total: int) -> Point:
    point = planned.point
    return Point(
        number=number,
        total=total,
        label=planned.label,
        overrides=planned.overrides,
        run_id=point.run_id,
        identity=point.identity,
        request=planned.request,
        config=asdict(point.config),
        device=str(point.device),
        dtype=str(point.dtype).removeprefix("torch."),
        exports=point.export is not None,
    )


def launcher(settings: DictConfig) -> Launcher:
    """What hydra/launcher chooses. Raises RequestError for one that is not installed, or that is no launcher of passes.

    Hydra's own, the default, runs job after job in one process, and stands for the points' running here.
    """
    values = OmegaConf.to_container(settings, resolve=True)
    target = str(values.pop("_target_"))
    if target.endswith(".BasicLauncher"):
        return Here()
    try:
        found = get_class(target)
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise RequestError(f"hydra/launcher: {target} cannot be imported: {reason}", key="hydra/launcher") from None
    if not all(hasattr(found, name) for name in ("elsewhere", "jobs", "words", "launch")):
        raise RequestError(
            f"hydra/launcher: {target} runs Hydra's jobs, not the passes of a sweep; use hydra/launcher=local, slurm "
            "or ray, or leave it out"
        )
    try:
        return found(**values)
    except (TypeError, ValueError) as error:
        raise RequestError(f"hydra/launcher: {target}: {error}") from None
