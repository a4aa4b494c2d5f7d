"""Points into passes: which points one process measures together, in one walk over their model's blocks.

Points share a pass when they are of one model, text, protocol, precision and device, and are recorded in one folder:
what is read, run in 16 bit and compared with is then the same for all. What cannot share (`alone`) is a pass of one. A
pass that would hold more than fits into host memory is divided, and so is one that several processes can work at.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qbench.request.prepare import Prepared
    from qbench.sweep.plan import Planned

    Group = list[Planned]

CALIBRATED_COST = 4.0  # of a variant that is shown calibration text, one that is not being 1


def alone(point: Prepared) -> str | None:
    """Why a point shares its pass with no other, in the words of its settings; None for one that can.

    A measurement of speed is alone since it records the peak of memory, which is of all that the process holds, and
    since other variants' states and weights would push its own out of caches. An exported variant keeps its packed
    weights until its turn to be written; on a CPU those are counted (`fitting`), on a GPU nobody knows before the pass
    what memory there will be.
    """
    config = point.config
    if config.runtime.offload:
        return "runtime.offload=true"
    if not point.model.original:
        return "a model that is quantized already"
    if config.speed.name != "none":
        return f"speed={config.speed.name}"
    return "export.dir" if point.export is not None and point.device.type != "cpu" else None


def shared(point: Prepared) -> str:
    """What the points of a pass have in common, as a text: equal ones, one pass."""
    made, config = point.identity, point.config
    weights = (made.weights, made.remote_code, repr(point.model), made.dtype, str(point.device))
    scored = (made.text_sha256, made.protocol, config.runtime.batch_size, config.runtime.threads)
    return json.dumps([weights, scored, config.outputs], sort_keys=True)


def group(points: Sequence[Planned]) -> list[Group]:
    """The passes, in the order of their first points; a run_id is in a pass once, since a pass locks its points."""
    found: dict[tuple[str, int], Group] = {}
    for number, planned in enumerate(points):
        point = planned.point
        if alone(point) is not None:
            found["", number] = [planned]
            continue
        again = 0  # the same measurement for another tracker
        while any(p.point.run_id == point.run_id for p in found.get((shared(point), again), ())):
            again += 1
        found.setdefault((shared(point), again), []).append(planned)
    return list(found.values())


def fitting(passes: Sequence[Group], held_bytes: Callable[[Prepared], int | None], free_bytes: float) -> list[Group]:
    """The passes, those divided whose variants would take more than half of the free host memory.

    `held_bytes` says what one variant takes from block to block: its hidden states, which the original has as well, and
    what it keeps to be exported. Where that is not known (None), an export is alone and other variants are not divided.
    A pass of one variant is left as it is, however large.
    """
    found: list[Group] = []
    for each in passes:
        held = {id(p): held_bytes(p.point) for p in each if len(each) > 1}
        unknown = [p for p in each if held and held[id(p)] is None and p.point.export is not None]
        found += [[planned] for planned in unknown]
        each = [planned for planned in each if planned not in unknown]
        if not each:
            continue
        one = None if len(each) == 1 or None in (sizes := [held[id(p)] for p in each]) else max(sizes)
        widest = max(planned.point.draws for planned in each)  # variants of one point
        most = max(1, (int(min(free_bytes / 2 / one, widest * len(each) + 1)) - 1) // widest) if one else len(each)
        parts = math.ceil(len(each) / most)
        size = math.ceil(len(each) / parts)  # as equal as can be
        found += [each[start : start + size] for start in range(0, len(each), size)]
    return found


def deal(passes: Sequence[Group], jobs: int, weights: Callable[[Prepared], int | None]) -> list[Group]:
    """The passes for `jobs` processes at a time: their variants are dealt out by cost, so that all end about together.

    A pass is divided into as many parts as its share of the cost asks for, the costliest variant going to the part with
    the least so far. The costliest pass comes first. With one job nothing changes.
    """
    if jobs < 2:
        return list(passes)
    costs = [[cost(planned.point, weights) for planned in each] for each in passes]
    share = sum(map(sum, costs)) / jobs
    found: list[tuple[float, Group]] = []
    for each, taken in zip(passes, costs, strict=True):
        parts = min(len(each), max(1, math.ceil(sum(taken) / share - 1e-9)))
        heap: list[tuple[float, int, list[int]]] = [(0.0, part, []) for part in range(parts)]
        for index in sorted(range(len(each)), key=lambda i: -taken[i]):
            total, part, indices = heapq.heappop(heap)
            heapq.heappush(heap, (total + taken[index], part, [*indices, index]))
        for total, _, indices in sorted(heap, key=lambda part: min(part[2])):
            found.append((total, [each[i] for i in sorted(indices)]))
    return [each for _, each in sorted(found, key=lambda part: -part[0])]


def cost(point: Prepared, weights: Callable[[Prepared], int | None]) -> float:
    """What a variant takes, in no unit: the model's weights, times CALIBRATED_COST for a method that `needs` a text.

    A rough measure: on one H200 such methods take ten times as long to quantize as others, and evaluating, which is the
    same for all, lies between the two. A point is as many variants as it has draws.
    """
    calibrated = point.quantizer is not None and bool(point.quantizer.needs)
    return (weights(point) or 1) * point.draws * (CALIBRATED_COST if calibrated else 1.0)
