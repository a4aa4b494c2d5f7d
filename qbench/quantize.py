"""Quantizes a model in place, linear by linear, and says what happened to each."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qbench.errors import PointError
from qbench.models.linears import find_linears, replace_module
from qbench.quant.diagnostics import kurtosis, mean_imbalance
from qbench.quant.linear import QuantLinear, relative_error
from qbench.quant.quantizer import Quantizer
from qbench.quant.weight import QuantizedWeight
from qbench.record.result import LayerRow, SkippedRow

log = logging.getLogger(__name__)

ON_GRID = 1e-3  # no honest weight is reproduced this well by four bits


def quantize_model(model: Any, quantizer: Quantizer) -> tuple[list[LayerRow], list[SkippedRow]]:
    """Replaces every linear by a QuantLinear, one after the other, so that only one exists twice at any time.

    Raises PointError, naming the layer, if the quantizer breaks its contract; the model is then partly quantized and
    must not be used.
    """
    found = find_linears(model)
    rows = []
    for name in tqdm(list(found.layers), desc="quantizing", unit="layer"):
        layer = found.layers.pop(name)  # the last reference besides the model's own
        module, row = quantize_linear(name, layer, quantizer)
        replace_module(model, name, module)
        rows.append(row)
        if row.relative_error < ON_GRID and row.bits_per_weight < 6:
            log.warning("%s: error %.1e, its weights already lie on this grid", name, row.relative_error)
    return rows, [SkippedRow(s.name, s.weights, s.reason) for s in found.skipped]


def require_finite(model: Any) -> None:
    """Raises PointError naming the first linear that holds NaN or Inf, before any time is spent on the model."""
    for name, layer in find_linears(model).layers.items():
        if bad := int((~torch.isfinite(layer.weight)).sum()):
            raise PointError(
                f"layer {name}: {bad} of {layer.weight.numel()} weights are NaN or Inf; nothing can quantize that"
            )


def quantize_linear(name: str, layer: nn.Linear, quantizer: Quantizer) -> tuple[QuantLinear, LayerRow]:
    """Quantizes one `[out, in]` linear and describes the result."""
    weight = layer.weight.detach()
    started = _now(weight)
    try:
        results = quantizer.quantize([weight], None)
    except ValueError as error:
        raise PointError(f"layer {name}: {error}") from error
    seconds = _now(weight) - started
    quantized = _checked(name, weight, results, quantizer)
    module = QuantLinear(quantized, layer.bias)
    tails = kurtosis(weight)
    t = quantized.input_scale
    row = LayerRow(
        name=name,
        shape=quantized.shape,
        method=quantized.method or type(quantizer).__name__.lower(),
        backend=module.backend,
        seconds=seconds,
        bits_per_weight=quantized.bits_per_weight,
        packed_bytes=quantized.nbytes,
        relative_error=relative_error(weight, quantized),
        imbalance_before=mean_imbalance(weight, quantized.group_size),
        imbalance_after=quantized.diagnostics.get("imbalance_after"),
        kurtosis_before=tails,
        kurtosis_after=tails if t is None else kurtosis(weight.float() / t.float()),
    )
    return module, row


def _checked(name: str, weight: Tensor, results: list[QuantizedWeight], quantizer: Quantizer) -> QuantizedWeight:
    method = type(quantizer).__name__
    if len(results) != 1 or not isinstance(results[0], QuantizedWeight):
        raise PointError(f"layer {name}: {method}.quantize must return one QuantizedWeight per weight")
    quantized = results[0]
    if quantized.shape != tuple(weight.shape):
        raise PointError(
            f"layer {name}: {method} returned the shape {list(quantized.shape)} for a weight {list(weight.shape)}"
        )
    for key, tensor in quantized.tensors().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise PointError(f"layer {name}: {method} produced NaN or Inf in {key}")
    return quantized


def _now(weight: Tensor) -> float:
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)
    return time.perf_counter()
