"""Scores a model on lm-eval's tasks: per document, so that every difference to the original is paired.

lm-eval's HFLM wraps the live model, quantized or not, and lm-eval's own `evaluate` runs it. Its result tables are taken
as they are; what is added is the perplexity per token of rolling tasks, the difference to the original with its
interval, and the flip rate: the share of documents that the quantized model gets right and the original wrong, or the
other way round, which an unchanged accuracy hides (SINQ, arXiv 2509.22944, table 2; Dutta et al., arXiv 2407.09141).
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qbench.config import RuntimeConfig
from qbench.errors import PointError
from qbench.evaluate import aggregate, documents, generation, hflm, shots
from qbench.evaluate.compared import compared, kept_scores
from qbench.evaluate.documents import LeafScores, TaskScores
from qbench.evaluate.hflm import wrap
from qbench.evaluate.limits import batch_size
from qbench.evaluate.lmeval import LoadedTask, seed_everything
from qbench.evaluate.protocol import Scores
from qbench.evaluate.windowed import name_of
from qbench.intervals import p_value, paired_delta, perplexity, smallest, verdict
from qbench.layers.linear import held_dense
from qbench.record.quality import ChatRecord, EvaluationRecord, TaskRecord

if TYPE_CHECKING:
    from qbench.evaluate.answers import TaskAsks
    from qbench.evaluate.protocols.lmeval import LmEval

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskEvaluation:
    """lm-eval's tasks with their data, and the tokenizer. Scores are the arrays of documents.py, of all tasks."""

    tasks: list[LoadedTask]
    tokenizer: Any
    task: LmEval
    runtime: RuntimeConfig
    sha256: str
    made_here: set[bytes] = field(default_factory=set, compare=False)  # prompts of what this run scored by itself
    ids = None  # lm-eval tokenizes each request when its turn comes

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "protocol": " ".join(task.protocol for task in self.tasks),
            "documents": self.sha256,
            "revisions": [task.revision for task in self.tasks],
            "batch_size": batch_size(self.runtime, self.runtime.device),
            "arrays": 3 if self.generates else 2,  # the form of what is kept
        } | ({"generate_batch": self.task.generate_batch} if self.generates else {})

    @property
    def generates(self) -> bool:
        return any(generation.generates(leaf) for task in self.tasks for leaf in task.leaves.values())

    def asks(self) -> TaskAsks | None:
        """None where a task generates. Raises PointError for an answer that does not fit into the window."""
        if self.generates:
            return None
        from qbench.evaluate.answers import Recording, TaskAsks

        recording = Recording(self.tokenizer, self.task)
        for task in self.tasks:
            _seed(task)
            if not recording.record(task, self.task.limit):
                return None
        return TaskAsks(recording, batch_size(self.runtime, self.runtime.device), self._told)

    def score_baseline(self, model: Any) -> Scores:
        return self.score(model, None)

    def score(self, model: Any, baseline: Scores | None) -> Scores:
        """Raises PointError, naming task, document and layer, if the model gives NaN or Inf."""
        with held_dense(model) if self.generates else nullcontext():
            return self._told(wrap(model, self.tokenizer, self.task, self.runtime), baseline)

    def _told(self, lm: Any, baseline: Scores | None) -> Scores:
        """What lm-eval makes of a model's answers; raises PointError where the original was asked something else."""
        scores: Scores = {}
        for task in self.tasks:
            scores |= self._sampled(task, lm).arrays(task.name)
            key = f"{task.name}|prompts"
            if baseline is None:
                self.made_here.add(scores[key].tobytes())
            elif not np.array_equal(scores[key], baseline[key]):
                made_here = baseline[key].tobytes() in self.made_here
                raise PointError(
                    hflm.prompts_change(task.name)
                    if made_here
                    else f"{task.name}: the kept reference is of other documents; remove it from outputs/baselines"
                )
            decoding = f"{task.name}|decoding"
            if baseline is not None and decoding in scores and not np.array_equal(scores[decoding], baseline[decoding]):
                raise PointError(f"{task.name}: the variant's generation_config is not the original's")
        return scores

    def _sampled(self, task: LoadedTask, lm: Any) -> TaskScores:
        """The task's scores, over all samples where it is sampled."""
        samples = []
        for sample in range(self.task.samples):
            samples.append(_score(task, lm, self.task, self.task.seed + sample))
            if not np.array_equal(samples[-1].prompts, samples[0].prompts):
                raise PointError(hflm.prompts_change(task.name))
        found = documents.together(samples)
        if not any(map(generation.generates, task.leaves.values())):
            return found
        return replace(found, decoding=self._decoding(task, lm))

    def _decoding(self, task: LoadedTask, lm: Any) -> dict[str, Any]:
        """What the task's answers were generated with; None for what the tasks of a group differ in."""
        settings = [generation.decoding(leaf) for leaf in task.leaves.values() if generation.generates(leaf)]
        shared = {
            key: value if all(s.get(key) == value for s in settings) else None for key, value in settings[0].items()
        }
        seeds = [self.task.seed + sample for sample in range(self.task.samples)] if shared["do_sample"] else []
        model = generation.of_model(getattr(lm, "model", None))
        return {**shared, "batch_size": self.task.generate_batch, "seeds": seeds, "model": model}

    def records(
        self, scores: Scores, baseline: Scores | None, baseline_cached: bool
    ) -> tuple[list[EvaluationRecord], list[TaskRecord], dict[str, Scores]]:
        """Rolling tasks become perplexities, the others task records; their per-document scores are kept beside."""
        evaluation, tasks, files = [], [], {}
        for task in self.tasks:
            ours = TaskScores.of(scores, task.name, task.leaves)
            theirs = None if baseline is None else TaskScores.of(baseline, task.name, task.leaves)
            if theirs is not None:
                ours, theirs = documents.same_answers(ours, theirs)
            if task.rolling:
                record, file, kept = self._perplexity(task, ours, theirs, baseline_cached)
                evaluation.append(record)
            else:
                record, file, kept = self._task(task, ours, theirs, baseline_cached)
                tasks.append(record)
            files[file] = kept
        return evaluation, tasks, files

    def _perplexity(
        self, task: LoadedTask, scores: TaskScores, baseline: TaskScores | None, cached: bool
    ) -> tuple[EvaluationRecord, str, Scores]:
        (ours,) = scores.leaves.values()
        assert ours.log_likelihood is not None
        assert ours.tokens is not None
        kept = {"quantized": -ours.log_likelihood / ours.tokens, "tokens": ours.tokens}
        delta = None
        if baseline is not None:
            (theirs,) = baseline.leaves.values()
            assert theirs.log_likelihood is not None
            kept["baseline"] = -theirs.log_likelihood / ours.tokens
            delta = paired_delta(kept["quantized"], kept["baseline"], weights=ours.tokens)
        file = name_of(kept)
        metrics, _ = compared(task, scores, baseline)
        record = EvaluationRecord(
            protocol=task.protocol,
            text_source=task.source,
            text_sha256=bytes(scores.prompts).hex(),
            token_ids_sha256=bytes(scores.token_ids).hex(),
            total_tokens=int(ours.tokens.sum()),
            leading_special_tokens=0 if self.task.add_bos_token is False else hflm.special_tokens(self.tokenizer),
            window_tokens=self.task.window,
            windows=len(ours.tokens),
            dropped_tokens=0,
            scored_tokens=int(ours.tokens.sum()),
            ppl=perplexity(kept["quantized"], ours.tokens),
            baseline_ppl=None if baseline is None else perplexity(kept["baseline"], ours.tokens),
            baseline_cached=cached,
            ppl_delta=delta and delta.value,
            ppl_delta_low=delta and delta.low,
            ppl_delta_high=delta and delta.high,
            window_nll_file=file,
            verdict=delta and verdict(delta, higher_is_better=False),
            p_value=delta and p_value(delta),
            detectable=delta and smallest(delta),
            text_revision=task.revision,
            bos_policy=hflm.bos_policy(self.tokenizer, self.task),
            metrics=metrics,
        )
        return record, file, kept

    def _task(
        self, task: LoadedTask, scores: TaskScores, baseline: TaskScores | None, cached: bool
    ) -> tuple[TaskRecord, str, Scores]:
        kept: Scores = {}
        for whose, model in (("quantized", scores), ("baseline", baseline)):
            kept |= kept_scores(task, whose, model) if model is not None else {}
        file = name_of(kept)
        metrics, undefined = compared(task, scores, baseline)
        if scores.truncated_prompts:
            log.warning(
                "%s: the prompts of %d of %d documents are longer than task.window=%d and were truncated from the left",
                task.protocol,
                scores.truncated_prompts,
                scores.documents,
                self.task.window,
            )
        if undefined:
            log.warning("%s: left out, being NaN or infinite: %s", task.protocol, ", ".join(undefined))
        record = TaskRecord(
            protocol=task.protocol,
            task=task.name,
            version=task.version,
            documents=scores.documents,
            documents_sha256=bytes(scores.prompts).hex(),
            num_fewshot=task.num_fewshot,
            max_length=self.task.window,
            bos_policy=hflm.bos_policy(self.tokenizer, self.task),
            text_source=task.source,
            baseline_cached=cached,
            metrics=metrics,
            scores_file=file,
            truncated_prompts=scores.truncated_prompts,
            undefined_metrics=undefined,
            chat=self._chat(),
            system_instruction=self.task.system_instruction,
            decoding=scores.decoding,
        )
        return record, file, kept

    def _chat(self) -> ChatRecord | None:
        if not self.task.apply_chat_template:
            return None
        arguments = self.task.chat_template_args or {}
        return ChatRecord(generation.template_sha256(self.tokenizer), self.task.multiturn, arguments)


def _seed(task: LoadedTask, sampling: int = shots.SEED) -> None:
    """`sampling` is the seed of answers that are sampled."""
    seed_everything()
    torch.manual_seed(sampling)
    for leaf in task.leaves.values():
        shots.reset(leaf)


@torch.inference_mode()
def _score(task: LoadedTask, lm: Any, asked: LmEval, seed: int) -> TaskScores:
    from lm_eval import evaluate

    _seed(task, seed)
    lm.truncated.clear()
    try:
        results = evaluate(lm, task.loaded, limit=asked.limit, bootstrap_iters=0, log_samples=True, **asked.prompting)
    except OverflowError:
        raise PointError(f"{task.name}: a perplexity is too large for a number") from None
    own = results.get("groups", {}).get(task.name) or results["results"][task.name]
    numbers = {metric: float(own[metric]) for metric in own if _is_metric(metric, own)}
    if not numbers:
        raise PointError(f"{task.name}: lm-eval gives no number for it")
    hashes, leaves, ids, truncated = [], {}, hashlib.sha256(), 0
    for name, leaf in task.leaves.items():
        samples = results["samples"][name]
        hashes += [[s[k] for k in ("doc_hash", "prompt_hash", "target_hash")] for s in samples]
        for sample in samples:
            hflm.require_finite(name, sample, lm)
        scores = _leaf(leaf, samples, results["results"][name])
        if task.rolling:
            encoded = [np.asarray(lm.tok_encode(s["arguments"][0][0]), "<i8") for s in samples]
            ids.update(np.concatenate(encoded).tobytes())
            scores = replace(scores, tokens=np.asarray([len(e) for e in encoded], float))
        if generation.generates(leaf):  # each document's samples lie once in the list for every filter
            first = [s for s in samples if s["filter"] == samples[0]["filter"]]
            scores = replace(scores, answers=[[list(r) for r in s["resps"]] for s in first])
        leaves[name] = scores
        truncated += hflm.count_truncated(samples, lm.truncated)
    return TaskScores(
        numbers=numbers,
        leaves=leaves,
        prompts=np.frombuffer(hashlib.sha256(json.dumps(hashes).encode()).digest(), np.uint8),
        token_ids=np.frombuffer(ids.digest(), np.uint8),
        truncated_prompts=truncated,
    )


def _leaf(leaf: Any, samples: list[dict[str, Any]], own: dict[str, Any]) -> LeafScores:
    """`samples` are lm-eval's, one for each document and filter; `own` its table of the task."""
    from lm_eval.api.metrics import mean

    scores = LeafScores(own["sample_len"], {metric: float(own[metric]) for metric in own if _is_metric(metric, own)})
    log_likelihood = None
    for metric, number in scores.numbers.items():
        bare, _, filtered = metric.partition(",")
        rows = [sample for sample in samples if sample["filter"] == filtered]
        if not all(bare in row for row in rows):  # not a number of all documents: which ones may differ by model
            continue
        items = [row[bare] for row in rows]
        function = leaf.aggregation().get(bare, mean)
        if leaf.OUTPUT_TYPE == "loglikelihood_rolling":
            log_likelihood = np.asarray(items, float)[:, 0]
        values = aggregate.own_values(function, items)
        if values is not None:
            scores.documents[metric] = values
        elif (added := aggregate.contributions(function, items, number)) is not None:
            scores.contributions[metric] = added
    return replace(scores, log_likelihood=log_likelihood)


def _is_metric(name: str, own: dict[str, Any]) -> bool:
    marked = "," in name and "_stderr," not in name and not name.startswith("bypass,")  # which stands for none
    return marked and isinstance(own[name], (int, float, np.number))
