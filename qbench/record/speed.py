"""What a result says of speed: tokens per second, memory and energy of prefill and decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qbench.record.strict import Strict

Method = Literal["eager", "cuda graph", "compiled"]  # on a GPU what is compiled is replayed as a CUDA graph too


@dataclass(frozen=True)
class SpreadRecord(Strict):
    """Over the repeats of a measurement."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class WayRecord(Strict):
    """One way in which a phase was run, or why it could not be."""

    method: Method
    tokens_per_second: SpreadRecord | None  # None: refused
    refused: str | None  # one line
    attention: str | None  # what attends: transformers' name of it, or ours
    experts: (
        str | None
    )  # transformers' way of multiplying a mixture's 16-bit experts; None for packed ones, and without
    compile_seconds: float | None  # of the first step, compilation included
    difference: float | None  # ||logits - eager logits|| / ||eager logits|| of a step that was compiled


@dataclass(frozen=True)
class PhaseRecord(Strict):
    """Prefill or decode of one model, in the fastest of its ways; tokens are counted over the whole batch."""

    tokens_per_second: SpreadRecord
    method: Method
    eager_because: str | None  # why nothing but eager steps could be timed on a GPU; None otherwise
    peak_alloc_bytes: int | None  # of the CUDA allocator, weights included; None on a CPU
    peak_rss_bytes: int | None  # of the whole process, on a CPU; None on a GPU and where it cannot be reset
    joules_per_token: float | None  # of the whole GPU, by NVML; None where there is none
    ways: tuple[
        WayRecord, ...
    ] = ()  # all that were tried, in that order; none in a record from before there were several


@dataclass(frozen=True)
class InferenceRecord(Strict):
    prefill: PhaseRecord
    decode: PhaseRecord
    more_prefill: tuple[PhaseRecord, ...] = ()  # of the other lengths that were asked for


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
    more_prefill_tokens: tuple[int, ...] = ()  # the other lengths, in the order of `more_prefill`
