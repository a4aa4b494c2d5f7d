"""Quantizes a model in place, linear by linear, and says what happened to each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.errors import PointError
from qbench.quant.diagnostics import kurtosis, mean_imbalance
from qbench.quant.linear import QuantLinear, relative_error
from qbench.quant.quantizer import Quantizer
from qbench.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class LayerReport:
    """One quantized weight: a row of the result's per-layer table."""

    name: str
    shape: tuple[int, ...]  # [out, in]
    method: str  # in effect, which may differ from the one asked for
    backend: str  # what multiplies with it
    seconds: float  # inside the quantizer
    bits_per_weight: float
    packed_bytes: int
    relative_error: float  # ||W - dequantized|| / ||W||
    imbalance_before: float  # geometric mean over tiles of all rows x one group
    imbalance_after: float | None  # None for methods that do not balance
    kurtosis_before: float
    kurtosis_after: float  # of W / t; as before without an input scale


def quantize_layers(
    layers: dict[str, nn.Linear],
    quantizer: Quantizer,
    replace: Callable[[str, QuantLinear], None],
) -> list[LayerReport]:
    """Quantizes each linear and hands its QuantLinear to `replace` before the next one is touched.

    Only one layer exists twice at any time. Raises PointError, naming the layer, for a weight that is not finite
    or a quantizer that breaks its contract; layers replaced until then stay replaced.
    """
    return [quantize_layer(name, layer, quantizer, replace) for name, layer in layers.items()]


def quantize_layer(
    name: str, layer: nn.Linear, quantizer: Quantizer, replace: Callable[[str, QuantLinear], None]
) -> LayerReport:
    weight = layer.weight.detach()
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise PointError(f"layer {name}: {bad} of {weight.numel()} weights are NaN or Inf; nothing can quantize that")
    if weight.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    try:
        results = quantizer.quantize([weight], None)
    except ValueError as error:
        raise PointError(f"layer {name}: {error}") from error
    if weight.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    quantized = _checked(name, weight, results, quantizer)
    module = QuantLinear(quantized, layer.bias)
    report = _report(name, weight, quantized, module.backend, seconds, quantizer)
    replace(name, module)
    return report


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


def _report(
    name: str, weight: Tensor, quantized: QuantizedWeight, backend: str, seconds: float, quantizer: Quantizer
) -> LayerReport:
    tails = kurtosis(weight)
    scaled = quantized.input_scale
    return LayerReport(
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
        kurtosis_after=tails if scaled is None else kurtosis(weight.float() / scaled.float()),
    )
