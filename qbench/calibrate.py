"""Calibration: what each linear group's input looks like, streamed block by block through the model.

The decoder blocks are visited in order. Of one block the statistics that the method needs are collected in one pass
over all calibration sequences, and its linears are quantized. `calibration.inputs` says what the next block is shown:

    quantized   what the block gives out now that it is quantized, in a second pass: each block is calibrated on what it
                will really see (GPTQ's own code does this)
    original    what the block gave out in the first pass, unquantized: no block's choices depend on those of another
                (AWQ's and A-SINQ's own code)

Within a block all linears are shown what its unquantized ones hand them, either way. Linears that are handed the very
same tensor (q/k/v; gate/up) form a group; that is observed, not listed per architecture. The attention mask is the one
the model itself makes.

Memory beside the model: the hidden states of all sequences at one depth, tokens x hidden, and the statistics of one
block (a Hessian is in x in in fp32, the sample of inputs at most INPUT_ROWS x in). Activations inside a block live for
one sequence at a time. A block with fused experts adds tokens x hidden for their input, whatever their number, and the
statistics of one expert (collect.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qbench.collect import Collector, ExpertInputs
from qbench.config import CalibrationConfig
from qbench.errors import PointError, RequestError, unknown
from qbench.evaluate.text import Text, most_tokens
from qbench.models.linears import find_linears
from qbench.models.offload import runs_offloaded
from qbench.quant.quantizer import InputStatistics, Quantizer, Statistic
from qbench.stream import fetching

INPUTS = ("quantized", "original")


@dataclass(frozen=True)
class Calibration:
    """Token ids, int64 `[sequences, window]`: the same for every calibrated method."""

    ids: np.ndarray
    source: str
    text_sha256: str
    inputs: str = "quantized"  # one of INPUTS

    @property
    def token_ids_sha256(self) -> str:
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()


def check(text: Text, config: CalibrationConfig) -> None:
    """Raises RequestError, before any tokenizer is loaded, for settings or a text that no tokenizer could make do."""
    if config.window < 2 or (config.sequences is not None and config.sequences < 1):
        raise RequestError("calibration.window must be at least 2 and calibration.sequences at least 1, or null")
    if config.inputs not in INPUTS:
        raise unknown("calibration.inputs", config.inputs, INPUTS)
    if len(text.content) < config.window:  # a byte a character at the least
        _full_sequences(most_tokens(text.content), text, config, "at most ")


def cut_sequences(text: Text, tokenizer: Any, config: CalibrationConfig) -> Calibration:
    """Tokenizes once and cuts from the start; raises RequestError when the text fills no sequence."""
    ids = np.asarray(tokenizer(text.content, verbose=False)["input_ids"], dtype=np.int64)
    full = _full_sequences(ids.size, text, config)
    count = min(full, config.sequences or full)
    cut = ids[: count * config.window].reshape(count, config.window)
    return Calibration(cut, text.source, text.sha256, config.inputs)


def _full_sequences(tokens: int, text: Text, config: CalibrationConfig, at_most: str = "") -> int:
    """How many sequences the tokens fill; raises RequestError for none."""
    full = tokens // config.window
    if full == 0:
        raise RequestError(
            f"the calibration text {text.source} has {at_most}{tokens} tokens, less than one sequence of "
            f"{config.window}; use a longer text or a smaller calibration.window"
        )
    return full


Group = dict[str, nn.Linear]
QuantizeGroup = Callable[[Group, InputStatistics], None]
QuantizeExperts = Callable[[str, nn.Module, ExpertInputs], None]


@torch.no_grad()
def quantize_blocks(
    model: Any,
    quantizer: Quantizer,
    calibration: Calibration,
    quantize: QuantizeGroup,
    quantize_experts: QuantizeExperts,
    offloaded: bool = False,
) -> None:
    """Hands every linear group and every module of fused experts, with its statistics, to one of the functions.

    In the model's order, within a block first the linears; the functions replace the layers. Of an offloaded model,
    the weights of one block are brought to the device while those of the block before are quantized.
    Raises PointError for a model whose blocks cannot be found, or linears outside of them.
    """
    original = calibration.inputs == "original"
    blocks = decoder_blocks(model)
    with runs_offloaded(model, offloaded):
        hidden, arguments = _first_inputs(model, [block for _, block in blocks], calibration)
    with fetching(model.device, offloaded) as fetch:
        arrivals = fetch(_weights(model, name) for name, _ in blocks)
        for (name, block), kwargs in zip(tqdm(blocks, desc="calibrating", unit="block"), arguments, strict=True):
            next(arrivals)
            groups, experts = _collect(model, name, block, hidden, kwargs, quantizer.needs, original)
            while groups:
                group, collector = groups.pop(0)
                quantize(group, collector.statistics(next(iter(group))))
                del group, collector  # no second layer's original and no statistics outlive their turn
            while experts:
                expert_name, inputs = experts.popitem()
                quantize_experts(expert_name, model.get_submodule(expert_name), inputs.all_seen(expert_name))
                del inputs
            if not original:
                for i in range(len(hidden)):
                    hidden[i] = _forward(block, hidden[i], kwargs)


def _weights(model: Any, prefix: str) -> list[Tensor]:
    """The parameters of the block's linears and fused experts: what an offloaded model keeps in host memory."""
    found = find_linears(model)
    modules = {n: m for n, m in (found.layers | found.experts).items() if n.startswith(f"{prefix}.")}
    return [parameter for module in modules.values() for parameter in module.parameters()]


def _collect(
    model: Any,
    prefix: str,
    block: nn.Module,
    hidden: list[Tensor],
    kwargs: dict[str, Any],
    needs: frozenset[Statistic],
    original: bool,
) -> tuple[list[tuple[Group, Collector]], dict[str, ExpertInputs]]:
    """The block's linear groups and fused experts, each with what it was handed in one pass over all sequences.

    With `original` inputs that pass also sends the hidden states on, one sequence at a time, so that they exist once.
    """
    tokens = sum(states.shape[0] * states.shape[1] for states in hidden)
    groups, experts = [], {}
    watched: list[tuple[nn.Module, Callable[..., None]]] = []
    for group in linear_groups(block, prefix, model, hidden[0], kwargs):
        first = next(iter(group.values()))
        groups.append((group, Collector(needs, first.in_features, tokens, first.weight.device)))
        watched.append((first, groups[-1][1]))
    for name, module in find_linears(model).experts.items():
        if name.startswith(f"{prefix}."):
            experts[name] = ExpertInputs(needs, tokens, original)
            watched.append((module, experts[name]))
    with _hooks(watched):
        for i, states in enumerate(hidden):
            output = _forward(block, states, kwargs)
            if original:
                hidden[i] = output
    return groups, experts


def decoder_blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """The blocks that follow each other, by name: the ModuleList that holds everything there is to quantize."""
    found = find_linears(model)
    names = [*found.layers, *found.experts]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and names and all(n.startswith(f"{name}.") for n in names):
            return [(f"{name}.{i}", block) for i, block in enumerate(module)]
    raise PointError(f"{type(model).__name__}: no list of decoder blocks holds all linear layers; cannot calibrate it")


def linear_groups(block: nn.Module, prefix: str, model: Any, states: Tensor, kwargs: dict[str, Any]) -> list[Group]:
    """Groups the block's linears by the tensor they read, in the order in which they are called."""
    wanted = {n: m for n, m in find_linears(model).layers.items() if n.startswith(f"{prefix}.")}
    seen: list[tuple[Tensor, Group]] = []  # holding the tensors keeps one from taking another's place in memory

    def watch(name: str) -> Callable[[Tensor], None]:
        def note(input: Tensor) -> None:
            for tensor, group in seen:
                if tensor is input:
                    group[name] = wanted[name]
                    return
            seen.append((input, {name: wanted[name]}))

        return note

    with _hooks([(layer, watch(name)) for name, layer in wanted.items()]):
        _forward(block, states, kwargs)
    called = [name for _, group in seen for name in group]
    if missing := set(wanted) - set(called):
        raise PointError(f"layer {sorted(missing)[0]} was not used by the calibration text; cannot calibrate it")
    return [group for _, group in seen]


@contextmanager
def _hooks(watched: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Calls each function with the arguments of every call of its module, before it runs."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], *, see: Callable[..., None]) -> None:
        see(*args, **kwargs)

    handles = [m.register_forward_pre_hook(partial(hook, see=see), with_kwargs=True) for m, see in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ReachedBlockError(Exception):
    """The last block of interest has been handed its input; the rest of the forward pass is not needed."""


def _first_inputs(
    model: Any, blocks: list[nn.Module], calibration: Calibration
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What the first block is handed, hidden states `[1, window, hidden]` per sequence, and every block's arguments.

    Blocks may differ in their mask and their positions (sliding windows), so one sequence goes through all of them.
    """
    hidden: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def note(hidden_states: Tensor, *others: Any, first: bool, **kwargs: Any) -> None:
        if others:
            raise PointError(f"{type(model).__name__}: its blocks take arguments by position; cannot calibrate it")
        if first:
            hidden.append(hidden_states)
        if len(hidden) == 1:
            arguments.append(kwargs)
        if len(hidden) > 1 or len(arguments) == len(blocks):
            raise _ReachedBlockError

    with _hooks([(block, partial(note, first=i == 0)) for i, block in enumerate(blocks)]):
        for ids in calibration.ids:
            with suppress(_ReachedBlockError):
                model(torch.from_numpy(ids)[None].to(model.device), use_cache=False)
    return hidden, arguments


def _forward(block: nn.Module, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    out = block(states, **kwargs)
    return out[0] if isinstance(out, tuple) else out
