"""Scores a model on lm-eval's tasks: per document, so that every difference to the baseline is paired.

lm-eval's HFLM wraps the live model, quantized or not, and lm-eval's own `evaluate` runs it. Its result tables are taken
as they are; what is added is the perplexity per token of rolling tasks, the difference to the baseline with its
interval, and the flip rate: the share of documents that the quantized model gets right and the baseline wrong, or the
other way round, which an unchanged accuracy hides (SINQ, arXiv 2509.22944, table 2; Dutta et al., arXiv 2407.09141).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from qbench.config import RuntimeConfig, TaskConfig
from qbench.errors import PointError
from qbench.evaluate.lmeval import LoadedTask, seed_everything
from qbench.evaluate.score import first_nonfinite_layer
from qbench.evaluate.windowed import Scores, name_of
from qbench.record.quality import EvaluationRecord, MetricRecord, TaskRecord
from qbench.statistics import Estimate, jackknife, paired_delta, paired_shares, perplexity, share, verdict

# what lm-eval's weighted metrics make of the mean NLL per word or byte
WEIGHTED = {"word_perplexity": np.exp, "byte_perplexity": np.exp, "bits_per_byte": lambda m: m / math.log(2)}


@dataclass(frozen=True)
class TaskEvaluation:
    """lm-eval's tasks with their data, and the tokenizer.

    Scores of a requested name N with leaf tasks T, D documents each:
    `N|METRIC` lm-eval's own number `[1]`; `T/METRIC` `[D]`; for rolling tasks `T/log_likelihood`, `T/tokens` and, for
    each of lm-eval's units, `T/METRIC weight` (words or bytes) `[D]`; `N|documents` and `N|token ids`, sha256 `[32]`.
    """

    tasks: list[LoadedTask]
    tokenizer: Any
    task: TaskConfig
    runtime: RuntimeConfig
    sha256: str
    ids = None  # lm-eval tokenizes each request when its turn comes

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "protocol": " ".join(task.protocol for task in self.tasks),
            "documents": self.sha256,
            "batch_size": self.runtime.batch_size,
        }

    def score_baseline(self, model: Any) -> Scores:
        return self.score(model, None)

    def score(self, model: Any, baseline: Scores | None) -> Scores:
        """Raises PointError, naming task, document and layer, if the model gives NaN or Inf."""
        lm = wrap(model, self.tokenizer, self.task, self.runtime)
        scores: Scores = {}
        for task in self.tasks:
            scores |= _score(task, lm, self.task.limit)
            key = f"{task.name}|documents"
            if baseline is not None and not np.array_equal(scores[key], baseline[key]):
                raise PointError(
                    f"{task.name}: the kept baseline is of other documents; remove it from outputs/baselines"
                )
        return scores

    def records(
        self, scores: Scores, baseline: Scores | None, baseline_cached: bool
    ) -> tuple[list[EvaluationRecord], list[TaskRecord], dict[str, Scores]]:
        """Rolling tasks become perplexities, the others task records; their per-document scores are kept beside."""
        evaluation, tasks, files = [], [], {}
        for task in self.tasks:
            if task.rolling:
                record, file, kept = self._perplexity(task, scores, baseline, baseline_cached)
                evaluation.append(record)
            else:
                record, file, kept = self._task(task, scores, baseline, baseline_cached)
                tasks.append(record)
            files[file] = kept
        return evaluation, tasks, files

    def _perplexity(
        self, task: LoadedTask, scores: Scores, baseline: Scores | None, cached: bool
    ) -> tuple[EvaluationRecord, str, Scores]:
        (leaf,) = task.leaves
        tokens = scores[f"{leaf}/tokens"]
        kept = {"quantized": -scores[f"{leaf}/log_likelihood"] / tokens, "tokens": tokens}
        delta = None
        if baseline is not None:
            kept["baseline"] = -baseline[f"{leaf}/log_likelihood"] / tokens
            delta = paired_delta(kept["quantized"], kept["baseline"], weights=tokens)
        documents = bytes(scores[f"{task.name}|documents"]).hex()
        file = name_of(kept)
        record = EvaluationRecord(
            protocol=task.protocol,
            text_source=task.source,
            text_sha256=documents,
            token_ids_sha256=bytes(scores[f"{task.name}|token ids"]).hex(),
            total_tokens=int(tokens.sum()),
            leading_special_tokens=0 if self.task.add_bos_token is False else self._special_tokens(),
            window_tokens=self.task.window,
            windows=len(tokens),
            dropped_tokens=0,
            scored_tokens=int(tokens.sum()),
            ppl=perplexity(kept["quantized"], tokens),
            baseline_ppl=None if baseline is None else perplexity(kept["baseline"], tokens),
            baseline_cached=cached,
            ppl_delta=delta and delta.value,
            ppl_delta_low=delta and delta.low,
            ppl_delta_high=delta and delta.high,
            window_nll_file=file,
            verdict=delta and verdict(delta, higher_is_better=False),
            text_revision=task.revision,
            bos_policy=self._bos_policy(),
            metrics=_metrics(task, scores, baseline),
        )
        return record, file, kept

    def _task(
        self, task: LoadedTask, scores: Scores, baseline: Scores | None, cached: bool
    ) -> tuple[TaskRecord, str, Scores]:
        kept: Scores = {}
        for whose, values in (("quantized", scores), ("baseline", baseline or {})):
            kept |= {f"{whose}/{k}": v for k, v in values.items() if k.rpartition("/")[0] in task.leaves}
        file = name_of(kept)
        record = TaskRecord(
            protocol=task.protocol,
            task=task.name,
            version=task.version,
            documents=scores[f"{task.name}|number of documents"].item(),
            documents_sha256=bytes(scores[f"{task.name}|documents"]).hex(),
            num_fewshot=next(iter(task.leaves.values())).get_config("num_fewshot"),
            max_length=self.task.window,
            bos_policy=self._bos_policy(),
            text_source=task.source,
            baseline_cached=cached,
            metrics=_metrics(task, scores, baseline),
            scores_file=file,
        )
        return record, file, kept

    def _special_tokens(self) -> int:
        return len(self.tokenizer("a")["input_ids"]) - len(self.tokenizer("a", add_special_tokens=False)["input_ids"])

    def _bos_policy(self) -> str:
        by_itself = f"what the tokenizer adds by itself ({self._special_tokens()} tokens)"
        asked = {None: by_itself, True: "BOS", False: "none"}[self.task.add_bos_token]
        return f"before a text: {asked}; context of a text without any: BOS, else EOS"


def wrap(model: Any, tokenizer: Any, task: TaskConfig, runtime: RuntimeConfig) -> Any:
    """lm-eval's model layer around the live model, with everything said that it would otherwise guess."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # HFLM warns about each argument that a live model settles
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):
        """One progress bar for all rolling windows; HFLM itself draws one for each batch of them."""

        bar: tqdm | None = None

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **batch: Any) -> Any:
            if batch:  # rolling
                self.bar = tqdm(desc="lm-eval", unit="window") if self.bar is None else self.bar
                self.bar.update(len(requests))
            return super()._loglikelihood_tokens(requests, disable_tqdm or bool(batch), **batch)

    wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    return Quiet(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=runtime.batch_size,
        max_length=task.window,
        softmax_dtype=str(wide).removeprefix("torch."),
        add_bos_token=task.add_bos_token,
        device=str(model.device),
    )


@torch.inference_mode()
def _score(task: LoadedTask, lm: Any, limit: int | None) -> Scores:
    from lm_eval import evaluate

    seed_everything()
    results = evaluate(lm, task.loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    own = results.get("groups", {}).get(task.name) or results["results"].get(task.name, {})
    scores = {f"{task.name}|{metric}": np.asarray([own[metric]], float) for metric in own if _is_metric(metric, own)}
    hashes, ids = [], hashlib.sha256()
    for leaf in task.leaves:
        samples = results["samples"][leaf]
        hashes += [[s[k] for k in ("doc_hash", "prompt_hash", "target_hash")] for s in samples]
        for sample in samples:
            _require_finite(leaf, sample, lm)
        by_filter: dict[str, list[dict[str, Any]]] = {}
        for sample in samples:
            by_filter.setdefault(sample["filter"], []).append(sample)
        for name, rows in by_filter.items():
            for metric in rows[0]["metrics"]:
                values = [row.get(metric) for row in rows]
                if task.rolling:
                    pairs = np.asarray(values, float)
                    scores[f"{leaf}/log_likelihood"], scores[f"{leaf}/{metric},{name} weight"] = pairs.T
                elif all(isinstance(value, (int, float, np.number)) for value in values):
                    scores[f"{leaf}/{metric},{name}"] = np.asarray(values, float)
        if task.rolling:
            encoded = [np.asarray(lm.tok_encode(s["arguments"][0][0]), "<i8") for s in samples]
            scores[f"{leaf}/tokens"] = np.asarray([len(e) for e in encoded], float)
            ids.update(np.concatenate(encoded).tobytes())
    scores[f"{task.name}|documents"] = _digest(json.dumps(hashes).encode())
    scores[f"{task.name}|token ids"] = np.frombuffer(ids.digest(), np.uint8)
    count = sum(results["n-samples"][leaf]["effective"] for leaf in task.leaves)
    scores[f"{task.name}|number of documents"] = np.asarray([count])
    return scores


def _metrics(task: LoadedTask, scores: Scores, baseline: Scores | None) -> list[MetricRecord]:
    better = {m: b for leaf in task.leaves.values() for m, b in leaf.higher_is_better().items()}
    found = []
    for key, value in scores.items():
        owner, _, metric = key.partition("|")
        if owner != task.name or "," not in metric:
            continue
        name = metric.removesuffix(",none")
        higher = bool(better.get(metric.partition(",")[0], True))
        delta, flips = _compare(task, metric, scores, baseline) if baseline is not None else (None, None)
        found.append(
            MetricRecord(
                name=name,
                higher_is_better=higher,
                value=value.item(),
                baseline=None if baseline is None else baseline[key].item(),
                delta=delta and delta.value,
                delta_low=delta and delta.low,
                delta_high=delta and delta.high,
                verdict=delta and verdict(delta, higher),
                flip_rate=flips and flips.value,
                flip_rate_low=flips and flips.low,
                flip_rate_high=flips and flips.high,
            )
        )
    return found


def _compare(
    task: LoadedTask, metric: str, scores: Scores, baseline: Scores
) -> tuple[Estimate | None, Estimate | None]:
    """The difference to the baseline over all documents, and the flip rate where documents are right or wrong."""
    bare = metric.partition(",")[0]
    if task.rolling:
        (leaf,) = task.leaves
        unit = WEIGHTED.get(bare)
        if unit is None:
            return None, None
        ours, theirs = (-s[f"{leaf}/log_likelihood"] for s in (scores, baseline))
        weight = scores[f"{leaf}/{metric} weight"]
        return jackknife(lambda q, b, w: unit(q / w) - unit(b / w), ours, theirs, weight), None
    keys = [f"{leaf}/{metric}" for leaf in task.leaves]
    if not all(key in scores for key in keys):  # a metric that is not a mean over documents
        return None, None
    ours, theirs = (np.concatenate([s[key] for key in keys]) for s in (scores, baseline))
    if not np.isin(np.concatenate([ours, theirs]), (0, 1)).all():
        return jackknife(lambda m: m, ours - theirs), None
    return paired_shares(ours, theirs), share(int((ours != theirs).sum()), len(ours))


def _require_finite(leaf: str, sample: dict[str, Any], lm: Any) -> None:
    responses = [response for request in sample["resps"] for response in request]
    numbers = [r[0] if isinstance(r, tuple) else r for r in responses]  # a tuple adds whether it would be generated
    if all(math.isfinite(n) for n in numbers if isinstance(n, float)):
        return
    first = sample["arguments"][0]
    ids = lm.tok_encode("".join(part for part in first if isinstance(part, str)))[: lm.max_length]
    layer = first_nonfinite_layer(lm.model, torch.tensor([ids], device=lm.device))
    where = f"first in the output of {layer}" if layer else "but not when its prompt is run again"
    raise PointError(f"{leaf}: the model gives NaN or Inf in document {sample['doc_id']}, {where}")


def _is_metric(name: str, own: dict[str, Any]) -> bool:
    return "," in name and "_stderr," not in name and isinstance(own[name], (int, float))


def _digest(content: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
