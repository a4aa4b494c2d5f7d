"""What one block is shown: the statistics of each linear group's input, over all calibration sequences.

All statistics of a block are taken before any of its linears is quantized, in one pass over the sequences. Linears that
read the very same tensor (q/k/v; gate/up) form a group; that is observed, not listed per architecture. Linears that no
sequence reaches (of an expert that is an nn.Module of its own) stay in 16 bit.

A CPU takes sequence after sequence, a GPU as many at a time as BATCH_TOKENS hold.

Memory: the hidden states of all sequences at one depth, tokens x hidden, and the statistics of one block (a Hessian is
in x in in fp32, the sample of inputs at most INPUT_ROWS x in). Activations inside a block live for one batch at a
time. A block with fused experts adds tokens x hidden for their input, whatever their number, and the statistics of one
expert (collect.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbench.model.linears import matrix
from qbench.passes.chain import Chain
from qbench.passes.collect import Collector, ExpertInputs
from qbench.quant.quantizer import Statistic

Group = dict[str, nn.Module]
Run = Callable[[int, Tensor], Tensor]  # a batch's number and its states `[rows, tokens, hidden]` -> those after

BATCH_TOKENS = {"cpu": 1, "cuda": 16384}  # of one run through a block, or one sequence: enough to keep a GPU busy


@dataclass
class Collected:
    """The linear groups and fused experts of one block, in the block's order, each with what it was handed.

    `unreached` are the linears that no sequence reaches, and how many weights each has.
    """

    groups: list[tuple[Group, Collector]]
    experts: dict[str, ExpertInputs]
    unreached: dict[str, int]


class Shown:
    """The calibration sequences at the depth that has been reached; `[rows, tokens, hidden]` a batch.

    With `original`, blocks are shown what the blocks before them gave out unquantized.
    """

    def __init__(self, chain: Chain, ids: np.ndarray, needs: frozenset[Statistic], original: bool) -> None:
        """`ids` is int64 `[sequences, window]`. Raises NotAChainError when the chain does not hold for them."""
        device = chain.model.device
        rows = max(1, BATCH_TOKENS[device.type] // ids.shape[1])
        begun = [chain.begin(batch) for batch in torch.from_numpy(ids).to(device).split(rows)]
        self.hidden, self.calls = [states for states, _ in begun], [handed for _, handed in begun]
        self.needs, self.original = needs, original

    def collect(
        self, i: int, block: nn.Module, layers: dict[str, nn.Module], experts: dict[str, nn.Module]
    ) -> Collected:
        """What block `i`, whose linears and fused experts are given by name, is handed; before it is quantized."""
        return collect(self._through(i, block), self.hidden, layers, experts, self.needs, self.original)

    def go_on(self, i: int, block: nn.Module) -> None:
        """To the next block, through block `i` as it is quantized; those that go on unquantized are there already.

        Nothing is shown what the last block gives out.
        """
        if not self.original and i + 1 < len(self.calls[0]):
            run = self._through(i, block)
            for j, states in enumerate(self.hidden):
                self.hidden[j] = run(j, states)

    def _through(self, i: int, block: nn.Module) -> Run:
        return lambda j, states: self.calls[j][i].run(block, states)


def collect(
    run: Run,
    hidden: list[Tensor],
    layers: dict[str, nn.Module],
    experts: dict[str, nn.Module],
    needs: frozenset[Statistic],
    original: bool,
) -> Collected:
    """Sends all sequences through a block, `run`, whose linears and fused experts are given by name.

    With `original`, what the block gives out replaces the states in `hidden`, one batch at a time, so that they exist
    once. Without, nobody asks for it: a batch stops when the last linear has been handed its input, if in the first
    batch each was called once. A mixture's experts are then not multiplied at all.
    """
    tokens = sum(states.shape[0] * states.shape[1] for states in hidden)
    collectors: list[Collector] = []
    inputs = {name: ExpertInputs(needs, tokens, original, module.num_experts) for name, module in experts.items()}
    found = Collected([], inputs, {})

    # closes over no `reading`: a cycle would keep all statistics until the garbage collector comes by
    def take(place: int, layer: nn.Module, input: Tensor) -> None:
        if place == len(collectors):
            collectors.append(Collector(needs, matrix(layer).shape[1], tokens, layer.weight.device))
        collectors[place](input)

    reading = Reading(layers, take)
    calls: Counter[str] = Counter()
    left: set[str] | None = None  # those that this batch is to reach before it stops; None: it goes on to the end

    def seeing(name: str, see: Callable[..., None]) -> Callable[..., None]:
        def note(*args: Any, **kwargs: Any) -> None:
            see(*args, **kwargs)
            calls[name] += 1
            if left is not None:
                left.discard(name)
                if not left:
                    raise _EnoughError

        return note

    watched = [(layer, seeing(name, reading.of(name))) for name, layer in layers.items()]
    watched += [(module, seeing(name, inputs[name])) for name, module in experts.items()]
    with hooks(watched):
        for j, states in enumerate(hidden):
            reading.seen.clear()
            once = j > 0 and not original and all(calls[name] == j for name in (*layers, *experts))
            left = {*layers, *experts} if once else None
            with suppress(_EnoughError):
                output = run(j, states)
                if original:
                    hidden[j] = output
    reading.seen.clear()
    found.groups = list(zip(reading.groups, collectors, strict=True))
    found.unreached = {name: layer.weight.numel() for name, layer in layers.items() if name not in reading.place}
    return found


class _EnoughError(Exception):
    """The block has been handed all that was to be seen; the rest of it is not needed."""


class Reading:
    """Groups the linears `wanted` by the tensor they read, in the order in which they are called.

    `take` is told of the first linear of a group and of every tensor that it is handed, after its place in `groups`. A
    linear that only a later batch reaches joins no group but one that begins there too. `seen` is to be cleared after
    every batch.
    """

    def __init__(
        self, wanted: dict[str, nn.Module], take: Callable[[int, nn.Module, Tensor], None] | None = None
    ) -> None:
        self.wanted, self.take = wanted, take
        self.groups: list[Group] = []
        self.place: dict[str, int | None] = {}  # of the group that a linear is the first of; None: it is another's
        self.seen: list[tuple[Tensor, Group]] = []  # held, so that no tensor takes another's place in memory

    def of(self, name: str) -> Callable[[Tensor], None]:
        """What notes the input of the linear of that name."""

        def note(input: Tensor) -> None:
            if name not in self.place:
                self.place[name] = self._begin(name, input)
            if self.take is not None and (place := self.place[name]) is not None:
                self.take(place, self.wanted[name], input)

        return note

    def _begin(self, name: str, input: Tensor) -> int | None:
        for tensor, group in self.seen:
            if tensor is input:
                group[name] = self.wanted[name]
                return None
        self.groups.append({name: self.wanted[name]})
        self.seen.append((input, self.groups[-1]))
        return len(self.groups) - 1


@contextmanager
def hooks(watched: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Calls each function with the arguments of every call of its module, before it runs."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], *, see: Callable[..., None]) -> None:
        see(*args, **kwargs)

    handles = [m.register_forward_pre_hook(partial(hook, see=see), with_kwargs=True) for m, see in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
