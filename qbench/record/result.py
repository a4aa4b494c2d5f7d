"""The result of one point: frozen dataclasses with the unit in every field's name, written and read as JSON.

Reading validates: an unknown or missing field, a wrong type or another schema version is an error, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

SCHEMA_VERSION = 1
_STRICT = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class ResultError(ValueError):
    """A result file that cannot be read; the sentence says which and why."""


@dataclass(frozen=True)
class LayerRow:
    """One quantized weight."""

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
    diagnostics: dict[str, float] = field(default_factory=dict)  # what else the method reports, such as a chosen ratio

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class SkippedRow:
    """A linear weight that stays in 16 bit."""

    name: str
    weights: int
    reason: str

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class ModelRecord:
    name: str
    fingerprint: str
    note: str  # what a reader of its numbers must know; empty for an ordinary checkpoint
    parameters: int
    linear_weights: int  # that count for coverage
    baseline_bytes: int  # every parameter at 16 bit, tied ones once

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class CalibrationRecord:
    """What a calibrated method was shown; equal hashes, equal terms."""

    text_source: str
    text_sha256: str
    token_ids_sha256: str
    sequences: int
    tokens: int

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class QuantizationRecord:
    quantizer: str
    calibration: CalibrationRecord | None  # None for calibration-free methods
    quant_seconds: float  # inside the quantizer, all layers
    wall_seconds: float  # the whole phase, diagnostics included
    bits_per_weight: float  # stored codes and aux of the quantized linears over their weights
    packed_bytes: int  # codes and aux of the quantized linears, from the buffers
    model_bytes: int  # packed_bytes plus every other parameter at 16 bit
    coverage: float  # share of the linear weights really quantized, 0 to 1
    peak_alloc_bytes: int | None  # of the CUDA allocator while quantizing; None on a CPU
    peak_rss_bytes: int  # of the whole process until quantizing ended
    layers: list[LayerRow]  # empty for a packed checkpoint: errors are measured against the original
    skipped: list[SkippedRow]

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class EvaluationRecord:
    protocol: str  # the protocol is part of the metric's name; two of them never share a column
    text_source: str
    text_sha256: str
    token_ids_sha256: str
    total_tokens: int
    leading_special_tokens: int  # that the tokenizer put before the text; windows get none of their own
    window_tokens: int
    windows: int
    dropped_tokens: int  # the tail and the windows beyond task.max_windows
    scored_tokens: int
    ppl: float
    baseline_ppl: float | None  # None for a packed checkpoint, whose original is not at hand
    baseline_cached: bool
    ppl_delta: float | None  # ppl - baseline_ppl; None without a baseline
    ppl_delta_low: float | None  # 95 % paired bootstrap interval; None with a single window or without a baseline
    ppl_delta_high: float | None
    window_nll_file: (
        str  # safetensors beside the result: mean NLL per window in nats, `quantized` and, if there is one, `baseline`
    )

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class Result:
    run_id: str
    status: Literal["ok", "failed"]
    error: str | None  # one sentence; None when ok
    created_utc: str
    qbench_version: str
    command: list[str]  # the overrides that reproduce the point
    config: dict[str, Any]
    environment: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of each phase
    model: ModelRecord | None = None
    quantization: QuantizationRecord | None = None
    evaluation: list[EvaluationRecord] = field(default_factory=list)
    speed: dict[str, float] | None = None  # measured apart from quality
    schema_version: Literal[1] = SCHEMA_VERSION

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    def to_json(self) -> str:
        return _ADAPTER.dump_json(self, indent=1).decode() + "\n"

    @staticmethod
    def from_json(text: str | bytes, source: str = "result") -> Result:
        """Raises ResultError naming `source` and the first thing that is wrong."""
        try:
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise ResultError(f"{source} is not a result of schema version 1: {place}: {first['msg']}") from None

    def summary(self) -> dict[str, Any]:
        """The point in one flat object: the last line on stdout, and the trackers' summary."""
        flat: dict[str, Any] = {
            "run_id": self.run_id,
            "status": self.status,
            "error": self.error,
            "model": self.config.get("model", {}).get("name"),
            "quantizer": self.config.get("quantizer", {}).get("name"),
            "nbits": self.config.get("quantizer", {}).get("nbits"),
            "group_size": self.config.get("quantizer", {}).get("group_size"),
        }
        for record in self.evaluation:
            for key in ("protocol", "ppl", "baseline_ppl", "ppl_delta", "ppl_delta_low", "ppl_delta_high"):
                flat[key] = getattr(record, key)
        if (q := self.quantization) is not None:
            for key in ("bits_per_weight", "packed_bytes", "model_bytes", "coverage", "quant_seconds"):
                flat[key] = getattr(q, key)
            flat["baseline_bytes"] = self.model.baseline_bytes if self.model else None
        return flat


_ADAPTER = TypeAdapter(Result)
