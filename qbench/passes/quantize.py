"""Quantizes a model in place, linear group by linear group and expert by expert, and says what happened to each weight.

An expert's matrices are named as if they were linears: `model.layers.0.mlp.experts.3.gate_proj`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from qbench.errors import PointError
from qbench.format.format import Format
from qbench.format.mixed import Mixed
from qbench.layers.expert_form import Activation, expert_weights, form, stacked_parameters
from qbench.layers.experts import QuantExperts
from qbench.layers.linear import QuantLinear
from qbench.model.linears import Linears, find_linears, matrix, replace_module
from qbench.passes.calibrate import Calibration, Group, quantize_blocks
from qbench.passes.collect import MIN_EXPERT_TOKENS, ExpertInputs
from qbench.passes.groups import groups_of
from qbench.passes.rows import Pending, pending, settle, stopwatch
from qbench.passes.stream import Fetch, fetching
from qbench.quant.quantizer import InputStatistics, Quantizer
from qbench.record.quantization import LayerRow, SkippedRow

log = logging.getLogger(__name__)

ON_GRID = 1e-3  # no honest weight is reproduced this well by four bits
UNREACHED = "no calibration token reached it"
ALL_TOKENS = "all tokens"  # in the method of an expert that was calibrated on them, not on its own


def quantize_model(
    model: Any, quantizer: Quantizer, calibration: Calibration | None = None, offloaded: bool = False
) -> tuple[list[LayerRow], list[SkippedRow]]:
    """Replaces every linear and every block of fused experts, group after group, so that only one exists twice.

    The weights of an offloaded model (models/offload.py) are brought to `model.device` one ahead of their turn: linear
    by linear and expert by expert, or block by block for a calibrated method. What is packed stays there.

    Raises PointError, naming the layer, if the quantizer breaks its contract; the model is then partly quantized and
    must not be used.
    """
    rows: list[LayerRow] = []

    def place(name: str, module: nn.Module, new: list[LayerRow]) -> None:
        replace_module(model, name, module)
        rows.extend(new)

    def place_group(group: Group, stats: InputStatistics | None) -> None:
        group = {name: layer for name, layer in group.items() if takes(quantizer, name)}
        if not group:
            return
        for name, (module, row) in quantize_linears(group, quantizer, stats).items():
            place(name, module, [row])

    def place_experts(name: str, module: nn.Module, inputs: ExpertInputs | None, fetch: Fetch = iter) -> None:
        if takes_experts(quantizer, name, module):
            place(name, *quantize_experts(name, module, quantizer, inputs, fetch))

    found = find_linears(model)
    skipped = skipped_rows(found)
    if quantizer.needs:
        if calibration is None:
            raise PointError(f"{type(quantizer).__name__} is a calibrated method: it needs a calibration text")
        del found  # its references would keep every original alive
        unreached = quantize_blocks(model, quantizer, calibration, place_group, place_experts, offloaded)
        skipped += [SkippedRow(name, weights, UNREACHED) for name, weights in unreached.items()]
        warn(rows)
        return rows, skipped
    units = [[name] for name, _ in model.named_modules() if name in found.layers or name in found.experts]
    if quantizer.joint:
        groups = {group[0]: group for group in groups_of(model, offloaded)}
        later = {name for group in groups.values() for name in group[1:]}
        units = [groups.get(name, [name]) for [name] in units if name not in later]
    with fetching(model.device, offloaded) as fetch:
        linears = [unit for unit in units if unit[0] in found.layers]
        arrivals = fetch([p for name in unit for p in found.layers[name].parameters()] for unit in linears)
        for unit in tqdm(units, desc="quantizing", unit="layer"):
            # a reference kept in `found` would hold every original in memory until the last one is quantized
            if unit[0] in found.layers:
                next(arrivals)
                place_group({name: found.layers.pop(name) for name in unit}, None)
            else:
                place_experts(unit[0], found.experts.pop(unit[0]), None, fetch)
    warn(rows)
    return rows, skipped


def takes(quantizer: Quantizer, name: str) -> bool:
    """Whether the quantizer does anything with the linear of that name."""
    return quantizer.for_layer(name) is not None


def takes_experts(quantizer: Quantizer, name: str, module: nn.Module) -> bool:
    """As `takes`, for any of a module's fused experts."""
    return any(takes(quantizer, one) for i in range(module.num_experts) for one in _expert_names(name, module, i))


def skipped_rows(found: Linears) -> list[SkippedRow]:
    """What stays in 16 bit, as a result lists it."""
    return [SkippedRow(s.name, s.weights, s.reason, s.counted) for s in found.skipped]


def warn(rows: list[LayerRow]) -> None:
    """Says of a quantized model what a reader of its numbers must know."""
    for row in rows:
        if row.relative_error < ON_GRID and row.bits_per_weight < 6:
            log.warning("%s: error %.1e, its weights already lie on this grid", row.name, row.relative_error)
    downs = [row for row in rows if "routed_tokens" in row.diagnostics and row.name.endswith("down_proj")]
    if starved := [row for row in downs if ALL_TOKENS in row.method]:
        least = min(starved, key=lambda row: row.diagnostics["routed_tokens"])
        log.warning(
            "%d of %d experts were routed fewer than %d calibration tokens and were calibrated on all tokens of their "
            "block instead; the fewest: %s, %d. Their rows say so; more calibration text would spare them",
            len(starved),
            len(downs),
            MIN_EXPERT_TOKENS,
            least.name.rpartition(".")[0],
            least.diagnostics["routed_tokens"],
        )


def require_finite(model: Any, offloaded: bool = False) -> None:
    """Raises PointError naming the first linear that holds NaN or Inf, before any time is spent on the model."""
    found = find_linears(model)
    names = [name for name, _ in _each_weight(found)]
    with fetching(model.device, offloaded) as fetch:
        arrivals = fetch([weight] for _, weight in _each_weight(found))
        for name, [weight] in zip(names, arrivals, strict=True):
            _require_finite(name, weight)


def require_finite_weights(layers: dict[str, nn.Module], experts: dict[str, nn.Module]) -> None:
    """As `require_finite`, for the linears and fused experts of one block, which are on their device."""
    found = Linears(layers, experts, [])
    weights = [
        *(m.weight for m in layers.values()),
        *(p for m in experts.values() for p in stacked_parameters(m).values()),
    ]
    if not weights or torch.stack([torch.isfinite(weight).all() for weight in weights]).all():
        return
    for name, weight in _each_weight(found):
        _require_finite(name, weight)


def _require_finite(name: str, weight: Tensor) -> None:
    if bad := int((~torch.isfinite(weight)).sum()):
        raise PointError(f"layer {name}: {bad} of {weight.numel()} weights are NaN or Inf; nothing can quantize that")


def quantize_linears(
    group: Group, quantizer: Quantizer, stats: InputStatistics | None = None
) -> dict[str, tuple[QuantLinear, LayerRow]]:
    """Quantizes the linears of one group, which read the same input, and describes each result."""
    weights = [matrix(layer).contiguous() for layer in group.values()]
    results, rows = quantize_group(list(group), weights, quantizer, stats)
    return {
        name: (QuantLinear(quantized, layer.bias), row)
        for (name, layer), quantized, row in zip(group.items(), results, rows, strict=True)
    }


def quantize_experts(
    name: str, module: Any, quantizer: Quantizer, inputs: ExpertInputs | None = None, fetch: Fetch = iter
) -> tuple[QuantExperts, list[LayerRow]]:
    """Quantizes fused experts one by one; gate and up (or up alone) of one are a linear group, its down another.

    `fetch` brings an expert's weights to where they are quantized (stream.py); by default they are there.

    `inputs` is for calibrated methods. What down reads is computed with gate and up as quantized: they are at hand,
    and it is what down will be handed; or with gate and up as they were, if the inputs are to be the original model's.
    An expert that too few tokens are routed to is calibrated on all tokens of the block instead: the method stays the
    one asked for, other experts' tokens come from the same distribution far more nearly than white noise does, and a
    handful of tokens would fit the weights to those alone. Its rows say so.

    The stacks are put together at the end, projection by projection, so one projection's codes exist twice then.
    """
    packed: list[list[Format]] = [[] for _ in form(module).projections]
    rows: list[Pending] = []
    activation = Activation(module)
    experts = fetch(expert_weights(module, index) for index in range(module.num_experts))
    for index, weights in enumerate(experts):
        names = _expert_names(name, module, index)
        stats = inputs.of_first(index) if inputs else None
        quantized, new = _quantize_group(names[:-1], weights[:-1], quantizer, stats)
        if inputs:
            before = weights[:-1] if inputs.original else [weight.dequantize(inputs.x.dtype) for weight in quantized]
            stats = inputs.of_down(index, partial(_before_down, activation, before, index))
            del before
        down, of_down = _quantize_group(names[-1:], weights[-1:], quantizer, stats)
        quantized, new = [*quantized, *down], [*new, *of_down]
        if inputs:
            quantized, new = _say_what_calibrated(quantized, new, inputs, index)
        rows += [one for one in new if takes(quantizer, one.row.name)]
        for projection, weight in zip(packed, quantized, strict=True):
            projection.append(weight)
    stacks = []
    for projection in packed:
        try:
            kinds = {type(weight) for weight in projection}
            stacks.append((kinds.pop() if len(kinds) == 1 else Mixed).stack(projection))
        except ValueError as error:
            raise PointError(f"layer {name}: {error}") from error
        projection.clear()
    # biases of an offloaded model have waited in host memory
    return QuantExperts(stacks, module).to(stacks[0].device), settle(rows)


def _before_down(activation: Activation, weights: list[Tensor], index: int, x: Tensor) -> Tensor:
    """What an expert's down reads, `[tokens, intermediate]`, if gate and up (or up alone) are these, `[out, in]`."""
    return activation([F.linear(x, weight) for weight in weights], index)


def _say_what_calibrated(
    weights: list[Format], rows: list[Pending], inputs: ExpertInputs, index: int
) -> tuple[list[Format], list[Pending]]:
    """Adds the number of tokens routed to the expert, and names the fallback to all tokens where it was taken."""
    routed = len(inputs.routed(index))
    for one in rows:
        one.row = replace(one.row, diagnostics={**one.row.diagnostics, "routed_tokens": float(routed)})
    if inputs.starved(index):
        for one in rows:
            one.row = replace(one.row, method=f"{one.row.method} ({ALL_TOKENS}: {routed} routed)")
        weights = [replace(weight, method=f"{weight.method} ({ALL_TOKENS})") for weight in weights]
    return weights, rows


def quantize_group(
    names: list[str],
    weights: list[Tensor],
    quantizer: Quantizer,
    stats: InputStatistics | None = None,
) -> tuple[list[Format], list[LayerRow]]:
    """Quantizes the weights `[out, in]` of one linear group and describes each result; the seconds are shared out."""
    results, rows = _quantize_group(names, weights, quantizer, stats)
    return results, settle(rows)


def _quantize_group(
    names: list[str], weights: list[Tensor], quantizer: Quantizer, stats: InputStatistics | None
) -> tuple[list[Format], list[Pending]]:
    stop = stopwatch(weights[0].device)
    try:
        results = quantizer.quantize_layers(names, weights, stats)
    except ValueError as error:
        raise PointError(f"layer {', '.join(names)}: {error}") from error
    seconds, method = stop(), type(quantizer).__name__
    if len(results) != len(weights) or not all(isinstance(result, Format) for result in results):
        raise PointError(f"layer {', '.join(names)}: {method}.quantize must return one Format per weight")
    total = sum(weight.numel() for weight in weights)
    rows = [
        pending(name, weight, quantized, method, partial(_part, seconds, weight.numel() / total))
        for name, weight, quantized in zip(names, weights, results, strict=True)
    ]
    return results, rows


def _part(seconds: Callable[[], float], share: float) -> float:
    return seconds() * share


def _each_weight(found: Linears) -> Iterator[tuple[str, Tensor]]:
    for name, layer in found.layers.items():
        yield name, layer.weight.detach()
    for name, module in found.experts.items():
        for index in range(module.num_experts):
            yield from zip(_expert_names(name, module, index), expert_weights(module, index), strict=True)


def _expert_names(name: str, module: nn.Module, index: int) -> list[str]:
    return [f"{name}.{index}.{projection}" for projection in form(module).projections]
