"""Streams tensors from host memory to a device: the next batch travels while the current one is being used.

    host memory  --a thread-->  ring of pinned chunks  --a CUDA stream of its own-->  device

A GPU reads ordinary (pageable) memory slowly and never in the background. Pinning a whole model takes longer than
copying it, and memory that nothing else can use. So a thread copies chunk after chunk into a small pinned ring, from
which the GPU's copy engine fetches them. Neither waits for the kernels that run meanwhile, nor they for it. On an H200
with 32 cores the thread is the slower part: 22 to 28 GB/s, of 55 that PCIe 5 x16 carries (docs/performance.md).

The device holds, beside what is made there, the batch in use and `depth` more. Copies change no bit, so what is
computed from them is what would be without streaming. With a CPU as the device the same steps copy from host memory
to host memory, which is good for tests only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from types import TracebackType

import torch
from torch import Tensor

from qbench.errors import PointError

CHUNK_BYTES = 16 << 20
CHUNKS = 4

Batch = list[Tensor]
Fetch = Callable[[Iterable[Batch]], Iterator[Batch]]


@contextmanager
def fetching(device: torch.device, offloaded: bool) -> Iterator[Fetch]:
    """What brings batches of tensors to `device`, one ahead; batches that are not offloaded come as they are."""
    if not offloaded:
        yield iter
        return
    with Stream(device) as stream:
        yield stream.ahead


class Stream:
    """A pinned ring, a thread and a CUDA stream; several `ahead` may share it. Use it in a `with` statement."""

    def __init__(
        self, device: torch.device, depth: int = 1, chunk_bytes: int = CHUNK_BYTES, chunks: int = CHUNKS
    ) -> None:
        self.device, self.depth, self.chunk_bytes = device, depth, chunk_bytes
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None
        # each with the event after which it is free again
        self._ring: deque[tuple[Tensor, torch.cuda.Event | None]] = deque(
            (torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=cuda), None) for _ in range(chunks)
        )
        self._thread = ThreadPoolExecutor(1, "qbench-stream")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._stream is not None:
            self._stream.synchronize()  # nothing may arrive in memory that is given back by now

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields every batch, in order, once its tensors' `data` lie on the device.

        They are moved in place, so a module whose parameters are given has moved; a detached view moves alone and
        leaves its owner where it is. Tensors outside of host memory stay. `batches` is read `depth` ahead, and nothing
        of a batch is kept once it is yielded. Raises PointError when the device has no room.
        """
        source = iter(batches)
        coming = deque(self._start(batch) for batch in islice(source, self.depth))
        while coming:
            ready = [self._arrive(*coming.popleft())]
            coming.extend(self._start(batch) for batch in islice(source, 1))
            yield ready.pop()  # a reference kept here would hold the batch in memory until the next one

    def _start(self, batch: Batch) -> tuple[Batch, list[tuple[Tensor, Tensor]], Future]:
        moving = [tensor for tensor in batch if tensor.device.type == "cpu"]
        try:
            # here, not in the thread: memory belongs to the stream that it is allocated on, and this one will use it
            pairs = [(t, torch.empty(t.shape, dtype=t.dtype, device=self.device)) for t in moving]
        except RuntimeError as error:
            raise self._failed(moving, error) from error
        if self._stream is not None:
            # that memory may have been given back with work on it still queued
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return batch, pairs, self._thread.submit(self._copy, pairs)

    def _arrive(self, batch: Batch, pairs: list[tuple[Tensor, Tensor]], copied: Future) -> Batch:
        try:
            event = copied.result()
        except RuntimeError as error:
            raise self._failed([tensor for tensor, _ in pairs], error) from error
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        for tensor, copy in pairs:
            tensor.data = copy
        return batch

    def _copy(self, pairs: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        """Runs in the thread; returns the event after which all copies are complete."""
        with torch.cuda.stream(self._stream):
            for tensor, copy in pairs:
                step = self.chunk_bytes // tensor.itemsize
                parts = tensor.detach().reshape(-1).split(step)
                for part, target in zip(parts, copy.view(-1).split(step), strict=True):
                    pinned, free = self._ring.popleft()
                    if free is not None:
                        free.synchronize()
                    staged = pinned[: part.nbytes].view(part.dtype)
                    staged.copy_(part)
                    target.copy_(staged, non_blocking=True)
                    self._ring.append((pinned, self._event()))
            return self._event()

    def _event(self) -> torch.cuda.Event | None:
        return None if self._stream is None else self._stream.record_event()

    def _failed(self, tensors: Batch, error: RuntimeError) -> PointError:
        size = sum(tensor.nbytes for tensor in tensors) / 1e6
        reason = str(error).strip().partition("\n")[0]
        return PointError(f"the next weights, {size:.1f} MB, cannot be brought to {self.device}: {reason}")
