"""Timing on a GPU: the median of CUDA-graph replays over weights that do not fit into the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qbench.format.aux import Aux
from qbench.format.weight import QuantizedWeight

DEVICE = "cuda"
Key = TypeVar("Key")
ROTATED_BYTES = 400e6  # distinct weights per measurement; an H200's L2 holds 60 MB


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median replay, and the fastest and slowest of them."""

    us: float
    low: float
    high: float


def time_calls(calls: Sequence[Callable[[], object]], replays: int = 21) -> Timing:
    """Captures all calls, one per set of weights, in one CUDA graph and times its replays."""
    return time_together({"": calls}, replays)[""]


def time_together(kernels: Mapping[Key, Sequence[Callable[[], object]]], replays: int = 21) -> dict[Key, Timing]:
    """Each kernel's calls in a CUDA graph of their own, replayed by turns, so that all of them meet the same clocks: a
    GPU at its power limit is slower after a second of products than in the first milliseconds of one.
    """
    times = times_together(kernels, replays)
    return {name: Timing(statistics.median(us), min(us), max(us)) for name, us in times.items()}


def times_together(kernels: Mapping[Key, Sequence[Callable[[], object]]], replays: int = 21) -> dict[Key, list[float]]:
    """The same, turn by turn: microseconds per call in each."""
    graphs = {name: _captured(calls) for name, calls in kernels.items()}
    times: dict[Key, list[float]] = {name: [] for name in kernels}
    for _ in range(replays):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / len(kernels[name]))
    return times


def _captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def copies(nbytes: float) -> int:
    """How many sets of weights of `nbytes` to rotate through."""
    return max(4, int(ROTATED_BYTES / nbytes) + 1)


def copy_bandwidth() -> float:
    """Bytes per second that a kernel moves from one large tensor to another, read plus written.

    Not `copy_`: in a CUDA graph that is a copy node, which runs at two thirds of the speed.
    """
    source = torch.zeros(2**28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (time_calls([lambda: torch.neg(source, out=target)] * 4).us * 1e-6)


def random_weight(
    rows: int,
    columns: int,
    nbits: int,
    group_size: int = 64,
    *,
    codebook: bool = False,
    zero: bool = True,
    input_scale: bool = True,
    permutation: bool = False,
    device: str = DEVICE,
) -> QuantizedWeight:
    """A weight `[rows, columns]` of random codes, scales, zero points and t, made on the device itself."""
    groups = -(-columns // group_size)
    planes = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}[nbits]
    scale = (torch.rand(rows, groups, device=device) + 0.5) * 2.0**-nbits / columns**0.5 * 4
    zeros = torch.rand(rows, groups, device=device) * 2 + 2 ** (nbits - 1) - 1
    tail = (-columns) % 8  # unused bits of a row's last byte stay zero, as pack leaves them
    packed = [torch.randint(0, 256, (rows, -(-columns * w // 8)), dtype=torch.uint8, device=device) for w in planes]
    if tail:
        for plane, width in zip(packed, planes, strict=True):
            used = columns * width % 8
            if used:
                plane[:, -1] &= 2**used - 1
    return QuantizedWeight(
        (rows, columns),
        nbits,
        group_size,
        tuple(packed),
        Aux(scale.half()),
        Aux(zeros.half()) if zero and not codebook else None,
        (torch.randn(columns, device=device) * 0.3).exp().half() if input_scale else None,
        torch.randn(16, device=device).sort().values if codebook else None,
        torch.randperm(columns, device=device).int() if permutation else None,
    )


def relative_error(y: Tensor, x: Tensor, weight: QuantizedWeight) -> float:
    """||y - x W^T|| / ||x W^T|| against fp64; inf when y holds NaN or Inf."""
    reference = x.double() @ weight.dequantize().double().T
    error = float((y.double() - reference).norm() / reference.norm())
    return error if error == error else float("inf")
