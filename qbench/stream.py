"""Streams tensors from host memory to a device: the next batch travels while the current one is being used.

    host memory  --a few threads-->  ring of pinned chunks  --a CUDA stream of its own-->  device

A GPU reads ordinary (pageable) memory slowly and never in the background. Pinning a whole model takes longer than
copying it, and memory that nothing else can use. So threads copy chunk after chunk into a small pinned ring, from
which the GPU's copy engine fetches them. Neither waits for the kernels that run meanwhile, nor they for it.

Filling is the slower part. With one chunk at a time, by a `copy_` that splits it over all cores and waits for the last
of them, it went at 22 GB/s on an H200 with 32 cores, of 55 that PCIe 5 x16 carries (docs/performance.md). Hence a chunk
of its own for each of several threads, none of which waits for another.

The device holds, beside what is made there, the batch in use and `depth` more. Copies change no bit, so what is
computed from them is what would be without streaming. With a CPU as the device the same steps copy from host memory
to host memory, which is good for tests only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import chain, islice
from queue import SimpleQueue
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from qbench.errors import PointError

CHUNK_BYTES = 4 << 20  # a matrix of 4096 x 4096 in 16 bits has one for each of eight threads
CHUNKS = 16
MOST_FILLERS = 8

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


def default_fillers() -> int:
    """Half of the threads that torch may use here; the others are for what is computed meanwhile."""
    return min(MOST_FILLERS, max(1, torch.get_num_threads() // 2))


class Stream:
    """A pinned ring, threads and a CUDA stream; several `ahead` may share it. Use it in a `with` statement.

    `fillers` threads fill the ring; None stands for `default_fillers()`. A tensor of up to `chunk_bytes` is not split.
    """

    def __init__(
        self,
        device: torch.device,
        depth: int = 1,
        chunk_bytes: int = CHUNK_BYTES,
        chunks: int = CHUNKS,
        fillers: int | None = None,
    ) -> None:
        self.device, self.depth, self.chunk_bytes = device, depth, chunk_bytes
        self.fillers = fillers or default_fillers()
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None
        # each with the event after which it is free again
        self._ring: SimpleQueue[tuple[Tensor, torch.cuda.Event | None]] = SimpleQueue()
        for _ in range(chunks):
            pinned = torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=cuda)
            self._ring.put((pinned, torch.cuda.Event() if cuda else None))
        self._thread = ThreadPoolExecutor(1, "qbench-stream")  # batch after batch, cut into chunks for the fillers
        self._pool = ThreadPoolExecutor(
            self.fillers,
            "qbench-stream-filler",
            initializer=torch.cuda.set_stream,  # theirs from then on; None changes nothing
            initargs=(self._stream,),
        )

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._pool.shutdown()  # idle by now: a batch in the thread has waited for its chunks
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
            yield ready.pop()  # popped: the caller says how long it lives

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
        sources = (tensor.detach().reshape(-1).view(torch.uint8).split(self.chunk_bytes) for tensor, _ in pairs)
        targets = (copy.view(-1).view(torch.uint8).split(self.chunk_bytes) for _, copy in pairs)
        # of a list, whose iterator hands every chunk to one filler only
        chunks = iter(list(zip(chain(*sources), chain(*targets), strict=True)))
        filling = [self._pool.submit(self._fill_each, chunks) for _ in range(self.fillers)]
        wait(filling)  # for all of them, so that nothing of a batch that fails is still on its way
        for filled in filling:
            filled.result()
        return None if self._stream is None else self._stream.record_event()

    def _fill_each(self, chunks: Iterator[tuple[Tensor, Tensor]]) -> None:
        for part, target in chunks:
            self._fill(part, target)

    def _fill(self, part: Tensor, target: Tensor) -> None:
        """Runs in a filler: brings one chunk to the device, through that of the ring which has waited the longest."""
        pinned, free = self._ring.get()
        try:
            if free is not None:
                free.synchronize()
            staged = pinned[: len(part)]
            np.copyto(staged.numpy(), part.numpy())  # in this thread alone, unlike torch's copy_, and without the GIL
            target.copy_(staged, non_blocking=True)
            if free is not None:
                free.record(self._stream)
        finally:
            self._ring.put((pinned, free))  # after a failure too: other fillers wait for it

    def _failed(self, tensors: Batch, error: RuntimeError) -> PointError:
        size = sum(tensor.nbytes for tensor in tensors) / 1e6
        reason = str(error).strip().partition("\n")[0]
        return PointError(f"the next weights, {size:.1f} MB, cannot be brought to {self.device}: {reason}")
