"""The examples before a question: as many as asked for, the same for every model, and never the question's own answer.

lm-eval draws a task's shots from a split with a random state that goes on from one evaluation to the next; `reset`
puts it back, so that original and variant are shown the same ones, in this run and in any other.
"""

from __future__ import annotations

from typing import Any

from qbench.errors import RequestError

SEED = 1234  # lm-eval's default for shots and sampling


def reset(leaf: Any) -> None:
    """The random state of the task's shots as lm-eval has it at its start."""
    leaf.set_fewshot_seed(seed=SEED)


def give(leaf: Any, asked: int | None, stands_in: bool) -> str:
    """Sets the task's number of shots and returns what the protocol's name says of them: `5shot`.

    `leave1out` follows where shots are scored documents, the one at hand left out, and `leaky` where that one may be
    among them: so some of lm-eval's tasks are made. `stands_in`: one file's documents stand for all splits. Raises
    RequestError where the shots asked for would not be given, or would be those of a file that is scored.
    """
    name, default = leaf.task_name, leaf.get_config("num_fewshot")
    if leaf.OUTPUT_TYPE == "loglikelihood_rolling":
        if asked:
            raise RequestError(f"{name} scores whole documents and takes no shots; leave out task.num_fewshot")
        leaf.set_config(key="num_fewshot", value=0)
        return ""
    if asked and default == 0:  # lm-eval itself would keep 0
        raise RequestError(f"{name} fixes its number of shots at 0, task.num_fewshot={asked} is not given by lm-eval")
    shots = (default or 0) if asked is None else asked
    leaf.set_config(key="num_fewshot", value=shots)
    return f"{shots}shot" + (_origin(leaf, shots, stands_in) if shots else "")


def _origin(leaf: Any, shots: int, stands_in: bool) -> str:
    name, config = leaf.task_name, leaf.config
    fewshot = getattr(leaf, "fewshot_cfg", None)
    if fewshot is None:  # a class of its own, which may draw from anywhere
        if stands_in:
            raise RequestError(f"{name} may draw its {shots} shots from task.path's documents; {_ADVICE}")
        return ""
    pool = getattr(getattr(leaf, "sampler", None), "df", None) or []
    if fewshot.split is None and fewshot.samples is not None:  # a list that the task brings along
        _require(name, shots, len(pool))
        return ""
    drawn = fewshot.split or config.training_split or config.validation_split or config.test_split
    scored = config.test_split or config.validation_split
    same = stands_in or drawn == scored
    left_out = same and fewshot.split == config.test_split and _holds_all(pool, leaf.eval_docs)
    if stands_in and not left_out:
        raise RequestError(
            f"{name} draws its {shots} shots from the documents of task.path, which are scored, answers included; "
            + _ADVICE
        )
    _require(name, shots, len(pool) - bool(left_out))
    return ("-leave1out" if left_out else "-leaky") if same else ""


_ADVICE = "ask for task.num_fewshot=0, or define a task with a split for shots in task.include_path=DIR"


def _require(name: str, shots: int, there: int) -> None:
    if shots > there:
        raise RequestError(f"{name} has {there} documents to draw shots from, {shots} are asked for")


def _holds_all(pool: Any, documents: Any) -> bool:
    """Whether lm-eval, which leaves a scored document out by comparing it, will find every one in the pool."""
    known = {repr(document) for document in pool}
    return all(repr(document) in known for document in documents)
