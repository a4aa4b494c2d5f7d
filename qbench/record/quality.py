"""What a result says of quality: perplexities, divergence from the original and task metrics, with their intervals.

Every number says how it is read off what its windows or documents add (`Reading`), and how people call it; reports
compare and show numbers by that, and by no metric's name. So a protocol of a third party may record any kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from qbench.record.strict import Strict

Verdict = Literal["better", "worse", "not distinguishable"]
Reading = Literal["mean", "exp mean"]  # of what windows or documents add; a perplexity is exp of a mean NLL


def read_mean(reading: Reading, mean: np.ndarray) -> np.ndarray:
    """The number, or several, that a mean over windows or documents stands for."""
    return np.exp(mean) if reading == "exp mean" else mean


@dataclass(frozen=True)
class IntervalRecord(Strict):
    """A mean over windows with its 95 % interval; the bounds are None for a single window."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PartRecord(Strict):
    """Some of the positions: those of like confidence of the original, or of like place in their window."""

    low: float  # confidence: of the original's most probable token; place: the first token's, counted from 1
    high: float  # confidence: below which, or 1; place: the last token's
    share: float  # of all positions
    kl: float | None  # KL(baseline || quantized), nats per token; None where there is no such position
    top1_changed: float | None  # share of its positions where another token is the most probable one


@dataclass(frozen=True)
class DivergenceRecord(Strict):
    """How far the quantized model's next-token distributions are from the original's; zero and one for equal models."""

    tokens: int  # positions compared, each over the whole vocabulary
    kl: IntervalRecord  # KL(baseline || quantized), nats per token
    kl_reverse: IntervalRecord  # KL(quantized || baseline), nats per token
    # over tokens, of KL(baseline || quantized), nats: a few tokens make most of a mean, and these say how few
    kl_p50: float
    kl_p90: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    # the same as means, where the original's most probable token has at least half of the probability, and elsewhere
    confident_share: float  # of the tokens
    kl_confident: float | None  # None where there is no such token
    kl_unconfident: float | None
    top1_agreement: IntervalRecord  # share of the positions where both find the same token most probable
    true_token_rms_change: IntervalRecord  # root mean square change of the probability of the token that follows
    by_confidence: list[PartRecord] = field(default_factory=list)  # five buckets of the original's
    by_position: list[PartRecord] = field(default_factory=list)  # eight parts of the window: does damage add up?
    kl_histogram: list[int] = field(default_factory=list)  # positions, of all draws, by KL between `histogram_edges()`


def histogram_edges() -> np.ndarray:
    """Of `kl_histogram`, nats: five bins a decade from 1e-8 to 100; the outer ones hold what lies beyond, and zero."""
    return np.concatenate([[-np.inf], np.round(10.0 ** np.arange(-8, 2.1, 0.2), 12), [np.inf]])


def detected(verdict: Verdict | None, detectable: float | None, digits: int) -> str:
    """What stands beside a verdict that nothing could be told: the smallest difference that could have been."""
    if verdict != "not distinguishable":
        return ""
    if not detectable:  # a single window; or two models that are one
        return "not distinguishable"
    return f"not distinguishable; a difference of {detectable:.{digits}f} would be, 4 times in 5"


@dataclass(frozen=True)
class MetricRecord(Strict):
    """A number under its own name, such as lm-eval's for a metric, and its paired difference to the original."""

    name: str  # such as acc_norm or word_perplexity; `exact_match,strict-match` where the task has filters
    higher_is_better: bool
    value: float
    baseline: float | None = None
    delta: float | None = None  # value - baseline
    delta_low: float | None = None  # 95 % interval over documents; None where what each of them adds is not known
    delta_high: float | None = None
    verdict: Verdict | None = None
    flip_rate: float | None = None  # share of the documents that turned right or wrong; for metrics of right and wrong
    flip_rate_low: float | None = None
    flip_rate_high: float | None = None
    reading: Reading = "mean"
    title: str | None = None  # as people call it; None: by its name
    p_value: float | None = None  # of the difference: exact McNemar for right and wrong, else Student's t; two-sided
    detectable: float | None = None  # the smallest true difference that this test finds 4 times in 5, at the 5 % level
    draws: list[float] | None = None  # the number in each draw of calibration text or seed; `value` is of their mean
    samples: list[float] | None = None  # the number in each sample of answers; `value` is their mean
    turned_right: int | None = None  # documents, of a metric of right and wrong without draws and samples
    turned_wrong: int | None = None
    flip_rate_alone: float | None = None  # of the original with itself, between two of its samples
    kinds: dict[str, float] | None = None  # the number of each kind of text, by name, where it is a mean over kinds

    @property
    def called(self) -> str:
        return self.title if self.title is not None else self.name

    @property
    def loss(self) -> float:
        """The value, turned so that smaller is better."""
        return -self.value if self.higher_is_better else self.value

    @property
    def worst_kind(self) -> str | None:
        """The kind of text whose number is the worst; None of a perplexity, which says how hard a text is."""
        if not self.kinds or self.reading == "exp mean":
            return None
        return (min if self.higher_is_better else max)(self.kinds, key=self.kinds.__getitem__)

    @property
    def digits(self) -> int:
        """After the point, where people read it: a perplexity is a number of some tens, most others are of one."""
        return 3 if self.reading == "exp mean" else 4

    @property
    def spread(self) -> float | None:
        """Standard deviation over draws of the number in each."""
        return _spread(self.draws)

    @property
    def sample_spread(self) -> float | None:
        """The same over samples of answers."""
        return _spread(self.samples)


def _spread(numbers: list[float] | None) -> float | None:
    return None if numbers is None or len(numbers) < 2 else float(np.std(numbers, ddof=1))


@dataclass(frozen=True)
class EvaluationRecord(Strict):
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
    ppl_delta: float | None  # ppl - baseline_ppl; None without an original
    ppl_delta_low: float | None  # 95 % paired interval; None with a single window or without an original
    ppl_delta_high: float | None
    window_nll_file: str  # safetensors beside the result: mean NLL per window in nats, `quantized` and `baseline`, ...
    verdict: Verdict | None = None
    text_revision: str | None = None  # commit of the Hub dataset; None for a local or embedded text
    bos_policy: str = ""
    divergence: DivergenceRecord | None = None  # None without an original, or where the protocol has none
    metrics: list[MetricRecord] = field(default_factory=list)  # word_perplexity, byte_perplexity, bits_per_byte
    p_value: float | None = None  # these three as a MetricRecord's
    detectable: float | None = None
    draws: list[float] | None = None

    @property
    def perplexity(self) -> MetricRecord:
        """As a number like any other."""
        return MetricRecord(
            name="ppl",
            higher_is_better=False,
            value=self.ppl,
            baseline=self.baseline_ppl,
            delta=self.ppl_delta,
            delta_low=self.ppl_delta_low,
            delta_high=self.ppl_delta_high,
            verdict=self.verdict,
            reading="exp mean",
            title="perplexity",
            p_value=self.p_value,
            detectable=self.detectable,
            draws=self.draws,
        )


@dataclass(frozen=True)
class ChatRecord(Strict):
    """How questions were put to a chat model."""

    template_sha256: str  # of the tokenizer's chat template
    multiturn: bool  # shots as turns of their own
    arguments: dict[str, Any]  # that the template was given


@dataclass(frozen=True)
class TaskRecord(Strict):
    """An lm-eval task that is not a perplexity; a group of tasks that aggregates is one record, as it aggregates."""

    protocol: str
    task: str  # lm-eval's name
    version: str
    documents: int
    documents_sha256: str  # of lm-eval's hashes of every document, prompt and target
    num_fewshot: int | None  # None where the tasks of a group differ; the protocol names all
    max_length: int
    bos_policy: str
    text_source: str
    baseline_cached: bool
    metrics: list[MetricRecord]
    # safetensors beside the result, `quantized/TASK/METRIC,FILTER` and `baseline/...`: what each document adds to the
    # metric of the task or group, its own value for a mean; the mean of what they add is the metric
    scores_file: str
    truncated_prompts: int = 0  # documents whose prompt was longer than max_length and lost its beginning
    undefined_metrics: list[str] = field(default_factory=list)  # NaN or infinite, and so not among the metrics
    chat: ChatRecord | None = None  # None: questions are plain text
    system_instruction: str | None = None
    # of a task that generates: lm-eval's generation_kwargs with defaults (None: the tasks of a group differ), the batch
    # size, the seeds of samples, and what the model's generation_config sets besides
    decoding: dict[str, Any] | None = None
