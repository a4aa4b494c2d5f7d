"""The examples before a question: as many as asked for, the same for every model, and never the question's own answer.

lm-eval draws a task's shots from a split with a random state that goes on from one evaluation to the next; `reset`
puts it back, so that original and variant are shown the same ones, in this run and in any other.

Where one file stands for all splits (task.path), lm-eval would draw the shots from the documents that it scores and
leave the one at hand out only if the task says that both are of one split. `give` says so for the task.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from qbench.errors import RequestError

log = logging.getLogger(__name__)

SEED = 1234  # lm-eval's default for shots and sampling


def reset(leaf: Any) -> None:
    """The random state of the task's shots as lm-eval has it at its start."""
    leaf.set_fewshot_seed(seed=SEED)


def give(leaf: Any, asked: int | None, stands_in: bool) -> str:
    """Sets the task's number of shots and returns what the protocol's name says of them: `5shot`.

    `leave1out` follows where shots are scored documents, the one at hand left out, and `leaky` where that one may be
    among them: so some of lm-eval's tasks are made. `stands_in`: one file's documents stand for all splits. Raises
    RequestError where the shots asked for cannot be given, or would show a question's own answer out of that file.
    """
    name, default = leaf.task_name, leaf.get_config("num_fewshot")
    if leaf.OUTPUT_TYPE == "loglikelihood_rolling":
        if asked:
            raise RequestError(f"{name} scores whole documents and takes no shots; leave out task.num_fewshot")
        leaf.set_config(key="num_fewshot", value=0)
        return ""
    if asked and default == 0:
        log.warning("%s fixes 0 shots, which lm-eval keeps; it gets the %d of task.num_fewshot here", name, asked)
    shots = (default or 0) if asked is None else asked
    leaf.set_config(key="num_fewshot", value=shots)
    reset(leaf)
    return f"{shots}shot" + (_origin(leaf, shots, stands_in) if shots else "")


def _origin(leaf: Any, shots: int, stands_in: bool) -> str:
    from lm_eval.api.samplers import ContextSampler, FirstNSampler

    name, config = leaf.task_name, leaf.config
    fewshot, sampler = getattr(leaf, "fewshot_cfg", None), getattr(leaf, "sampler", None)
    refusal = RequestError(
        f"{name} draws its {shots} shots from the documents of task.path, which are scored, and may show a question's "
        "own answer; ask for task.num_fewshot=0, or define a task with a split for shots in task.include_path=DIR"
    )
    if fewshot is None:  # a class of its own, which may draw from anywhere
        if stands_in:
            raise refusal
        return ""
    pool = Counter(map(repr, getattr(sampler, "df", None) or []))
    if fewshot.split is None and fewshot.samples is not None:  # a list that the task brings along
        _require(name, shots, pool.total())
        return ""
    drawn = fewshot.split or config.training_split or config.validation_split or config.test_split
    if not stands_in and drawn != (config.test_split or config.validation_split):
        _require(name, shots, pool.total())
        return ""
    if stands_in:
        fewshot.split = config.test_split  # equal ones: then lm-eval leaves the scored document out
    # it does so by comparing documents, in its own two samplers
    left_out = fewshot.split == config.test_split and type(sampler) in (ContextSampler, FirstNSampler)
    left_out = left_out and all(repr(document) in pool for document in leaf.eval_docs)
    if stands_in and not left_out:
        raise refusal
    _require(name, shots, pool.total() - (max(pool.values()) if left_out and pool else 0))
    return "-leave1out" if left_out else "-leaky"


def _require(name: str, shots: int, there: int) -> None:
    if shots > there:
        raise RequestError(f"{name} has {there} documents to draw {shots} shots from; lower task.num_fewshot")
