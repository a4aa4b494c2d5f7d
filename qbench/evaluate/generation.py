"""How lm-eval's tasks put their questions to a chat model and have the answers generated: what is checked and recorded.

Questions go through the tokenizer's own chat template, shots as turns of their own or in one, as lm-eval does it
(`--apply_chat_template`, `--fewshot_as_multiturn`, `--system_instruction`, `--gen_kwargs`). Decoding is the task's own
unless `task.gen_kwargs` says otherwise; what neither says, the model's generation_config.json does, and all of it is
recorded. A variant decodes as the original did.

A task that samples may be asked `task.samples` times, each with a seed of its own; the number is the mean over samples.
A document's samples are independent of each other and of other documents', so the interval over documents holds them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qbench.errors import RequestError, unknown

if TYPE_CHECKING:
    from qbench.evaluate.protocols.lmeval import LmEval

log = logging.getLogger(__name__)

# the fields of the protocol that this file is about
KEYS = ("apply_chat_template", "fewshot_as_multiturn", "system_instruction", "chat_template_args", "gen_kwargs")
KEYS += ("samples", "seed", "generate_batch")
# how the protocol's name calls a setting of `task.gen_kwargs`
SHORT = {"temperature": "t", "top_p": "p", "top_k": "k", "min_p": "minp", "max_gen_toks": "max"}
LEGAL = (*SHORT, "do_sample", "until", "repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty")
DEFAULT_TOKENS = 256  # of an answer whose task does not say it: lm-eval's
# of a model's generation_config, what says nothing of how it decodes
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
NO_SETTINGS = (*TOKENS, "transformers_version", "_from_model_config", "use_cache")


def check(task: LmEval) -> None:
    """Raises RequestError for settings that no task could be asked with."""
    if not task.apply_chat_template:
        if task.fewshot_as_multiturn:
            raise RequestError("task.fewshot_as_multiturn=true is for a chat; add task.apply_chat_template=true")
        if task.chat_template_args:
            raise RequestError("task.chat_template_args are the template's; add task.apply_chat_template=true")
    if task.system_instruction == "":
        raise RequestError("task.system_instruction is empty; leave it at null for none")
    for key, least in (("samples", 1), ("generate_batch", 1), ("seed", 0)):
        if getattr(task, key) < least:
            raise RequestError(f"task.{key} must be at least {least}, got {getattr(task, key)}")
    asked = task.gen_kwargs or {}
    for key in asked:
        if key not in LEGAL:
            raise unknown("key", f"task.gen_kwargs.{key}", (f"task.gen_kwargs.{k}" for k in LEGAL))
    for key, value in asked.items():
        if key == "do_sample":
            fits, wanted = isinstance(value, bool), "true or false"
        elif key == "until":
            fits = isinstance(value, str) or (isinstance(value, list) and all(isinstance(s, str) for s in value))
            wanted = "a text or a list of texts"
        else:
            fits, wanted = type(value) in (int, float) and value >= 0, "a number of at least 0"
        if not fits:
            raise RequestError(f"task.gen_kwargs.{key} must be {wanted}, got {value!r}")
    if (longest := asked.get("max_gen_toks", 1)) < 1 or longest != int(longest):
        raise RequestError(f"task.gen_kwargs.max_gen_toks must be a whole number of at least 1, got {longest}")


def named(task: LmEval) -> Iterator[str]:
    """What the protocol's name says of it: `chat`, `system1a2b3c4d`, `sampled`, `t0.7`, `5samples`."""
    if task.apply_chat_template:
        yield "chat" if task.multiturn else "chat-oneturn"
    if task.system_instruction is not None:
        yield f"system{_hash(task.system_instruction)}"
    yield from (f"{key}={json.dumps(value)}" for key, value in sorted((task.chat_template_args or {}).items()))
    for key, value in sorted((task.gen_kwargs or {}).items()):
        if key == "do_sample":
            yield "sampled" if value else "greedy"
        else:
            yield f"until{_hash(value)}" if key == "until" else f"{SHORT.get(key, key)}{value:g}"
    if task.samples > 1:
        yield f"{task.samples}samples"
    if task.seed != type(task).seed:
        yield f"seed{task.seed}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def give(leaf: Any, task: LmEval) -> None:
    """Sets how one of lm-eval's tasks decodes."""
    if task.gen_kwargs and generates(leaf):
        leaf.set_config(key="generation_kwargs", value=dict(task.gen_kwargs), update=True)


def generates(leaf: Any) -> bool:
    return leaf.OUTPUT_TYPE == "generate_until"


def decoding(leaf: Any) -> dict[str, Any]:
    """What lm-eval hands to transformers for a task that generates, its defaults filled in."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return dict(normalize_gen_kwargs(leaf.get_config("generation_kwargs") or {}, DEFAULT_TOKENS))


def of_model(model: Any) -> dict[str, Any]:
    """What a model's own generation_config sets besides, where it is not transformers' default."""
    config = getattr(model, "generation_config", None)
    own = {} if config is None else config.to_diff_dict()
    return {key: value for key, value in sorted(own.items()) if not (key in NO_SETTINGS or key.startswith("output_"))}


def check_asked(task: LmEval, leaves: Sequence[Any]) -> None:
    """Raises RequestError where decoding is asked of tasks that do not generate, or samples of greedy ones."""
    asked = [key for key, value in (("gen_kwargs", task.gen_kwargs), ("samples", task.samples > 1)) if value]
    for leaf in leaves if asked else ():
        if not generates(leaf):
            raise RequestError(f"{leaf.task_name} generates nothing; leave out task.{asked[0]}, or ask for it alone")
    for leaf in filter(generates, leaves):
        settings = decoding(leaf)
        sampled, warm = settings["do_sample"], settings.get("temperature", 0.0) > 0
        if task.samples > 1 and not sampled:
            raise RequestError(
                f"task.samples={task.samples}: {leaf.task_name} is greedy, so that all samples would be one; add "
                "task.gen_kwargs={do_sample:true,temperature:0.7}"
            )
        if sampled and not warm:
            raise RequestError(f"{leaf.task_name} samples at temperature 0; set task.gen_kwargs.temperature above 0")
        if task.gen_kwargs and task.gen_kwargs.get("temperature") and not sampled:
            raise RequestError(
                f"{leaf.task_name} decodes greedily, where a temperature means nothing; add "
                "task.gen_kwargs={do_sample:true,temperature:0.7}"
            )


def check_room(leaves: Iterable[Any], window: int) -> None:
    """Raises RequestError for one of lm-eval's tasks whose answers may be so long that no prompt fits before them."""
    for leaf in filter(generates, leaves):
        longest = decoding(leaf)["max_gen_toks"]
        if longest >= window:
            raise RequestError(
                f"{leaf.task_name} generates up to {longest} tokens, which leaves no room for a prompt in "
                f"task.window={window}; ask for more"
            )


def check_template(tokenizer: Any, task: LmEval, leaves: Iterable[Any]) -> None:
    """Raises RequestError for a tokenizer without a chat template, or one that does not take what it is to be given.

    lm-eval itself leaves out a system message that a template refuses, without a word.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            "task.apply_chat_template=true: this model's tokenizer has no chat template, as those of base models have "
            "none; leave it out, or take the instruct model"
        )
    question = [{"role": "user", "content": "a"}]
    if reason := _refuses(tokenizer, task, question):
        raise RequestError(f"task.apply_chat_template=true: the template takes no question alone: {reason}")
    described = next((leaf.task_name for leaf in leaves if leaf.get_config("description")), None)
    if task.system_instruction is None and described is None:
        return
    if _refuses(tokenizer, task, [{"role": "system", "content": "b"}, *question]):
        if task.system_instruction is not None:
            raise RequestError("task.system_instruction: this chat template takes no system message; leave it out")
        log.warning(
            "this model's chat template takes no system message: lm-eval drops the description of %s", described
        )


def _refuses(tokenizer: Any, task: LmEval, messages: list[dict[str, str]]) -> str | None:
    """The first line of what the template, a program of its own, says against the messages."""
    try:
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **(task.chat_template_args or {})
        )
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def template_sha256(tokenizer: Any) -> str:
    return hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()
