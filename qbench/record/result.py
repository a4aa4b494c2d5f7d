"""The result of one point: frozen dataclasses with the unit in every field's name, written and read as JSON.

Reading validates: an unknown or missing field, a wrong type or another schema version is an error, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, Self

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
    # by stored tensor: codes, scale, zero, input_scale, codebook, permutation; an input scale that is listed here is
    # stored with the codes, as that of every method is: none is folded into the layer before
    stored_bytes: dict[str, int] = field(default_factory=dict)

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class SkippedRow:
    """A linear weight that stays in 16 bit."""

    name: str
    weights: int
    reason: str

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a loaded model by component, counted from the buffers as stored, each once: tied weights are shared."""

    codes: int = 0
    scale: int = 0
    zero: int = 0
    input_scale: int = 0
    codebook: int = 0
    permutation: int = 0
    linears: int = 0  # linear weights that are not quantized, in the precision of the run
    embeddings: int = 0
    head: int = 0  # 0 when it is tied to the embeddings
    rest: int = 0  # norms, biases, rotary frequencies

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    @property
    def aux(self) -> int:
        return self.scale + self.zero + self.input_scale + self.codebook + self.permutation


@dataclass(frozen=True)
class ModelRecord:
    name: str
    fingerprint: str
    note: str  # what a reader of its numbers must know; empty for an ordinary checkpoint
    parameters: int
    linear_weights: int  # that count for coverage
    baseline_bytes: int  # every parameter at 16 bit, tied ones once
    weight_bytes: WeightBytes | None = None  # of the baseline as loaded; None for a packed checkpoint

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
    weight_bytes: WeightBytes | None = None  # of the quantized model as it ran

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    @property
    def weight_error(self) -> float | None:
        """Mean over the layers of their relative errors; None for a packed checkpoint."""
        return sum(row.relative_error for row in self.layers) / len(self.layers) if self.layers else None


Verdict = Literal["better", "worse", "not distinguishable"]


@dataclass(frozen=True)
class IntervalRecord:
    """A mean over windows with its 95 % interval; the bounds are None for a single window."""

    value: float
    low: float | None
    high: float | None

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class DivergenceRecord:
    """How far the quantized model's next-token distributions are from the baseline's; zero and one for equal models."""

    topk: int  # baseline probabilities kept per position; the others, the tail, are sampled
    tail_mass: float  # mean probability of the tail; 0 where topk covers the vocabulary, and everything is exact
    tokens: int  # positions compared
    kl: IntervalRecord  # KL(baseline || quantized), nats per token
    kl_reverse: IntervalRecord  # KL(quantized || baseline), nats per token
    kl_p99: float  # 99th percentile over tokens, nats
    top1_agreement: IntervalRecord  # share of the positions where both find the same token most probable
    true_token_rms_change: IntervalRecord  # root mean square change of the probability of the token that follows

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class MetricRecord:
    """A metric as lm-eval reports it, under its own name, and its paired difference to the baseline."""

    name: str  # such as acc_norm or word_perplexity; `exact_match,strict-match` where the task has filters
    higher_is_better: bool
    value: float
    baseline: float | None = None
    delta: float | None = None  # value - baseline
    delta_low: float | None = None  # 95 % interval over documents
    delta_high: float | None = None
    verdict: Verdict | None = None
    flip_rate: float | None = None  # share of the documents that turned right or wrong; for metrics of right and wrong
    flip_rate_low: float | None = None
    flip_rate_high: float | None = None

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class EvaluationRecord:
    """A perplexity. The windows of lm-eval's rolling tasks are documents; `metrics` holds lm-eval's own numbers."""

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
    ppl: float  # per token
    baseline_ppl: float | None  # None for a packed checkpoint, whose original is not at hand
    baseline_cached: bool
    ppl_delta: float | None  # ppl - baseline_ppl; None without a baseline
    ppl_delta_low: float | None  # 95 % paired interval; None with a single window or without a baseline
    ppl_delta_high: float | None
    window_nll_file: str  # safetensors beside the result: mean NLL per window in nats, `quantized` and `baseline`, ...
    verdict: Verdict | None = None
    text_revision: str | None = None  # commit of the Hub dataset; None for a local or embedded text
    bos_policy: str = ""
    divergence: DivergenceRecord | None = None  # None without a baseline, or where the protocol has none
    metrics: list[MetricRecord] = field(default_factory=list)  # word_perplexity, byte_perplexity, bits_per_byte

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class TaskRecord:
    """An lm-eval task that is not a perplexity; a group of tasks is one record, over all of its documents."""

    protocol: str
    task: str  # lm-eval's name
    version: str
    documents: int
    documents_sha256: str  # of lm-eval's hashes of every document, prompt and target
    num_fewshot: int
    max_length: int
    bos_policy: str
    text_source: str
    baseline_cached: bool
    metrics: list[MetricRecord]
    scores_file: str  # safetensors beside the result: `TASK/METRIC` per document, `quantized/...` and `baseline/...`

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class SpreadRecord:
    """Over the repeats of a measurement."""

    median: float
    min: float
    max: float

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class PhaseRecord:
    """Prefill or decode of one model; tokens are counted over the whole batch."""

    tokens_per_second: SpreadRecord
    method: Literal["eager", "cuda graph"]
    eager_because: str | None  # why a decode on a GPU is not a CUDA graph; None otherwise
    peak_alloc_bytes: int | None  # of the CUDA allocator, weights included; None on a CPU
    peak_rss_bytes: int | None  # of the whole process, on a CPU; None on a GPU and where it cannot be reset
    joules_per_token: float | None  # of the whole GPU, by NVML; None where there is none

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class InferenceRecord:
    prefill: PhaseRecord
    decode: PhaseRecord

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass(frozen=True)
class SpeedRecord:
    """Both models in one run, at the same shapes, so that their ratio means something."""

    batch_size: int  # sequences
    prefill_tokens: int  # of each sequence, in one forward pass
    context_tokens: int  # in the cache of each sequence when decoding starts
    decode_tokens: int  # of each sequence, one after the other
    repeats: int  # timed, after a warm-up
    quantized: InferenceRecord
    baseline: InferenceRecord | None  # None for a packed checkpoint, whose original is not at hand

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
    tasks: list[TaskRecord] = field(default_factory=list)
    speed: SpeedRecord | None = None  # measured apart from quality, and only if asked for
    schema_version: Literal[1] = SCHEMA_VERSION

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    def to_json(self) -> str:
        return _adapter(type(self)).dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "result") -> Self:
        """Raises ResultError naming `source` and the first thing that is wrong."""
        try:
            return _adapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise ResultError(f"{source} is not a result of schema version 1: {place}: {first['msg']}") from None

    def files(self) -> set[str]:
        """The safetensors files beside the result that it refers to."""
        return {record.window_nll_file for record in self.evaluation} | {record.scores_file for record in self.tasks}

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
        for index, record in enumerate(self.evaluation):
            prefix = f"{record.protocol}/" if index else ""  # the first one, nearly always the only one, has none
            for key in ("protocol", "ppl", "baseline_ppl", "ppl_delta", "ppl_delta_low", "ppl_delta_high", "verdict"):
                flat[prefix + key] = getattr(record, key)
            if record.divergence is not None:
                for key in ("kl", "kl_reverse", "top1_agreement", "true_token_rms_change"):
                    flat[prefix + key] = getattr(record.divergence, key).value
            flat |= {prefix + metric.name: metric.value for metric in record.metrics}
        for record in self.tasks:
            for metric in record.metrics:
                flat[f"{record.protocol}/{metric.name}"] = metric.value
                for key in ("delta", "delta_low", "delta_high", "verdict", "flip_rate"):
                    if getattr(metric, key) is not None:
                        flat[f"{record.protocol}/{metric.name}_{key}"] = getattr(metric, key)
        if (q := self.quantization) is not None:
            for key in ("bits_per_weight", "packed_bytes", "model_bytes", "coverage", "quant_seconds"):
                flat[key] = getattr(q, key)
            flat["aux_bytes"] = q.weight_bytes.aux if q.weight_bytes else None
            flat["baseline_bytes"] = self.model.baseline_bytes if self.model else None
        for whose in ("quantized", "baseline"):
            record = getattr(self.speed, whose, None)
            for phase in ("prefill", "decode") if record else ():
                measured, name = getattr(record, phase), phase if whose == "quantized" else f"baseline_{phase}"
                flat[f"{name}_tokens_per_second"] = measured.tokens_per_second.median
                for key in ("peak_alloc_bytes", "peak_rss_bytes", "joules_per_token"):
                    if (value := getattr(measured, key)) is not None:
                        flat[f"{name}_{key}"] = value
        return flat


@cache
def _adapter(kind: type[Result]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
