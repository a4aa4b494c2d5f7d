"""Brings a source's blocks one after the other: the next one is read while one is in use, and no third one exists.

On a GPU, reading, copying and converting go through a stream of their own. Memory is handed from one stream to the
other by events, not by waiting: the next block's stream waits until the kernels that use the last one are through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn


def ahead(
    block: Callable[[int], nn.Module], numbers: Iterable[int], device: torch.device
) -> Iterator[tuple[int, nn.Module]]:
    """Yields (i, block i), its weights on `device`, for every number; `block` is a stream's, called in one thread.

    A block's weights are given back when the next one is asked for: the module is on the meta device from then on. A
    tensor of it that is kept must not be used after that, only let go. What `block` raises is raised at its turn. Close
    the iterator (contextlib.closing) where a loop may be left early, so that its thread ends at once.
    The blocks of a resident stream are not for it: they are the model's own, and nobody may give them back.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def load(i: int, free: torch.cuda.Event | None) -> tuple[nn.Module, torch.cuda.Event | None]:
        with torch.cuda.stream(side), torch.no_grad():
            if free is not None:
                side.wait_event(free)
            return block(i), _event(side)

    todo = iter(numbers)
    with ThreadPoolExecutor(1, "qbench-ahead") as pool:
        number, used = next(todo, None), None
        coming = None if number is None else pool.submit(load, number, None)
        while coming is not None:
            module, ready = coming.result()
            if used is not None:
                used.to("meta")  # not before: the thread would take that memory while kernels still read it
            if ready is not None:
                torch.cuda.current_stream(device).wait_event(ready)
            following = next(todo, None)
            free = _event(torch.cuda.current_stream(device) if side is not None else None)
            coming = None if following is None else pool.submit(load, following, free)
            yield number, module
            number, used = following, module


def _event(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    return None if stream is None else stream.record_event()
