"""Quantizes a model in place, linear group by linear group, and says what happened to each weight."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qbench.calibrate import Calibration, Group, quantize_blocks
from qbench.errors import PointError
from qbench.models.linears import find_linears, replace_module
from qbench.quant.diagnostics import kurtosis, mean_imbalance
from qbench.quant.linear import QuantLinear, relative_error
from qbench.quant.quantizer import InputStatistics, Quantizer
from qbench.quant.weight import QuantizedWeight
from qbench.record.result import LayerRow, SkippedRow

log = logging.getLogger(__name__)

ON_GRID = 1e-3  # no honest weight is reproduced this well by four bits


def quantize_model(
    model: Any, quantizer: Quantizer, calibration: Calibration | None = None
) -> tuple[list[LayerRow], list[SkippedRow]]:
    """Replaces every linear by a QuantLinear, group after group, so that only one group exists twice at any time.

    Raises PointError, naming the layer, if the quantizer breaks its contract; the model is then partly quantized and
    must not be used.
    """
    rows: list[LayerRow] = []

    def replace_group(group: Group, stats: InputStatistics | None) -> None:
        for name, (module, row) in quantize_group(group, quantizer, stats).items():
            replace_module(model, name, module)
            rows.append(row)
            if row.relative_error < ON_GRID and row.bits_per_weight < 6:
                log.warning("%s: error %.1e, its weights already lie on this grid", name, row.relative_error)

    found = find_linears(model)
    if quantizer.needs:
        if calibration is None:
            raise PointError(f"{type(quantizer).__name__} is a calibrated method: it needs a calibration text")
        found.layers.clear()
        quantize_blocks(model, quantizer, calibration, replace_group)
    else:
        for name in tqdm(list(found.layers), desc="quantizing", unit="layer"):
            replace_group({name: found.layers.pop(name)}, None)  # the last reference besides the model's own
    return rows, [SkippedRow(s.name, s.weights, s.reason) for s in found.skipped]


def require_finite(model: Any) -> None:
    """Raises PointError naming the first linear that holds NaN or Inf, before any time is spent on the model."""
    for name, layer in find_linears(model).layers.items():
        if bad := int((~torch.isfinite(layer.weight)).sum()):
            raise PointError(
                f"layer {name}: {bad} of {layer.weight.numel()} weights are NaN or Inf; nothing can quantize that"
            )


def quantize_group(
    group: Group, quantizer: Quantizer, stats: InputStatistics | None
) -> dict[str, tuple[QuantLinear, LayerRow]]:
    """Quantizes the linears of one group, which read the same input, and describes each result."""
    weights = {name: layer.weight.detach() for name, layer in group.items()}
    first = next(iter(weights))
    started = _now(weights[first])
    try:
        results = quantizer.quantize(list(weights.values()), stats)
    except ValueError as error:
        raise PointError(f"layer {first}: {error}") from error
    seconds = (_now(weights[first]) - started) / len(weights)
    if len(results) != len(weights) or not all(isinstance(result, QuantizedWeight) for result in results):
        raise PointError(f"layer {first}: {type(quantizer).__name__} must return one QuantizedWeight per weight")
    done = {}
    for (name, weight), quantized in zip(weights.items(), results, strict=True):
        _check(name, weight, quantized, quantizer)
        module = QuantLinear(quantized, group[name].bias)
        done[name] = module, _describe(name, weight, quantized, module.backend, seconds, quantizer)
    return done


def _check(name: str, weight: Tensor, quantized: QuantizedWeight, quantizer: Quantizer) -> None:
    method = type(quantizer).__name__
    if quantized.shape != tuple(weight.shape):
        raise PointError(
            f"layer {name}: {method} returned the shape {list(quantized.shape)} for a weight {list(weight.shape)}"
        )
    for key, tensor in quantized.tensors().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise PointError(f"layer {name}: {method} produced NaN or Inf in {key}")


def _describe(
    name: str, weight: Tensor, quantized: QuantizedWeight, backend: str, seconds: float, quantizer: Quantizer
) -> LayerRow:
    tails = kurtosis(weight)
    t = quantized.input_scale
    return LayerRow(
        name=name,
        shape=quantized.shape,
        method=quantized.method or type(quantizer).__name__.lower(),
        backend=backend,
        seconds=seconds,
        bits_per_weight=quantized.bits_per_weight,
        packed_bytes=quantized.nbytes,
        relative_error=relative_error(weight, quantized),
        imbalance_before=mean_imbalance(weight, quantized.group_size),
        imbalance_after=quantized.diagnostics.get("imbalance_after"),
        kurtosis_before=tails,
        kurtosis_after=tails if t is None else kurtosis(weight.float() / t.float()),
        diagnostics={k: float(v) for k, v in quantized.diagnostics.items() if k != "imbalance_after"},
    )


def _now(weight: Tensor) -> float:
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)
    return time.perf_counter()
