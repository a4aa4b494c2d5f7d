"""What a sweep would do: its passes, their points, how large each is, and what would not fit. Nothing is run.

Numbers of bytes come from shapes (request/estimate.py). Of a text that is cut into windows for the models' tokenizer
only when it runs, the number of tokens is about right. A size that is not known is None.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qbench.errors import PointError
from qbench.request import estimate
from qbench.request.needs import START_SECONDS, needs
from qbench.sweep.passes import alone
from qbench.sweep.prepared import remembered

if TYPE_CHECKING:
    from qbench.sweep.launchers import Launcher
    from qbench.sweep.passes import Group
    from qbench.sweep.plan import Planned


def show(plan: Sequence[Planned], passes: Sequence[Group], where: Launcher) -> dict[str, Any]:
    """Prints a row per point and one per pass to stderr; returns the same as what JSON holds.

    Below the rows is a sentence for what stays in 16 bit of each model, for each quantizer that failed on the random
    matrices, and for what would not fit.
    """
    skeleton, coefficients = remembered(estimate.skeleton), remembered(estimate.coefficients)
    numbers = {planned.key: number for number, each in enumerate(passes, 1) for planned in each}
    said: dict[str, None] = {}  # sentences; a set that keeps its order
    rows = [_point(planned, numbers.get(planned.key), skeleton, coefficients, said) for planned in plan]
    if (total := _total(passes, skeleton)) is not None:
        said[total] = None
    memory = remembered(_device_bytes)
    sizes = [
        _pass(number, each, skeleton(each[0].point.model), where, memory, said) for number, each in enumerate(passes, 1)
    ]
    console = Console(file=sys.stderr, highlight=False, width=None if sys.stderr.isatty() else 160)
    console.print(_table(rows))
    if sizes:
        console.print(_pass_table(sizes))
    for sentence in said:
        print(sentence, file=sys.stderr)
    recorded = sum(planned.recorded is not None for planned in plan)
    to_run = f"{len(plan) - recorded} to run, passes: {len(passes)}"
    print(f"{len(plan)} points, {recorded} recorded, {to_run}; nothing was run", file=sys.stderr)
    counts = {"points": len(plan), "recorded": recorded, "to_run": len(plan) - recorded}
    return counts | {"plan": rows, "passes": sizes}


def _point(
    planned: Planned,
    number: int | None,
    skeleton: Callable[..., Any],
    coefficients: Callable[..., Any],
    said: dict[str, None],
) -> dict[str, Any]:
    point = planned.point
    known = skeleton(point.model)
    covered, refused, sentences = estimate.covered(point, known)
    said |= dict.fromkeys(sentences)
    try:
        bits, packed = estimate.quantized(point, known, coefficients) or (None, None)
    except PointError as error:
        bits, packed = None, None
        said[f"quantizer={point.config.quantizer['name']}: {error}"] = None
    needed = known and needs(point, known)
    return {
        "point": planned.label,
        "run_id": point.run_id,
        "state": "recorded" if planned.recorded else "will fail" if refused else "to run",
        "pass": number,
        "estimated_model_bytes": packed,
        "estimated_bits_per_weight": bits and round(bits, 4),
        "coverage": covered,
        "refused": refused,
        "download_bytes": needed and needed.download_bytes,
        "gpu_bytes": needed and needed.gpu_bytes,
        "h200_hours": needed and needed.hours and round(needed.hours, 3),
    }


def _total(passes: Sequence[Group], skeleton: Callable[..., Any]) -> str | None:
    """What all that is to run needs, each model downloaded once and read once a pass; None where it is unknown."""
    downloads: dict[str, int] = {}
    seconds = 0.0
    for each in passes:
        known = skeleton(each[0].point.model)
        if known is None:
            return None
        needed = [needs(planned.point, known) for planned in each]
        if any(one.hours is None for one in needed):
            return None
        downloads[repr(each[0].point.model)] = needed[0].download_bytes
        first = needed[0]
        seconds += START_SECONDS + first.read_seconds + (first.original_seconds or 0)
        seconds += sum(one.variant_seconds or 0 for one in needed)
    if not passes:
        return None
    return (
        f"in all: {_gb(sum(downloads.values()))} to download, about {seconds / 3600:.2g} hours on one H200 "
        "(an estimate, good to a factor of two: qbench/request/needs.py)"
    )


def _pass(
    number: int,
    each: Group,
    known: estimate.Skeleton | None,
    where: Launcher,
    memory: Callable[..., Any],
    said: dict[str, None],
) -> dict[str, Any]:
    """The sizes of a pass: weights of its largest block and of the rest, states of its variants, the reference."""
    point, item = each[0].point, each[0].point.dtype.itemsize
    tokens = estimate.tokens(point, known and known.vocabulary)
    states = known and tokens and tokens * known.hidden * item
    variants = sum(planned.point.draws for planned in each)
    sizes = {
        "pass": number,
        "points": [planned.point.run_id for planned in each],
        "alone": alone(point),
        "model": point.model.name,
        "block_bytes": known and known.largest_block * item,
        "rest_bytes": known and known.outside * item,
        "tokens": tokens,
        "variants": variants,
        "state_bytes": states and states * (variants + 1),
        "reference_bytes": states if getattr(point.protocol, "divergence", False) else 0,
    }
    if known is not None:
        device = None if where.elsewhere or point.device.type == "cpu" else memory(str(point.device))
        host = None if where.elsewhere else psutil.virtual_memory().available
        said |= dict.fromkeys(misfits(point, known, sizes, device, host))
    return sizes


def misfits(
    point: Any, known: estimate.Skeleton, sizes: dict[str, Any], device_bytes: int | None, host_bytes: int | None
) -> list[str]:
    """A sentence for each thing of a pass that would not fit, which names the setting that helps.

    `device_bytes` is the GPU's memory, None on a CPU or where it is not known, as `host_bytes` is the host's free one.
    """
    model, said = f"pass {sizes['pass']}, model={sizes['model']}", []
    block, rest = sizes["block_bytes"], sizes["rest_bytes"]
    resident = sizes["alone"] is not None and not point.config.runtime.offload
    weights = known.parameters * point.dtype.itemsize if resident else 2 * block + rest
    what = "the whole model" if resident else "a block, the next one and the rest of the model"
    rows = point.config.runtime.batch_size * point.protocol.window
    batch = rows * known.hidden * point.dtype.itemsize * 16 + 2 * point.protocol.window * known.vocabulary * 4
    holds, there = ("the GPU", device_bytes) if point.device.type != "cpu" else ("this host", host_bytes)
    if there is not None and weights > there:
        way = f"leave out {sizes['alone']}" if resident else "take a smaller model, or a device with more memory"
        said.append(f"{model}: {what} takes {_gb(weights)}, {holds} has {_gb(there)}; {way}")
    elif there is not None and weights + batch > there:
        said.append(
            f"{model}: a batch takes about {_gb(batch)} beside {_gb(weights)} of weights, {holds} has {_gb(there)}; "
            f"{'lower runtime.batch_size' if point.config.runtime.batch_size > 1 else 'lower task.window'}"
        )
    if host_bytes is not None and sizes["state_bytes"] and sizes["state_bytes"] > host_bytes / 2:
        said.append(
            f"{model}: the hidden states of its {sizes['variants']} variants and of the original take "
            f"{_gb(sizes['state_bytes'])}, more than half of the {_gb(host_bytes)} that this host has free; set "
            "task.max_windows to score fewer windows"
        )
    return said


def _device_bytes(device: str) -> int | None:
    """The memory of a GPU; asked in another process, since to ask takes memory on it. None where torch cannot say."""
    program = f"import torch as t; print(t.cuda.get_device_properties(t.device({device!r})).total_memory)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else None


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = _empty(
        "point",
        "run",
        "state",
        "pass",
        "bits/weight",
        "model, MB",
        "coverage",
        "download, GB",
        "GPU, GB",
        "H200 hours",
        left=3,
    )
    for row in rows:
        bits, packed, covered = row["estimated_bits_per_weight"], row["estimated_model_bytes"], row["coverage"]
        table.add_row(
            *(Text(row["point"]), row["run_id"], row["state"], str(row["pass"] or "")),
            *("?" if bits is None else f"{bits:.3f}", _mb(packed), "?" if covered is None else f"{covered:.1%}"),
            *("?" if row[key] is None else f"{row[key] / 1e9:.1f}" for key in ("download_bytes", "gpu_bytes")),
            "?" if row["h200_hours"] is None else f"{row['h200_hours']:.2g}",
        )
    return table


def _pass_table(sizes: Sequence[dict[str, Any]]) -> Table:
    table = _empty("pass", "model", "points", "block, MB", "rest, MB", "tokens", "states, MB", "reference, MB", left=2)
    for row in sizes:
        name = row["model"] if row["alone"] is None else f"{row['model']}, alone: {row['alone']}"
        shown = [_mb(row[key]) for key in ("block_bytes", "rest_bytes", "state_bytes", "reference_bytes")]
        tokens = "?" if row["tokens"] is None else f"{row['tokens']:,}"
        table.add_row(str(row["pass"]), Text(name), str(len(row["points"])), *shown[:2], tokens, *shown[2:])
    return table


def _empty(*names: str, left: int) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < left else "right")
    return table


def _mb(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.1f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
