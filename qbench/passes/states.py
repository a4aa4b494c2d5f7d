"""The hidden states of all tokens at one depth, in batches: on the device while there is room, else in host memory.

What waits in host memory is pinned, and travels beside the work: while one batch goes through a block, the next is on
its way in and the one before on its way out, each on a CUDA stream of its own. At 16,384 tokens a batch, a block of an
8B model computes for longer than the copies take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import psutil
import torch
from torch import Tensor

from qbench.errors import RequestError

KEEP_FREE_BYTES = 4 << 30  # of a GPU, for logits and for what runs inside a block
BLOCKS = 4  # the original's, the next one, a variant's, and what is dequantized of it

Run = Callable[[int, Tensor], Tensor]  # a batch's number and its states `[rows, tokens, hidden]` -> those after


class States:
    """Of one variant, or of the original. Variants begin with one and the same tensors: none is written in place."""

    def __init__(self, batches: Iterable[Tensor], device: torch.device, on_host: bool = False) -> None:
        self.device, self.on_host = device, on_host and device.type == "cuda"
        self.shared = False  # with another's: what is run on them may not write into them
        self._held = [self._put_away(states) for states in batches]
        if self.on_host:
            torch.cuda.current_stream(device).synchronize()
            self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    @classmethod
    def like(cls, other: States) -> States:
        """The same states for another variant; they cost nothing until they go through its first block."""
        new = cls((), other.device, other.on_host)
        new.shared = other.shared = True
        new._held = list(other._held)
        return new

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, b: int) -> Tensor:
        """Batch `b` on the device."""
        return self._held[b].to(self.device)

    @property
    def nbytes(self) -> int:
        return sum(states.nbytes for states in self._held)

    def through(self, run: Run) -> int | None:
        """Sends every batch through `run`; returns the first one that holds NaN or Inf after it, or None."""
        finite = [self._send(run, b) for b in range(len(self))] if not self.on_host else self._stream(run)
        self.shared = False
        flags = torch.stack(finite).cpu()
        return None if flags.all() else int((~flags).nonzero()[0])

    def _send(self, run: Run, b: int) -> Tensor:
        self._held[b] = run(b, self._held[b])
        return torch.isfinite(self._held[b]).all()

    def _stream(self, run: Run) -> list[Tensor]:
        here, finite = torch.cuda.current_stream(self.device), []
        coming = self._bring(0)
        for b in range(len(self)):
            states, arrived = coming
            here.wait_event(arrived)
            if b + 1 < len(self):
                coming = self._bring(b + 1)
            states.record_stream(here)
            after = run(b, states)
            finite.append(torch.isfinite(after).all())
            self._out.wait_stream(here)
            with torch.cuda.stream(self._out):
                self._held[b] = self._put_away(after)
            after.record_stream(self._out)
            del states, after
        self._out.synchronize()
        return finite

    def _bring(self, b: int) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self._in):
            return self._held[b].to(self.device, non_blocking=True), self._in.record_event()

    def _put_away(self, states: Tensor) -> Tensor:
        if not self.on_host or not states.is_cuda:
            return states
        # torch keeps pinned memory that is freed, so from the second block on this asks the system for none
        return torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states, non_blocking=True)


def wait_on_host(tokens: int, hidden: int, itemsize: int, copies: int, block_bytes: int, device: torch.device) -> bool:
    """Whether `copies` of all hidden states have to wait in host memory; False for a CPU, where there is no other.

    Raises RequestError when they fit nowhere.
    """
    needed = tokens * hidden * itemsize * (copies + 1)  # one more, since a batch comes out before it is put away
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if needed <= free - KEEP_FREE_BYTES - BLOCKS * block_bytes:
            return False
    available = psutil.virtual_memory().available
    if needed > available:
        raise RequestError(
            f"the hidden states of {tokens} tokens in {copies} variants take {needed / 1e9:.1f} GB, this machine has "
            f"{available / 1e9:.1f} GB free; use task.max_windows for fewer tokens, or fewer variants at a time"
        )
    return device.type == "cuda"
