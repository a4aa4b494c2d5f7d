"""Sufficient statistics of what a layer is handed, gathered while the calibration text streams by.

A Collector adds up one linear group's input. Fused experts are different: a block has hundreds of linear groups, each
read by its own share of the tokens, and their Hessians together would not fit (DeepSeek-V2.5: 160 experts of
5120^2 fp32, 17 GB a block). ExpertInputs therefore keeps the block's input once, with the routing, and adds up one
expert's statistics when that expert's turn to be quantized comes. It samples exactly what a Collector would.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from qbench.errors import PointError
from qbench.quant import gram
from qbench.quant.quantizer import InputStatistics, Statistic

INPUT_ROWS = 2048  # of the sample that scale searches use, spread evenly over all tokens
# An expert that fewer are routed to is calibrated on every token of its block. Measured at 3 bits on held-out tokens,
# with the MLPs of a small dense model standing for experts of clustered tokens: in seven of eight cases (GPTQ and AWQ,
# two layers, gate/up and down) 64 own tokens serve an expert as well as 8192 of all kinds or better, in five 8 do, and
# GPTQ's down of one layer wants 500. From 8 on, all of them beat rounding to nearest.
MIN_EXPERT_TOKENS = 64


class Collector:
    """Statistics of one group's input, `[..., in]` at a time, `tokens` in all."""

    def __init__(self, needs: frozenset[Statistic], columns: int, tokens: int, device: torch.device) -> None:
        self.tokens = 0
        self.stride = max(1, -(-tokens // INPUT_ROWS))
        self.absmean = torch.zeros(columns, device=device) if Statistic.INPUT_ABSMEAN in needs else None
        self.squares = torch.zeros(columns, device=device) if Statistic.INPUT_SQUARES in needs else None
        self.hessian = torch.zeros(columns, columns, device=device) if Statistic.HESSIAN in needs else None
        sample = -(-tokens // self.stride)
        self.rows = torch.empty(sample, columns, device=device) if Statistic.INPUTS in needs else None
        self.halved = False  # whether the Hessian lacks what is below its diagonal

    def __call__(self, input: Tensor) -> None:
        rows = input.reshape(-1, input.shape[-1])
        narrow = gram.narrow(rows)  # sums are then fp32 over what has 16 bits, and no copy in fp32 is made
        rows = rows if narrow else rows.float()
        if self.absmean is not None:
            self.absmean += _norm(rows, 1) if narrow else rows.abs().sum(0)
        if self.squares is not None:
            self.squares += _norm(rows, 2).square_() if narrow else rows.square().sum(0)
        if self.hessian is not None:
            gram.add(self.hessian, rows)
            self.halved = self.halved or narrow
        if self.rows is not None:
            every = rows[-self.tokens % self.stride :: self.stride]
            room = self.rows[-(-self.tokens // self.stride) :][: len(every)]  # less, if called more often than once
            room.copy_(every[: len(room)])
        self.tokens += len(rows)

    def statistics(self, name: str) -> InputStatistics:
        if self.tokens == 0:
            raise PointError(f"layer {name}: no calibration token reached it")
        if self.halved:
            self.hessian, self.halved = gram.complete(self.hessian), False
        return InputStatistics(
            tokens=self.tokens,
            absmean=None if self.absmean is None else self.absmean / self.tokens,
            inputs=None if self.rows is None else self.rows[: -(-self.tokens // self.stride)],
            hessian=self.hessian,
            squares=None if self.squares is None else self.squares / self.tokens,
        )


def _norm(rows: Tensor, order: int) -> Tensor:
    """The norm of every column of `[tokens, in]` in fp32, in one read of what is there."""
    return torch.linalg.vector_norm(rows, order, 0, dtype=torch.float32)


class ExpertInputs:
    """The input of a block of fused experts, `[tokens, hidden]` in the model's dtype, and where each token is routed.

    It is a hook: every call of the block adds the tokens and their routing. `of_first` and `of_down` compute one
    expert's statistics from them, when asked. Of experts that take their shares of the tokens (layers/expert_form.py)
    the shares are kept without their rows of zeros: k rows for a token. With `original`, an expert's down is
    calibrated on what the unquantized gate and up give out.

    Memory beside the input: the statistics of as many experts' groups as are quantized together, at most INPUT_ROWS
    of an expert's activations (gram.ROWS on a GPU), and, if some expert needs them, the statistics of all rows, once.
    """

    def __init__(self, needs: frozenset[Statistic], tokens: int, original: bool = False, experts: int = 1) -> None:
        self.needs, self.tokens, self.experts, self.original, self.seen = needs, tokens, experts, original, 0
        self.rows = 0  # of x that are filled

    def __call__(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> None:
        routing = (*routing, *named.values())
        if routing:
            x, index, tokens = hidden_states, routing[0], len(hidden_states)
        else:
            shares = hidden_states.reshape(self.experts, -1, hidden_states.shape[-1])
            expert, token = torch.where(shares.any(-1))
            x, index, tokens = shares[expert, token], expert[:, None], shares.shape[1]
        if self.seen == 0:
            room = self.tokens if routing else self.tokens * -(-len(x) // tokens)
            self.x = x.new_empty(room, x.shape[-1])
            self.routing = index.new_empty(room, index.shape[-1])
        stop = self.rows + len(x)
        self.x[self.rows : stop], self.routing[self.rows : stop] = x, index
        self.seen, self.rows = self.seen + tokens, stop

    def all_seen(self, name: str) -> ExpertInputs:
        """Itself; raises PointError unless every calibration token has come by."""
        if self.seen != self.tokens:
            raise PointError(f"layer {name}: {self.seen} of {self.tokens} calibration tokens reached its router")
        self.x, self.routing = self.x[: self.rows], self.routing[: self.rows]
        return self

    def serving(self, needs: frozenset[Statistic]) -> ExpertInputs:
        """The same inputs for a method of these needs; statistics of all tokens are computed for each anew."""
        own = copy.copy(self)
        own.needs = needs
        vars(own).pop("_everything", None)
        return own

    @cached_property
    def _sorted(self) -> tuple[Tensor, list[int]]:
        """Positions in x, expert after expert and in order within one, and where each expert's share ends."""
        routing = self.routing[: self.rows]
        ends = accumulate(torch.bincount(routing.flatten()).tolist())  # the one time that the host waits for the device
        return routing.flatten().argsort(stable=True) // routing.shape[-1], [0, *ends]

    def routed(self, expert: int) -> Tensor:
        """Positions in x of the tokens that are sent to this expert, int64 `[routed]`."""
        tokens, ends = self._sorted
        return tokens[slice(*ends[expert : expert + 2])] if expert + 1 < len(ends) else tokens[:0]

    def starved(self, expert: int) -> bool:
        """Whether too few tokens reach this expert for statistics of its own, and all tokens would say more."""
        return len(self.routed(expert)) < min(MIN_EXPERT_TOKENS, self.tokens)

    def of_first(self, expert: int) -> InputStatistics:
        """What gate and up read: the tokens routed to the expert, or all of them if it is starved."""
        return self._everything if self.starved(expert) else self._over(self.routed(expert), lambda x: x)

    def of_down(self, expert: int, activation: Callable[[Tensor], Tensor]) -> InputStatistics:
        """What it reads: `activation`, `[tokens, hidden]` -> `[tokens, intermediate]`, of the same tokens."""
        everyone = torch.arange(self.rows, device=self.x.device)
        return self._over(everyone if self.starved(expert) else self.routed(expert), activation)

    @cached_property
    def _everything(self) -> InputStatistics:
        return self._over(torch.arange(self.rows, device=self.x.device), lambda x: x)

    def _over(self, tokens: Tensor, activation: Callable[[Tensor], Tensor]) -> InputStatistics:
        collector: Collector | None = None
        for some in tokens.split(gram.ROWS if gram.narrow(self.x) else INPUT_ROWS):
            rows = activation(self.x[some])
            collector = collector or Collector(self.needs, rows.shape[-1], len(tokens), rows.device)
            collector(rows)
        assert collector is not None
        return collector.statistics("of an expert")
