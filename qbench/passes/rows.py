"""What a result says of one quantized weight. The numbers are read off the device for many weights at once.

A mixture has tens of thousands of matrices, and a GPU that is asked for a number has to finish all work before it can
answer. So a row is pending until `settle`: its numbers are tensors of one element, and what must be finite is a flag.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qbench.errors import PointError
from qbench.format.aux import dense_input_scale
from qbench.format.format import Format
from qbench.layers.linear import backend, relative_error
from qbench.quant.diagnostics import kurtosis, mean_imbalance
from qbench.record.quantization import LayerRow


@dataclass
class Pending:
    """A row whose `numbers` are still on their way, by field; `seconds` may be asked for once they are there."""

    row: LayerRow
    numbers: dict[str, Tensor]
    finite: dict[str, Tensor]  # by buffer: whether it holds no NaN or Inf
    seconds: Callable[[], float]
    method: str


def pending(name: str, weight: Tensor, quantized: Format, method: str, seconds: Callable[[], float]) -> Pending:
    """Raises PointError when the quantized weight is not of the weight's shape."""
    if quantized.shape != tuple(weight.shape):
        raise PointError(
            f"layer {name}: {method} returned the shape {list(quantized.shape)} for a weight {list(weight.shape)}"
        )
    tensors = quantized.tensors()
    t, wide = tensors.get("input_scale"), weight.float()
    rotation = getattr(quantized, "rotation", None)
    basis = wide if rotation is None else rotation(wide)
    basis = basis if t is None else basis / dense_input_scale(t)
    numbers = {
        "relative_error": relative_error(wide, quantized),
        "imbalance_before": mean_imbalance(wide, quantized.group_size),
        "kurtosis_before": (tails := kurtosis(wide)),
        "kurtosis_after": tails if t is None and rotation is None else kurtosis(basis),
    }
    row = LayerRow(
        name=name,
        shape=quantized.shape,
        method=quantized.method or method.lower(),
        backend=backend(quantized, weight.dtype),
        seconds=0,
        bits_per_weight=quantized.bits_per_weight,
        packed_bytes=quantized.nbytes,
        relative_error=0,
        imbalance_before=0,
        imbalance_after=quantized.diagnostics.get("imbalance_after"),
        kurtosis_before=0,
        kurtosis_after=0,
        diagnostics={k: float(v) for k, v in quantized.diagnostics.items() if k != "imbalance_after"},
        stored_bytes=quantized.stored_bytes(),
    )
    floats = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    finite = {key: torch.isfinite(tensor.float()).all() for key, tensor in floats.items()}  # of 8 bits too
    return Pending(row, numbers, finite, seconds, method)


def settle(rows: Sequence[Pending]) -> list[LayerRow]:
    """Raises PointError, naming the layer, for a weight that is not finite."""
    if not rows:
        return []
    asked = [tensor.double() for row in rows for tensor in (*row.finite.values(), *row.numbers.values())]
    values = iter(torch.stack(asked).tolist())
    settled = []
    for one in rows:
        for key in one.finite:
            if not next(values):
                raise PointError(f"layer {one.row.name}: {one.method} produced NaN or Inf in {key}")
        numbers = {key: next(values) for key in one.numbers}
        if not math.isfinite(numbers["relative_error"]):  # finite scales can be too large for their codes
            raise PointError(f"layer {one.row.name}: {one.method} produced NaN or Inf in the dequantized weight")
        settled.append(replace(one.row, seconds=one.seconds(), **numbers))
    return settled


def stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Starts; called it stops, and gives what tells the seconds: on a GPU once its work is done, without a wait."""
    if device.type != "cuda":
        started = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - started
            return lambda: seconds

        return stop
    stream = torch.cuda.current_stream(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record(stream)

    def stop_on_device() -> Callable[[], float]:
        end.record(stream)
        return lambda: begin.elapsed_time(end) / 1e3

    return stop_on_device
