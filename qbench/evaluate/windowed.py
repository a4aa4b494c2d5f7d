"""Scores a model on windows of one text: perplexity, and divergence from the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qbench.config import RuntimeConfig
from qbench.evaluate import resident
from qbench.evaluate.limits import batch_size
from qbench.evaluate.protocol import Scores
from qbench.evaluate.score import WindowAsks
from qbench.evaluate.text import Pages, Text
from qbench.evaluate.windows import Windows, WindowSettings
from qbench.intervals import Estimate, p_value, paired_delta, perplexity, positive_mean, smallest, verdict
from qbench.record.quality import (
    DivergenceRecord,
    EvaluationRecord,
    IntervalRecord,
    PartRecord,
    TaskRecord,
    histogram_edges,
)
from qbench.record.store import identity

CONFIDENT = 0.5  # the original is, of a position, where its most probable token is at least as probable
BUCKETS, PARTS = 5, 8  # of the original's confidence; of the window
APART = ("confidence", resident.HEAD_INPUTS)  # of the scores, what has no mean per window to be kept beside the result


@dataclass(frozen=True)
class WindowedEvaluation:
    """One protocol on one text, cut for one tokenizer. Scores are those of score.WindowReader."""

    windows: Windows
    source: Text | Pages
    task: WindowSettings
    runtime: RuntimeConfig

    @property
    def ids(self) -> np.ndarray:
        return self.windows.ids

    @property
    def identity(self) -> dict[str, Any]:
        """What the original's scores depend on, the model aside."""
        return {
            "protocol": self.windows.protocol,
            "token ids": self.windows.token_ids_sha256,
            "divergence": self.task.divergence,
            "batch_size": self.asks().batch_size,
        }

    def asks(self) -> WindowAsks:
        return WindowAsks(self.windows.ids, batch_size(self.runtime, self.runtime.device), self.task.divergence)

    def score_baseline(self, model: Any) -> Scores:
        return resident.score(model, self.asks(), "evaluating the original", keep=self.task.divergence)

    def score(self, model: Any, baseline: Scores | None) -> Scores:
        """The quantized model's scores, `[windows, tokens]`; with the original's, also the divergence from it."""
        return resident.score(model, self.asks(), "evaluating the quantized model", baseline)

    def records(
        self, scores: Scores, baseline: Scores | None, baseline_cached: bool
    ) -> tuple[list[EvaluationRecord], list[TaskRecord], dict[str, Scores]]:
        """What the scores say, and the per-window scores to keep beside it, by file name."""
        per_window = {name: values.mean(1, dtype=float) for name, values in scores.items() if name not in APART}
        nll = per_window.pop("token_nll")
        kept = {"quantized": nll} | per_window
        delta = None
        if baseline is not None:
            kept["baseline"] = baseline["token_nll"].mean(1, dtype=float)
            delta = paired_delta(nll, kept["baseline"])
        file = name_of(kept)
        record = EvaluationRecord(
            protocol=self.windows.protocol,
            text_source=self.source.source,
            text_sha256=self.source.sha256,
            token_ids_sha256=self.windows.token_ids_sha256,
            total_tokens=self.windows.total_tokens,
            leading_special_tokens=self.windows.leading_special_tokens,
            window_tokens=self.task.window,
            windows=len(self.windows.ids),
            dropped_tokens=self.windows.dropped_tokens,
            scored_tokens=self.windows.scored_tokens,
            ppl=perplexity(nll),
            baseline_ppl=None if baseline is None else perplexity(kept["baseline"]),
            baseline_cached=baseline_cached,
            ppl_delta=delta and delta.value,
            ppl_delta_low=delta and delta.low,
            ppl_delta_high=delta and delta.high,
            window_nll_file=file,
            verdict=delta and verdict(delta, higher_is_better=False),
            p_value=delta and p_value(delta),
            detectable=delta and smallest(delta),
            text_revision=self.source.revision,
            bos_policy=self.windows.bos_policy,
            divergence=_divergence(scores, per_window) if "kl" in scores else None,
        )
        return [record], [], {file: kept}


def name_of(kept: Scores) -> str:
    """A file name that changes with the content, so that a result never refers to another one's scores."""
    return f"windows-{identity({name: values.tolist() for name, values in kept.items()})}.safetensors"


def _divergence(scores: Scores, per_window: Scores) -> DivergenceRecord:
    kl, confident = scores["kl"].astype(float), scores["confidence"] >= CONFIDENT
    p50, p90, p99, p999 = np.quantile(kl, (0.5, 0.9, 0.99, 0.999)).tolist()
    return DivergenceRecord(
        tokens=kl.size,
        kl_p50=p50,
        kl_p90=p90,
        kl_p99=p99,
        kl_p999=p999,
        kl_max=float(kl.max()),
        confident_share=float(confident.mean()),
        kl_confident=float(kl[confident].mean()) if confident.any() else None,
        kl_unconfident=float(kl[~confident].mean()) if not confident.all() else None,
        by_confidence=_by_confidence(kl, scores["agrees"], scores["confidence"]),
        by_position=_by_position(kl, scores["agrees"]),
        kl_histogram=np.histogram(kl, histogram_edges())[0].tolist(),
        **divergence_intervals(per_window),
    )


def divergence_intervals(per_window: Scores, draws: Scores | None = None) -> dict[str, IntervalRecord]:
    """What a DivergenceRecord holds an interval of, from means per window `[windows]`.

    `draws` holds them per draw, `[windows, draws]`, where the means are over several.
    """

    def of(name: str, turn: Callable[[np.ndarray], np.ndarray] = lambda x: x, power: float = 1.0) -> Estimate:
        return positive_mean(turn(per_window[name]), power, draws=None if draws is None else turn(draws[name]))

    return {
        "kl": _interval(of("kl")),
        "kl_reverse": _interval(of("kl_reverse")),
        "top1_agreement": _share(of("agrees", lambda x: 1 - x)),
        "true_token_rms_change": _interval(of("squared_change", power=0.5)),
    }


def _by_confidence(kl: np.ndarray, agrees: np.ndarray, confidence: np.ndarray) -> list[PartRecord]:
    bucket = np.minimum((confidence * BUCKETS).astype(int), BUCKETS - 1)
    edges = [i / BUCKETS for i in range(BUCKETS + 1)]
    return [_part(edges[i], edges[i + 1], bucket == i, kl, agrees) for i in range(BUCKETS)]


def _by_position(kl: np.ndarray, agrees: np.ndarray) -> list[PartRecord]:
    """Of the scored tokens of all windows, by their place; the first of a window is not scored, and has place 0."""
    place = np.broadcast_to(np.arange(1, kl.shape[1] + 1), kl.shape)
    parts = [part for part in np.array_split(place[0], PARTS) if part.size]
    return [_part(p[0], p[-1], (place >= p[0]) & (place <= p[-1]), kl, agrees) for p in parts]


def _part(low: float, high: float, where: np.ndarray, kl: np.ndarray, agrees: np.ndarray) -> PartRecord:
    some = bool(where.any())
    return PartRecord(
        low=float(low),
        high=float(high),
        share=float(where.mean()),
        kl=float(kl[where].mean()) if some else None,
        top1_changed=float(1 - agrees[where].mean()) if some else None,
    )


def _interval(estimate: Estimate) -> IntervalRecord:
    return IntervalRecord(estimate.value, estimate.low, estimate.high)


def _share(opposite: Estimate) -> IntervalRecord:
    """A share from the estimate of what it lacks to one."""
    if opposite.low is None or opposite.high is None:
        return IntervalRecord(1 - opposite.value, None, None)
    return IntervalRecord(1 - opposite.value, max(0.0, 1 - opposite.high), 1 - opposite.low)
