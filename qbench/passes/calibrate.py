"""Calibration: what each linear group's input looks like, streamed block by block through the model.

The decoder blocks are visited in order. Of one block the statistics that the method needs are collected in one pass
over all calibration sequences, and its linears are quantized. `calibration.inputs` says what the next block is shown:

    quantized   what the block gives out now that it is quantized, in a second pass: each block is calibrated on what it
                will really see (GPTQ's own code does this)
    original    what the block gave out in the first pass, unquantized: no block's choices depend on those of another
                (AWQ's and A-SINQ's own code)

The model is walked as a resident chain (chain.py), so what else the blocks are called with (masks, positions) is the
model's own. Most models hand all sequences the same; where they do not (token embeddings for every block, keys shared
between blocks) each sequence keeps its own.

What is taken of one block, and the memory that it costs, is told in shown.py.
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
from qbench.model.blocks import NotAChainError
from qbench.model.linears import find_linears
from qbench.passes.chain import Chain
from qbench.passes.collect import ExpertInputs
from qbench.passes.shown import Group, Shown
from qbench.passes.stream import fetching
from qbench.quant.quantizer import InputStatistics, Quantizer

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
    """The draw `first_draw`, by default cut from the start; raises RequestError when the text fills no sequence."""
    return cut_draws(text, tokenizer, config, range(config.first_draw, config.first_draw + 1))[0]


def cut_draws(text: Text, tokenizer: Any, config: CalibrationConfig, draws: range) -> list[Calibration]:
    """The draws of these numbers, each of as many sequences of one text, which is tokenized once.

    Draw 0 is cut from the start, sequence after sequence. Every other one has sequences that start at tokens chosen at
    random, uniformly and with replacement, as GPTQ's own script draws its own; the draw's number is the seed.
    Raises RequestError when the text fills no sequence, or has no other place to start one.
    """
    ids = np.asarray(tokenizer(text.content, verbose=False)["input_ids"], dtype=np.int64)
    full = _full_sequences(ids.size, text, config)
    count = min(full, config.sequences or full)
    places = ids.size - config.window + 1
    if places < len(draws):
        raise RequestError(
            f"the calibration text {text.source} has {ids.size} tokens, too few for calibration.draws={len(draws)} of "
            f"sequences of {config.window}; use a longer text, a smaller calibration.window or fewer draws"
        )
    starts = [
        np.random.default_rng(draw).integers(0, places, count) if draw else np.arange(count) * config.window
        for draw in draws
    ]
    cuts = (ids[at[:, None] + np.arange(config.window)] for at in starts)
    return [Calibration(cut, text.source, text.sha256, config.inputs) for cut in cuts]


def _full_sequences(tokens: int, text: Text, config: CalibrationConfig, at_most: str = "") -> int:
    """How many sequences the tokens fill; raises RequestError for none."""
    full = tokens // config.window
    if full == 0:
        raise RequestError(
            f"the calibration text {text.source} has {at_most}{tokens} tokens, less than one sequence of "
            f"{config.window}; use a longer text or a smaller calibration.window"
        )
    return full


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
    try:
        chain = Chain.of(model.eval(), resident=True)
        shown = Shown(chain, calibration.ids, quantizer.needs, calibration.inputs == "original")
    except NotAChainError as error:
        raise PointError(f"{error}; cannot calibrate it") from error
    unreached: dict[str, int] = {}
    with fetching(model.device, offloaded) as fetch:
        arrivals = fetch(_weights(model, f"{chain.name}.{i}") for i in range(len(chain)))
        for i, block in enumerate(tqdm(chain.blocks, desc="calibrating", unit="block")):
            next(arrivals)
            found = shown.collect(i, block, *_inside(model, f"{chain.name}.{i}"))
            unreached |= found.unreached
            while found.groups:
                group, collector = found.groups.pop(0)
                quantize(group, collector.statistics(next(iter(group))))
                del group, collector  # no second layer's original and no statistics outlive their turn
            while found.experts:
                name, inputs = found.experts.popitem()
                quantize_experts(name, model.get_submodule(name), inputs.all_seen(name))
                del inputs
            shown.go_on(i, block)
    return unreached


def _inside(model: Any, prefix: str) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The block's linears and fused experts that are quantized, by name."""
    found = find_linears(model)
    layers, experts = (
        {name: module for name, module in part.items() if name.startswith(f"{prefix}.")}
        for part in (found.layers, found.experts)
    )
    return layers, experts


def _weights(model: Any, prefix: str) -> list[Tensor]:
    """The parameters of the block's linears and fused experts: what an offloaded model keeps in host memory."""
    layers, experts = _inside(model, prefix)
    return [parameter for module in (*layers.values(), *experts.values()) for parameter in module.parameters()]
