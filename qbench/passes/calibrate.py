"""Calibration: what each linear group's input looks like, streamed block by block through the model.

The decoder blocks are visited in order. Of one block the statistics that the method needs are collected in one pass
over all calibration sequences, and its linears are quantized. `calibration.inputs` says what the next block is shown:

    quantized   what the block gives out now that it is quantized, in a second pass: each block is calibrated on what it
                will really see (GPTQ's own code does this)
    original    what the block gave out in the first pass, unquantized: no block's choices depend on those of another
                (AWQ's and A-SINQ's own code)

What else the blocks are called with (masks, positions) is the model's own (blocks.py). Most models hand all sequences
the same; where they do not (token embeddings for every block, keys shared between blocks) each sequence keeps its own.

All statistics of a block are taken before any of its linears is quantized. Linears that read the very same tensor
(q/k/v; gate/up) form a group; that is observed, not listed per architecture. Linears that no sequence reaches (of an
expert that is an nn.Module of its own) stay in 16 bit.

Memory beside the model: the hidden states of all sequences at one depth, tokens x hidden, and the statistics of one
block (a Hessian is in x in in fp32, the sample of inputs at most INPUT_ROWS x in). Activations inside a block live for
one sequence at a time. A block with fused experts adds tokens x hidden for their input, whatever their number, and the
statistics of one expert (collect.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qbench.config import CalibrationConfig
from qbench.errors import PointError, RequestError, unknown
from qbench.evaluate.text import Text, most_tokens
from qbench.model.linears import block_list, find_linears, matrix
from qbench.model.offload import runs_offloaded
from qbench.passes.blocks import Call, first_inputs, hooks, run_block
from qbench.passes.collect import Collector, ExpertInputs
from qbench.passes.stream import fetching
from qbench.quant.quantizer import InputStatistics, Quantizer, Statistic

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


def check_text(text: Text, config: CalibrationConfig) -> None:
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


Group = dict[str, nn.Module]
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
) -> dict[str, int]:
    """Hands every linear group and every module of fused experts, with its statistics, to one of the functions.

    In the model's order, within a block first the linears; the functions replace the layers. Of an offloaded model,
    the weights of one block are brought to the device while those of the block before are quantized.
    Returns the linears that no calibration token reached, and how many weights each has.
    Raises PointError for a model whose blocks cannot be found, or do not follow each other.
    """
    original = calibration.inputs == "original"
    blocks = decoder_blocks(model)
    unreached: dict[str, int] = {}
    with runs_offloaded(model, offloaded):
        hidden, calls = first_inputs(model, [block for _, block in blocks], calibration.ids)
    with fetching(model.device, offloaded) as fetch:
        arrivals = fetch(_weights(model, name) for name, _ in blocks)
        for i, (name, block) in enumerate(tqdm(blocks, desc="calibrating", unit="block")):
            next(arrivals)
            how = [of_sequence[i] for of_sequence in calls]
            groups, experts, missing = _collect(model, name, block, hidden, how, quantizer.needs, original)
            unreached |= missing
            while groups:
                group, collector = groups.pop(0)
                quantize(group, collector.statistics(next(iter(group))))
                del group, collector  # no second layer's original and no statistics outlive their turn
            while experts:
                expert_name, inputs = experts.popitem()
                quantize_experts(expert_name, model.get_submodule(expert_name), inputs.all_seen(expert_name))
                del inputs
            if not original:
                for j, call in enumerate(how):
                    hidden[j] = run_block(block, hidden[j], call)
    return unreached


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
    calls: list[Call],
    needs: frozenset[Statistic],
    original: bool,
) -> tuple[list[tuple[Group, Collector]], dict[str, ExpertInputs], dict[str, int]]:
    """The block's linear groups and fused experts, each with what it was handed in one pass over all sequences.

    With `original` inputs that pass also sends the hidden states on, one sequence at a time, so that they exist once.
    Third come the linears that no sequence reaches, and how many weights each has.
    """
    tokens = sum(states.shape[0] * states.shape[1] for states in hidden)
    found = find_linears(model)
    wanted = {n: m for n, m in found.layers.items() if n.startswith(f"{prefix}.")}
    groups, experts = [], {}
    watched: list[tuple[nn.Module, Callable[..., None]]] = []
    for group in linear_groups(block, wanted, hidden, calls):
        first = next(iter(group.values()))
        groups.append((group, Collector(needs, matrix(first).shape[1], tokens, first.weight.device)))
        watched.append((first, groups[-1][1]))
    for name, module in found.experts.items():
        if name.startswith(f"{prefix}."):
            experts[name] = ExpertInputs(needs, tokens, original, module.num_experts)
            watched.append((module, experts[name]))
    with hooks(watched):
        for i, (states, call) in enumerate(zip(hidden, calls, strict=True)):
            output = run_block(block, states, call)
            if original:
                hidden[i] = output
    reached = {name for group, _ in groups for name in group}
    return groups, experts, {name: m.weight.numel() for name, m in wanted.items() if name not in reached}


def decoder_blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """The blocks that follow each other, by name."""
    name = block_list(model)
    if name is None:
        raise PointError(
            f"{type(model).__name__}: no list of decoder blocks holds its linear layers; cannot calibrate it"
        )
    return [(f"{name}.{i}", block) for i, block in enumerate(model.get_submodule(name))]


def linear_groups(
    block: nn.Module, wanted: dict[str, nn.Module], hidden: list[Tensor], calls: list[Call]
) -> list[Group]:
    """Groups the linears `wanted` of the block by the tensor they read, in the order in which they are called.

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

    for states, call in zip(hidden, calls, strict=True):
        if not left:
            break
        seen: list[tuple[Tensor, Group]] = []  # holding the tensors keeps one from taking another's place in memory
        with hooks([(layer, watch(name, seen)) for name, layer in list(left.items())]):
            run_block(block, states, call)
        groups += [group for _, group in seen]
    return groups
