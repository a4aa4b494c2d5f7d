"""What a result says of speed: tokens per second, memory and energy of prefill and decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qbench.record.strict import Strict


@dataclass(frozen=True)
class SpreadRecord(Strict):
    """Over the repeats of a measurement."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class PhaseRecord(Strict):
    """Prefill or decode of one model; tokens are counted over the whole batch."""

    tokens_per_second: SpreadRecord
    method: Literal["eager", "cuda graph"]
    eager_because: str | None  # why a decode on a GPU is not a CUDA graph; None otherwise
    peak_alloc_bytes: int | None  # of the CUDA allocator, weights included; None on a CPU
    peak_rss_bytes: int | None  # of the whole process, on a CPU; None on a GPU and where it cannot be reset
    joules_per_token: float | None  # of the whole GPU, by NVML; None where there is none


@dataclass(frozen=True)
class InferenceRecord(Strict):
    prefill: PhaseRecord
    decode: PhaseRecord


@dataclass(frozen=True)
class SpeedRecord(Strict):
    """Both models in one run, at the same shapes, so that their ratio means something."""

    batch_size: int  # sequences
    prefill_tokens: int  # of each sequence, in one forward pass
    context_tokens: int  # in the cache of each sequence when decoding starts
    decode_tokens: int  # of each sequence, one after the other
    repeats: int  # timed, after a warm-up
    quantized: InferenceRecord
    baseline: InferenceRecord | None  # None for a packed checkpoint, whose original is not at hand
