"""What a result says of a model and of a variant's weights: bytes and bits counted from what is held, rows by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qbench.evaluate.memory import linear_names, weight_bytes
from qbench.model.linears import Linears, coverage, linear_weights, quantized_weights
from qbench.passes.calibrate import Calibration
from qbench.passes.own import EMBEDDING, HEAD
from qbench.passes.quantize import skipped_rows
from qbench.passes.variant import Variant
from qbench.quant.original import BITS_PER_WEIGHT
from qbench.record.quantization import (
    CalibrationRecord,
    LayerRow,
    ModelRecord,
    OtherRow,
    QuantizationRecord,
    SkippedRow,
    WeightBytes,
)


def calibration_record(calibration: Calibration | None, others: Sequence[str] = ()) -> CalibrationRecord | None:
    return calibration and CalibrationRecord(
        text_source=calibration.source,
        text_sha256=calibration.text_sha256,
        token_ids_sha256=calibration.token_ids_sha256,
        sequences=calibration.ids.shape[0],
        tokens=calibration.ids.size,
        inputs=calibration.inputs,
        draws_sha256=list(others),
    )


def of_whole(
    model: Any,
    quantizer: str,
    parameters: int,
    layers: list[LayerRow],
    skipped: list[SkippedRow],
    calibration: Calibration | None,
    wall_seconds: float,
    peak_rss_bytes: int | None,
    others: Sequence[OtherRow] = (),
) -> QuantizationRecord:
    """Of a quantized model of so many `parameters` that is here, and what making it took."""
    stored = quantized_weights(model)
    return _record(
        quantizer,
        parameters,
        packed_bytes=sum(weight.nbytes for weight in stored),
        weights=sum(weight.numel for weight in stored),
        coverage=coverage(model),
        layers=layers,
        skipped=skipped,
        calibration=calibration,
        wall_seconds=wall_seconds,
        peak_alloc_bytes=torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else None,
        peak_rss_bytes=peak_rss_bytes,
        weight_bytes=weight_bytes(model),
        others=others,
        tied=weight_bytes(model).head == 0,
    )


def of_variant(
    variant: Variant, quantizer: str, model: ModelRecord, found: Linears, calibration: Calibration | None
) -> QuantizationRecord:
    """Of a variant that has gone through a pass over the original `model`, in which `found` was to be quantized."""
    assert model.weight_bytes is not None
    before = model.weight_bytes
    held = WeightBytes(
        dict(variant.stored), before.linears - variant.replaced_bytes, before.embeddings, before.head, before.rest
    )
    return _record(
        quantizer,
        model.parameters,
        packed_bytes=sum(variant.stored.values()),
        weights=variant.weights,
        coverage=variant.covered / max(1, found.weights),
        layers=variant.rows,
        skipped=[*skipped_rows(found), *variant.unreached],
        calibration=calibration,
        wall_seconds=variant.seconds["quantize"],
        peak_alloc_bytes=variant.peak_alloc_bytes,
        peak_rss_bytes=variant.peak_rss_bytes,
        weight_bytes=held,
        others=variant.others,
        tied=before.head == 0,
    )


def of_original(model: ModelRecord, found: Linears, quantizer: str = "none") -> QuantizationRecord:
    """Of `quantizer=none`, the original as a row, and of what changes no weight either."""
    return _record(quantizer, model.parameters, 0, 0, 0.0, [], skipped_rows(found), weight_bytes=model.weight_bytes)


def _record(
    quantizer: str,
    parameters: int,
    packed_bytes: int,
    weights: int,
    coverage: float,
    layers: list[LayerRow],
    skipped: list[SkippedRow],
    calibration: Calibration | None = None,
    wall_seconds: float = 0,
    peak_alloc_bytes: int | None = None,
    peak_rss_bytes: int | None = None,
    weight_bytes: WeightBytes | None = None,
    others: Sequence[OtherRow] = (),
    tied: bool = False,
) -> QuantizationRecord:
    """`tied`: the original's head is its embedding."""
    stored = [row for row in others if row.quantized]  # all else is counted at 16 bit, whoever made the variant
    embedding_bits = _bits([row for row in stored if row.place == EMBEDDING])
    heads = [row for row in others if row.place == HEAD]
    if tied:
        parameters += sum(row.weights for row in heads)
    return QuantizationRecord(
        quantizer=quantizer,
        calibration=calibration_record(calibration),
        quant_seconds=sum(row.seconds for row in layers),
        wall_seconds=wall_seconds,
        bits_per_weight=8 * packed_bytes / weights if weights else BITS_PER_WEIGHT,  # none, of the original
        packed_bytes=packed_bytes,
        model_bytes=packed_bytes
        + 2 * (parameters - weights - sum(row.weights for row in stored))
        + sum(row.stored_bytes for row in stored),
        coverage=coverage,
        peak_alloc_bytes=peak_alloc_bytes,
        peak_rss_bytes=peak_rss_bytes,
        layers=layers,
        skipped=skipped,
        weight_bytes=weight_bytes,
        embedding_bits=embedding_bits,
        head_bits=_bits([row for row in heads if row.quantized]) if heads or not tied else embedding_bits,
        others=list(others),
    )


def _bits(rows: list[OtherRow]) -> float:
    return 8 * sum(row.stored_bytes for row in rows) / sum(row.weights for row in rows) if rows else BITS_PER_WEIGHT


class Tally:
    """Bytes of an original whose blocks come by one after the other, as `memory.weight_bytes` counts a whole model."""

    def __init__(self, model: Any, skeleton: Any, blocks: str) -> None:
        """Counts `model` but for its list of blocks; `skeleton` is the whole of it, without storage."""
        self.linears = linear_names(skeleton)
        self.embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self.head = id(getattr(model.get_output_embeddings(), "weight", None))
        self.bytes: Counter[str] = Counter()
        self.add(model, leave_out=f"{blocks}.")

    def add(self, module: nn.Module, prefix: str = "", leave_out: str | None = None) -> None:
        """Counts a part of the model, whose name begins with `prefix`."""
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if leave_out is not None and name.startswith(leave_out):
                continue
            place = "linears" if prefix + name in self.linears else "rest"
            if id(tensor) in self.embeddings:
                place = "embeddings"
            elif id(tensor) == self.head:
                place = "head"
            self.bytes[place] += tensor.nbytes

    def record(self) -> WeightBytes:
        return WeightBytes({}, **self.bytes)


def model_record(name: str, fingerprint: str, note: str, model: Any, weights: WeightBytes | None) -> ModelRecord:
    """`model` may be without storage, or quantized already."""
    stored = quantized_weights(model)
    parameters = sum(weight.numel for weight in stored) + sum(p.numel() for p in model.parameters())
    return ModelRecord(
        name=name,
        fingerprint=fingerprint,
        note=note,
        parameters=parameters,
        linear_weights=linear_weights(model),
        baseline_bytes=2 * parameters,
        weight_bytes=weights,
    )
