"""What a result says of speed: tokens per second, memory and energy of prefill and decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
    ways: tuple[WayRecord, ...] = ()  # all that were tried, in that order; older records have none

    def rate(self, method: Method) -> SpreadRecord | None:
        """The tokens per second of a method, the faster way of multiplying experts counting; None if it was refused."""
        rates = [w.tokens_per_second for w in self.ways if w.method == method and w.tokens_per_second is not None]
        return max(rates, key=lambda spread: spread.median, default=None)

    def refusals(self, method: Method) -> list[str]:
        """Why a method was refused; nothing where it gave a number."""
        return [] if self.rate(method) else [w.refused for w in self.ways if w.method == method and w.refused]


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

    def summary(self) -> dict[str, Any]:
        """Flat: the numbers of every phase, the original's as `baseline_*`, and those of each way that gave one."""
        flat: dict[str, Any] = {}
        for whose, record in (("", self.quantized), ("baseline_", self.baseline)):
            if record is None:
                continue
            more = zip(self.more_prefill_tokens, record.more_prefill, strict=True)
            phases = {"prefill": record.prefill, "decode": record.decode} | {f"prefill_{n}": one for n, one in more}
            for name, phase in phases.items():
                flat[f"{whose}{name}_tokens_per_second"] = phase.tokens_per_second.median
                flat[f"{whose}{name}_method"] = phase.method
                for method in dict.fromkeys(way.method for way in phase.ways):
                    if (rate := phase.rate(method)) is not None:
                        flat[f"{whose}{name}_{method.replace(' ', '_')}_tokens_per_second"] = rate.median
                for key in ("peak_alloc_bytes", "peak_rss_bytes", "joules_per_token"):
                    if (value := getattr(phase, key)) is not None:
                        flat[f"{whose}{name}_{key}"] = value
        return flat
