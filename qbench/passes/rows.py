"""What a result says of quantized weights. The numbers are read off the device for many weights at once.

A mixture has tens of thousands of matrices, and a GPU that is asked for a number has to finish all work before it can
answer. So rows are pending until `settle`: their numbers are tensors of one element a matrix.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qbench.errors import PointError
from qbench.format.format import Format
from qbench.format.mixed import Mixed
from qbench.layers.linear import backend
from qbench.passes.measured import measured
from qbench.quant.quantizer import Quantizer
from qbench.record.quantization import LayerRow

FIELDS = ("relative_error", "imbalance_before", "imbalance_after", "kurtosis_before", "kurtosis_after")


@dataclass
class Pending:
    """The rows of a stack's matrices, or of one weight, whose numbers are still on their way.

    `seconds` may be asked for once they are there: the whole stack's.
    """

    names: list[str]
    shape: tuple[int, ...]  # of each
    methods: list[str]  # in effect
    numbers: dict[str, Tensor]  # by field of a row, or by the name of what the method reports: [matrices]
    told: list[dict[str, float]]  # what else the method reports of each
    sums: dict[str, Tensor]  # by buffer, [matrices]: not finite where it holds NaN or Inf
    stored: list[tuple[float, int, dict[str, int]]]  # bits a weight, bytes, bytes by component
    backends: list[str]
    seconds: Callable[[], float]
    quantizer: str


def pending(
    names: Sequence[str], weight: Tensor, quantized: Format, quantizer: str, seconds: Callable[[], float]
) -> Pending:
    """Of a weight `[out, in]` or a stack `[matrices, out, in]`; `quantizer` is the class' name.

    Raises PointError when what is quantized is not of the weight's shape.
    """
    if quantized.shape != tuple(weight.shape):
        raise PointError(
            f"layer {names[0]}: {quantizer} returned the shape {list(quantized.shape)} for a weight "
            f"{list(weight.shape)}"
        )
    count, held = len(names), quantized.tensors()
    ones = [quantized]
    if weight.ndim == 3:  # all of one form, but for Mixed
        ones = [quantized.select(i) for i in range(count if isinstance(quantized, Mixed) else 1)]
    reported = dict(quantized.diagnostics)
    methods = reported.pop("method", [quantized.method] * count)
    numbers = measured(weight, quantized)
    told: list[dict[str, float]] = [{} for _ in names]
    for key, value in reported.items():
        if isinstance(value, Tensor):
            numbers[key] = value.to(weight.device).expand(count)
            continue
        for one, number in zip(told, value if isinstance(value, Sequence) else [value] * count, strict=True):
            if not math.isnan(number):  # which says that it says nothing
                one[key] = float(number)
    sums = {}
    for key, tensor in held.items():
        if tensor.is_floating_point():
            wide = tensor.float() if tensor.itemsize == 1 else tensor
            apart = weight.ndim == 3 and len(ones) == 1 and tensor.ndim > ones[0].tensors()[key].ndim
            sums[key] = (wide.flatten(1) if apart else wide.reshape(1, -1)).sum(1, dtype=torch.float64).expand(count)
    return Pending(
        list(names),
        tuple(weight.shape[-2:]),
        [method or quantizer.lower() for method in methods],
        numbers,
        told,
        sums,
        [(one.bits_per_weight, one.nbytes, one.stored_bytes()) for one in ones] * (count // len(ones)),
        [backend(one, weight.dtype) for one in ones] * (count // len(ones)),
        seconds,
        quantizer,
    )


def settle(stacks: Sequence[Pending]) -> list[list[LayerRow]]:
    """The rows of each, in order; raises PointError, naming the layer, for a weight that is not finite."""
    if not stacks:
        return []
    asked = [tensor for one in stacks for tensor in (*one.sums.values(), *one.numbers.values())]
    values = torch.cat(asked).tolist()
    settled, at = [], 0
    for one in stacks:
        count = len(one.names)
        columns = {}
        for key in (*one.sums, *one.numbers):
            columns[key], at = values[at : at + count], at + count
        for key in one.sums:
            for name, total in zip(one.names, columns.pop(key), strict=True):
                if not math.isfinite(total):
                    raise PointError(f"layer {name}: {one.quantizer} produced NaN or Inf in {key}")
        settled.append(_rows(one, columns))
    return settled


def _rows(one: Pending, columns: dict[str, list[float]]) -> list[LayerRow]:
    """`columns` are the numbers, by field or by the name of what the method reports, of every matrix."""
    count, rows = len(one.names), []
    seconds = one.seconds() / count
    fields = [columns.pop(key, [None] * count) for key in FIELDS]
    for i, (error, before, after, tails_before, tails_after) in enumerate(zip(*fields, strict=True)):
        if not math.isfinite(error):  # finite scales can be too large for their codes
            raise PointError(f"layer {one.names[i]}: {one.quantizer} produced NaN or Inf in the dequantized weight")
        reported = {key: column[i] for key, column in columns.items()} | one.told[i]
        after = reported.pop("imbalance_after", after)
        bits, packed, stored = one.stored[i]
        numbers = seconds, bits, packed, error, before, after, tails_before, tails_after
        rows.append(LayerRow(one.names[i], one.shape, one.methods[i], one.backends[i], *numbers, reported, stored))
    return rows


def timed(
    names: Sequence[Sequence[str]],
    weights: Sequence[Tensor],
    quantizer: Quantizer,
    quantize: Callable[[], list[Format]],
) -> tuple[list[Format], list[Pending]]:
    """What `quantize` makes of a linear group `[out, in]`, or of stacks of them, with the rows of each.

    names[j] are those of weight j's matrices. Raises PointError, naming them, if the quantizer breaks its contract.
    """
    stop = stopwatch(weights[0].device)
    try:
        results = quantize()
    except ValueError as error:
        raise PointError(f"layer {', '.join(name for of in names for name in of)}: {error}") from error
    seconds, method = stop(), type(quantizer).__name__
    if len(results) != len(weights) or not all(isinstance(result, Format) for result in results):
        told = ", ".join(name for of in names for name in of)
        raise PointError(f"layer {told}: {method}.quantize must return one Format per weight")
    total = sum(weight.numel() for weight in weights)
    rows = [
        pending(of, weight, quantized, method, partial(_part, seconds, weight.numel() / total))
        for of, weight, quantized in zip(names, weights, results, strict=True)
    ]
    return results, rows


def _part(seconds: Callable[[], float], share: float) -> float:
    return seconds() * share


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
