"""What one block is shown: the statistics of each linear group's input, over all calibration sequences.

All statistics of a block are taken before any of its linears is quantized, in one pass over the sequences. Linears that
read the very same tensor (q/k/v; gate/up) form a group; that is observed, not listed per architecture. Linears that no
sequence reaches (of an expert that is an nn.Module of its own) stay in 16 bit.

Memory: the hidden states of all sequences at one depth, tokens x hidden, and the statistics of one block (a Hessian is
in x in in fp32, the sample of inputs at most INPUT_ROWS x in). Activations inside a block live for one sequence at a
time. A block with fused experts adds tokens x hidden for their input, whatever their number, and the statistics of one
expert (collect.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
Run = Callable[[int, Tensor], Tensor]  # a sequence's number and its states `[1, tokens, hidden]` -> those after


@dataclass
class Collected:
    """The linear groups and fused experts of one block, in the block's order, each with what it was handed.

    `unreached` are the linears that no sequence reaches, and how many weights each has.
    """

    groups: list[tuple[Group, Collector]]
    experts: dict[str, ExpertInputs]
    unreached: dict[str, int]


class Shown:
    """The calibration sequences at the depth that has been reached; `[1, tokens, hidden]` each.

    With `original`, blocks are shown what the blocks before them gave out unquantized.
    """

    def __init__(self, chain: Chain, ids: np.ndarray, needs: frozenset[Statistic], original: bool) -> None:
        """`ids` is int64 `[sequences, window]`. Raises NotAChainError when the chain does not hold for them."""
        begun = [chain.begin(torch.from_numpy(sequence)[None].to(chain.model.device)) for sequence in ids]
        self.hidden, self.calls = [states for states, _ in begun], [handed for _, handed in begun]
        self.needs, self.original = needs, original

    def collect(
        self, i: int, block: nn.Module, layers: dict[str, nn.Module], experts: dict[str, nn.Module]
    ) -> Collected:
        """What block `i`, whose linears and fused experts are given by name, is handed; before it is quantized."""
        return collect(self._through(i, block), self.hidden, layers, experts, self.needs, self.original)

    def go_on(self, i: int, block: nn.Module) -> None:
        """To the next block, through block `i` as it is quantized; those that go on unquantized are there already."""
        if not self.original:
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

    With `original`, what the block gives out replaces the states in `hidden`, one sequence at a time, so that they
    exist once.
    """
    tokens = sum(states.shape[0] * states.shape[1] for states in hidden)
    found = Collected([], {}, {})
    watched: list[tuple[nn.Module, Callable[..., None]]] = []
    for group in linear_groups(run, hidden, layers):
        first = next(iter(group.values()))
        found.groups.append((group, Collector(needs, matrix(first).shape[1], tokens, first.weight.device)))
        watched.append((first, found.groups[-1][1]))
    for name, module in experts.items():
        found.experts[name] = ExpertInputs(needs, tokens, original, module.num_experts)
        watched.append((module, found.experts[name]))
    with hooks(watched):
        for j, states in enumerate(hidden):
            output = run(j, states)
            if original:
                hidden[j] = output
    reached = {name for group, _ in found.groups for name in group}
    found.unreached = {name: layer.weight.numel() for name, layer in layers.items() if name not in reached}
    return found


def linear_groups(run: Run, hidden: list[Tensor], wanted: dict[str, nn.Module]) -> list[Group]:
    """Groups the linears `wanted` by the tensor they read, in the order in which they are called.

    As many sequences are looked at as it takes to see each of them, all if need be.
    """
    groups: list[Group] = []
    left = dict(wanted)

    def watch(name: str, seen: list[tuple[Tensor, Group]]) -> Callable[[Tensor], None]:
        def note(input: Tensor) -> None:
            if left.pop(name, None) is None:
                return  # called again, as a block does that is gone through twice
            for tensor, group in seen:
                if tensor is input:
                    group[name] = wanted[name]
                    return
            seen.append((input, {name: wanted[name]}))

        return note

    for j, states in enumerate(hidden):
        if not left:
            break
        seen: list[tuple[Tensor, Group]] = []  # holding the tensors keeps one from taking another's place in memory
        with hooks([(layer, watch(name, seen)) for name, layer in list(left.items())]):
            run(j, states)
        groups += [group for _, group in seen]
    return groups


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
