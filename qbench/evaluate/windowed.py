"""Scores a model on windows of one text: perplexity, and divergence from the baseline."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from qbench.config import RuntimeConfig
from qbench.evaluate.divergence import FORM, CompareTop, KeepTop
from qbench.evaluate.protocol import Scores
from qbench.evaluate.score import token_nll
from qbench.evaluate.text import Pages, Text
from qbench.evaluate.windows import Windows, WindowSettings
from qbench.intervals import Estimate, paired_delta, perplexity, positive_mean, verdict
from qbench.record.quality import DivergenceRecord, EvaluationRecord, IntervalRecord, TaskRecord
from qbench.record.store import identity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WindowedEvaluation:
    """One protocol on one text, cut for one tokenizer. A baseline's scores are those of KeepTop."""

    windows: Windows
    source: Text | Pages
    task: WindowSettings
    runtime: RuntimeConfig

    @property
    def ids(self) -> np.ndarray:
        return self.windows.ids

    @property
    def identity(self) -> dict[str, Any]:
        """What a baseline's scores depend on, the model aside."""
        return {
            "protocol": self.windows.protocol,
            "token ids": self.windows.token_ids_sha256,
            "topk": self.topk,
            "form": FORM if self.topk else None,
            "batch_size": self.runtime.batch_size,
        }

    @property
    def topk(self) -> int:
        return self.task.divergence_topk if self.task.divergence else 0

    def score_baseline(self, model: Any) -> Scores:
        ids = self.windows.ids
        if not self.topk:
            return {"token_nll": self._token_nll(model, "evaluating the baseline")}
        keep = KeepTop(len(ids), ids.shape[1] - 1, self.topk)
        nll = self._token_nll(model, "evaluating the baseline", keep)
        size = keep.ids.nbytes + keep.log_probabilities.nbytes
        log.info("the baseline's distributions, top %d of %d positions: %.1f MB", self.topk, nll.size, size / 1e6)
        return {
            "token_nll": nll,
            "top_ids": keep.ids,
            "top_log_p": keep.log_probabilities,
            "tail_log_p": keep.log_tail,
            "most_probable": keep.most_probable,
        }

    def score(self, model: Any, baseline: Scores | None) -> Scores:
        """The quantized model's scores, `[windows, tokens]`; with the baseline's, also the divergence from it."""
        label = "evaluating the quantized model"
        if baseline is None or not self.topk:
            return {"token_nll": self._token_nll(model, label)}
        kept = (baseline[name] for name in ("top_ids", "top_log_p", "tail_log_p", "most_probable"))
        compare = CompareTop(*kept, self.topk)
        nll = self._token_nll(model, label, compare)
        return {
            "token_nll": nll,
            "kl": compare.kl,
            "kl_reverse": compare.kl_reverse,
            "agrees": compare.agrees,
            "squared_change": np.square(np.exp(-nll.astype(float)) - np.exp(-baseline["token_nll"].astype(float))),
        }

    def records(
        self, scores: Scores, baseline: Scores | None, baseline_cached: bool
    ) -> tuple[list[EvaluationRecord], list[TaskRecord], dict[str, Scores]]:
        """What the scores say, and the per-window scores to keep beside it, by file name."""
        per_window = {name: values.mean(1, dtype=float) for name, values in scores.items()}
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
            text_revision=self.source.revision,
            bos_policy=self.windows.bos_policy,
            divergence=self._divergence(scores, per_window, baseline) if baseline and "kl" in scores else None,
        )
        return [record], [], {file: kept}

    def _divergence(self, scores: Scores, per_window: Scores, baseline: Scores) -> DivergenceRecord:
        return DivergenceRecord(
            topk=self.topk,
            tail_mass=float(np.exp(baseline["tail_log_p"]).mean()),
            tokens=scores["kl"].size,
            kl=_interval(positive_mean(per_window["kl"])),
            kl_reverse=_interval(positive_mean(per_window["kl_reverse"])),
            kl_p99=float(np.quantile(scores["kl"], 0.99)),
            top1_agreement=_share(positive_mean(1 - per_window["agrees"])),
            true_token_rms_change=_interval(positive_mean(per_window["squared_change"], power=0.5)),
        )

    def _token_nll(self, model: Any, label: str, watch: KeepTop | CompareTop | None = None) -> np.ndarray:
        return token_nll(model, self.windows.ids, self.runtime.batch_size, label, watch)


def name_of(kept: Scores) -> str:
    """A file name that changes with the content, so that a result never refers to another one's scores."""
    return f"windows-{identity({name: values.tolist() for name, values in kept.items()})}.safetensors"


def _interval(estimate: Estimate) -> IntervalRecord:
    return IntervalRecord(estimate.value, estimate.low, estimate.high)


def _share(opposite: Estimate) -> IntervalRecord:
    """A share from the estimate of what it lacks to one."""
    if opposite.low is None or opposite.high is None:
        return IntervalRecord(1 - opposite.value, None, None)
    return IntervalRecord(1 - opposite.value, max(0.0, 1 - opposite.high), 1 - opposite.low)
