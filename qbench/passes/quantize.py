"""Quantizes a model in place, linear group by linear group, and says what happened to each weight.

Fused experts are quantized in experts.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qbench.errors import PointError
from qbench.format.format import Format
from qbench.layers.expert_form import expert_weights, stacked_parameters
from qbench.layers.linear import QuantLinear
from qbench.model.linears import Linears, find_linears, matrix, replace_module
from qbench.passes.calibrate import Calibration, Group, quantize_blocks
from qbench.passes.collect import MIN_EXPERT_TOKENS, ExpertInputs
from qbench.passes.experts import ALL_TOKENS, expert_names, quantize_experts
from qbench.passes.groups import groups_of
from qbench.passes.rows import settle, timed
from qbench.passes.stream import Fetch, fetching
from qbench.quant.quantizer import InputStatistics, Quantizer
from qbench.record.quantization import LayerRow, SkippedRow

log = logging.getLogger(__name__)

ON_GRID = 1e-3  # no honest weight is reproduced this well by four bits
UNREACHED = "no calibration token reached it"


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
    return any(takes(quantizer, one) for i in range(module.num_experts) for one in expert_names(name, module, i))


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


def quantize_group(
    names: list[str],
    weights: list[Tensor],
    quantizer: Quantizer,
    stats: InputStatistics | None = None,
) -> tuple[list[Format], list[LayerRow]]:
    """Quantizes the weights `[out, in]` of one linear group and describes each result; the seconds are shared out."""
    each = [[name] for name in names]
    results, rows = timed(each, weights, quantizer, lambda: quantizer.quantize_layers(names, weights, stats))
    return results, [row for [row] in settle(rows)]


def _each_weight(found: Linears) -> Iterator[tuple[str, Tensor]]:
    for name, layer in found.layers.items():
        yield name, layer.weight.detach()
    for name, module in found.experts.items():
        for index in range(module.num_experts):
            yield from zip(expert_names(name, module, index), expert_weights(module, index), strict=True)
