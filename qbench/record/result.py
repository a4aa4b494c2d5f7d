"""The result of one point: frozen dataclasses with the unit in every field's name, written and read as JSON.

What it consists of is in identity.py, quantization.py, quality.py and speed.py beside this file. Reading validates all
of it: an unknown or missing field, a wrong type or another schema version is an error, never a guess. Results of
schema version 1 have no identity, so nobody can say what they are measurements of: they are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Self

from pydantic import TypeAdapter, ValidationError

from qbench.record.identity import Identity
from qbench.record.quality import EvaluationRecord, MetricRecord, TaskRecord
from qbench.record.quantization import ModelRecord, QuantizationRecord
from qbench.record.speed import SpeedRecord
from qbench.record.strict import Strict

SCHEMA_VERSION = 2


class ResultError(ValueError):
    """A result file that cannot be read; the sentence says which and why."""


@dataclass(frozen=True)
class Result(Strict):
    run_id: str  # of the identity and the qbench version
    status: Literal["ok", "failed"]
    error: str | None  # one sentence; None when ok
    created_utc: str
    qbench_version: str
    command: list[str]  # the overrides that reproduce the point
    config: dict[str, Any]  # what was asked for, for people; what it is a measurement of is the identity
    identity: Identity
    environment: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of each phase; load and baseline are the pass's
    pass_id: str | None = None  # of the pass that it was measured in with others, which shared load and baseline
    pass_points: int = 1  # that the pass measured
    model: ModelRecord | None = None
    quantization: QuantizationRecord | None = None
    evaluation: list[EvaluationRecord] = field(default_factory=list)
    tasks: list[TaskRecord] = field(default_factory=list)
    speed: SpeedRecord | None = None  # measured apart from quality, and only if asked for
    schema_version: Literal[2] = SCHEMA_VERSION

    def to_json(self) -> str:
        return _adapter(type(self)).dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "result") -> Self:
        """Raises ResultError naming `source` and the first thing that is wrong."""
        try:
            return _adapter(cls).validate_json(text)
        except ValidationError as error:
            wrong = _other_version(text) or first_error(error)
            raise ResultError(f"{source} is not a result of schema version {SCHEMA_VERSION}: {wrong}") from None

    def files(self) -> set[str]:
        """The safetensors files beside the result that it refers to."""
        return {record.window_nll_file for record in self.evaluation} | {record.scores_file for record in self.tasks}

    def numbers(self) -> Iterator[tuple[str, str, MetricRecord]]:
        """(protocol, hash of the text or documents, number): the perplexities, then every metric of the tasks."""
        for record in self.evaluation:
            yield record.protocol, record.text_sha256, record.perplexity
        for task in self.tasks:
            for metric in task.metrics:
                yield task.protocol, task.documents_sha256, metric

    def summary(self) -> dict[str, Any]:
        """The point in one flat object: the last line on stdout, and the trackers' summary."""
        flat: dict[str, Any] = {
            "run_id": self.run_id,
            "status": self.status,
            "error": self.error,
            "model": self.config.get("model", {}).get("name"),
            "fingerprint": self.identity.weights,
            "text_sha256": self.identity.text_sha256,
            "device": self.identity.device,
            "dtype": self.identity.dtype,
            "quantizer": self.config.get("quantizer", {}).get("name"),
            "nbits": self.config.get("quantizer", {}).get("nbits"),
            "group_size": self.config.get("quantizer", {}).get("group_size"),
        }
        if self.identity.transform is not None:
            flat["transform"] = self.identity.transform["name"]
        for index, record in enumerate(self.evaluation):
            prefix = f"{record.protocol}/" if index else ""  # the first one, nearly always the only one, has none
            for key in ("protocol", "ppl", "baseline_ppl", "ppl_delta", "ppl_delta_low", "ppl_delta_high", "verdict"):
                flat[prefix + key] = getattr(record, key)
            for key in ("p_value", "detectable"):
                if getattr(record, key) is not None:
                    flat[prefix + key] = getattr(record, key)
            if record.draws is not None:
                flat |= {prefix + "draws": len(record.draws), prefix + "ppl_spread": record.perplexity.spread}
            if record.divergence is not None:
                for key in ("kl", "kl_reverse", "top1_agreement", "true_token_rms_change"):
                    flat[prefix + key] = getattr(record.divergence, key).value
                flat[prefix + "kl_p99"] = record.divergence.kl_p99
            flat |= {prefix + metric.name: metric.value for metric in record.metrics}
        for record in self.tasks:
            for metric in record.metrics:
                flat[f"{record.protocol}/{metric.name}"] = metric.value
                for key in (
                    "delta",
                    "delta_low",
                    "delta_high",
                    "verdict",
                    "p_value",
                    "detectable",
                    "flip_rate",
                    "spread",
                    "worst_kind",
                ):
                    if getattr(metric, key) is not None:
                        flat[f"{record.protocol}/{metric.name}_{key}"] = getattr(metric, key)
        if (q := self.quantization) is not None:
            for key in ("bits_per_weight", "embedding_bits", "head_bits", "packed_bytes", "model_bytes", "coverage"):
                flat[key] = getattr(q, key)
            flat["quant_seconds"] = q.quant_seconds
            if q.transform is not None:
                flat |= {"transform_coverage": q.transform.coverage, "transform_moved": q.transform.moved}
            if q.file is not None:
                flat |= {"file": q.file.name, "made_by": q.file.made_by, "file_bytes": q.file.file_bytes}
            flat["aux_bytes"] = q.weight_bytes.aux if q.weight_bytes else None
            flat["baseline_bytes"] = self.model.baseline_bytes if self.model else None
        return flat if self.speed is None else flat | self.speed.summary()


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"


def _other_version(text: str | bytes) -> str | None:
    """The version of a document that has another one, which says more than the first field that it lacks."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if not isinstance(version, int) or version == SCHEMA_VERSION:
        return None
    return f"schema_version: it is of version {version}; measure the point again"


@cache
def _adapter(kind: type[Result]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
