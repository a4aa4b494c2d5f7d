"""Calibration: what each linear group's input looks like, streamed block by block through the model.

The decoder blocks are visited in order. Of one block the statistics that the method needs are collected in one pass
over all calibration sequences, its linears are quantized, and the sequences are sent on through the quantized block:
every layer is calibrated on what it will really see. Linears that are handed the very same tensor (q/k/v; gate/up)
form a group; that is observed, not listed per architecture. The attention mask is the one the model itself makes.

Memory beside the model: the hidden states of all sequences at one depth, tokens x hidden, and the statistics of one
block (a Hessian is in x in in fp32, the sample of inputs at most INPUT_ROWS x in). Activations inside a block live for
one sequence at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qbench.config import CalibrationConfig
from qbench.errors import PointError, RequestError
from qbench.evaluate.text import Text
from qbench.models.linears import find_linears
from qbench.quant.quantizer import InputStatistics, Quantizer, Statistic

INPUT_ROWS = 2048  # of the sample that scale searches use, spread evenly over all tokens


@dataclass(frozen=True)
class Calibration:
    """Token ids, int64 `[sequences, window]`: the same for every calibrated method."""

    ids: np.ndarray
    source: str
    text_sha256: str

    @property
    def token_ids_sha256(self) -> str:
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()


def cut_sequences(text: Text, tokenizer: Any, config: CalibrationConfig) -> Calibration:
    """Tokenizes once and cuts from the start; raises RequestError when the text fills no sequence."""
    if config.window < 2 or (config.sequences is not None and config.sequences < 1):
        raise RequestError("calibration.window must be at least 2 and calibration.sequences at least 1, or null")
    ids = np.asarray(tokenizer(text.content, verbose=False)["input_ids"], dtype=np.int64)
    count = ids.size // config.window
    if count == 0:
        raise RequestError(
            f"the calibration text {text.source} has {ids.size} tokens, less than one sequence of {config.window}; "
            "use a longer text or a smaller calibration.window"
        )
    count = min(count, config.sequences or count)
    return Calibration(ids[: count * config.window].reshape(count, config.window), text.source, text.sha256)


Group = dict[str, nn.Linear]
QuantizeGroup = Callable[[Group, InputStatistics], None]


@torch.no_grad()
def quantize_blocks(model: Any, quantizer: Quantizer, calibration: Calibration, quantize: QuantizeGroup) -> None:
    """Calls `quantize` with every linear group and its statistics, in the model's order; it replaces the layers.

    Raises PointError for a model whose blocks cannot be found, or linears outside of them.
    """
    blocks = decoder_blocks(model)
    hidden, kwargs = _first_inputs(model, blocks[0][1], calibration)
    for name, block in tqdm(blocks, desc="calibrating", unit="block"):
        groups = linear_groups(block, name, model, hidden[0], kwargs)
        collectors = [Collector(quantizer.needs, next(iter(g.values())), calibration.ids.size) for g in groups]
        with _hooks([(next(iter(g.values())), c) for g, c in zip(groups, collectors, strict=True)]):
            for states in hidden:
                _forward(block, states, kwargs)
        for group, collector in zip(groups, collectors, strict=True):
            quantize(group, collector.statistics(next(iter(group))))
        del collectors
        hidden = [_forward(block, states, kwargs) for states in hidden]


def decoder_blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """The blocks that follow each other, by name: the ModuleList that holds every linear to quantize."""
    names = list(find_linears(model).layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and names and all(n.startswith(f"{name}.") for n in names):
            return [(f"{name}.{i}", block) for i, block in enumerate(module)]
    raise PointError(f"{type(model).__name__}: no list of decoder blocks holds all linear layers; cannot calibrate it")


def linear_groups(block: nn.Module, prefix: str, model: Any, states: Tensor, kwargs: dict[str, Any]) -> list[Group]:
    """Groups the block's linears by the tensor they read, in the order in which they are called."""
    wanted = {n: m for n, m in find_linears(model).layers.items() if n.startswith(f"{prefix}.")}
    seen: list[tuple[Tensor, Group]] = []  # holding the tensors keeps one from taking another's place in memory

    def watch(name: str) -> Callable[[nn.Linear, Tensor], None]:
        def note(layer: nn.Linear, x: Tensor) -> None:
            for tensor, group in seen:
                if tensor is x:
                    group[name] = layer
                    return
            seen.append((x, {name: layer}))

        return note

    with _hooks([(layer, watch(name)) for name, layer in wanted.items()]):
        _forward(block, states, kwargs)
    called = [name for _, group in seen for name in group]
    if missing := set(wanted) - set(called):
        raise PointError(f"layer {sorted(missing)[0]} was not used by the calibration text; cannot calibrate it")
    return [group for _, group in seen]


class Collector:
    """Sufficient statistics of one group's input, `[..., in]` at a time."""

    def __init__(self, needs: frozenset[Statistic], layer: nn.Linear, tokens: int) -> None:
        columns, device = layer.in_features, layer.weight.device
        self.tokens = 0
        self.stride = max(1, -(-tokens // INPUT_ROWS))
        self.absmean = torch.zeros(columns, device=device) if Statistic.INPUT_ABSMEAN in needs else None
        self.hessian = torch.zeros(columns, columns, device=device) if Statistic.HESSIAN in needs else None
        self.rows: list[Tensor] | None = [] if Statistic.INPUTS in needs else None

    def __call__(self, layer: nn.Linear, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        if self.absmean is not None:
            self.absmean += rows.abs().sum(0)
        if self.hessian is not None:
            self.hessian.addmm_(rows.T, rows)
        if self.rows is not None:
            start = -self.tokens % self.stride
            self.rows.append(rows[start :: self.stride].clone())
        self.tokens += len(rows)

    def statistics(self, name: str) -> InputStatistics:
        if self.tokens == 0:
            raise PointError(f"layer {name}: no calibration token reached it")
        return InputStatistics(
            tokens=self.tokens,
            absmean=None if self.absmean is None else self.absmean / self.tokens,
            inputs=None if self.rows is None else torch.cat(self.rows),
            hessian=self.hessian,
        )


@contextmanager
def _hooks(watched: list[tuple[nn.Linear, Callable[[nn.Linear, Tensor], None]]]) -> Iterator[None]:
    handles = [
        layer.register_forward_pre_hook(lambda module, args, see=see: see(module, args[0])) for layer, see in watched
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ReachedFirstBlockError(Exception):
    """The first block has been handed its input; the rest of the forward pass is not needed."""


def _first_inputs(model: Any, block: nn.Module, calibration: Calibration) -> tuple[list[Tensor], dict[str, Any]]:
    """What the first block is handed: hidden states `[1, window, hidden]` per sequence, and the shared arguments."""
    hidden: list[Tensor] = []
    shared: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs.pop("hidden_states")
        hidden.append(states)
        shared.update({k: v for k, v in kwargs.items() if k != "hidden_states"})
        raise _ReachedFirstBlockError

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for ids in calibration.ids:
            try:
                model(torch.from_numpy(ids)[None].to(model.device), use_cache=False)
            except _ReachedFirstBlockError:
                continue
    finally:
        handle.remove()
    return hidden, shared


def _forward(block: nn.Module, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    out = block(states, **kwargs)
    return out[0] if isinstance(out, tuple) else out
