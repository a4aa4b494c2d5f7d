"""lm-eval's model layer, HFLM, around the live model: its numbers, with everything said that it would keep to itself.

Prompts that do not fit into task.window lose their beginning, as lm-eval has it; here they are counted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from qbench.config import RuntimeConfig
from qbench.errors import PointError, RequestError
from qbench.evaluate.limits import batch_size
from qbench.evaluate.resident import first_nonfinite_layer

if TYPE_CHECKING:
    from qbench.evaluate.protocols.lmeval import LmEval


def check(tokenizer: Any, task: LmEval) -> None:
    """Raises RequestError for a tokenizer that lm-eval's layer cannot use, or that has not the BOS asked for."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise RequestError(
            "lm-eval's tasks need a tokenizer with a BOS or EOS token, the context of a text that has none; "
            "this model's tokenizer has neither"
        )
    if not task.add_bos_token:
        return
    if tokenizer.bos_token_id is None:
        raise RequestError(
            "task.add_bos_token=true: this model's tokenizer has no BOS token; leave it at null or false"
        )
    if tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        raise RequestError(
            f"task.add_bos_token=true: this model's tokenizer puts no BOS ({tokenizer.bos_token}) before a text, "
            "and lm-eval leaves that to it; leave it at null or false"
        )


def special_tokens(tokenizer: Any) -> int:
    """How many tokens the tokenizer adds to a text by itself."""
    return len(tokenizer("a")["input_ids"]) - len(tokenizer("a", add_special_tokens=False)["input_ids"])


def bos_policy(tokenizer: Any, task: LmEval) -> str:
    by_itself = f"what the tokenizer adds by itself ({special_tokens(tokenizer)} tokens)"
    asked = {None: by_itself, True: "BOS", False: "none"}[task.add_bos_token]
    return f"before a text: {asked}; context of a text without any: BOS, else EOS"


def wrap(model: Any, tokenizer: Any, task: LmEval, runtime: RuntimeConfig) -> Any:
    """HFLM with the precision, window, batch size and BOS of the request, and `truncated`: the prompts that were cut.

    `truncated` holds the pair (context, continuation) of a likelihood and the prompt of a generation.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # HFLM warns about each argument that a live model settles
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):
        truncated: set[Any]
        bar: tqdm | None = None  # one for all rolling windows; HFLM itself draws one for each batch of them

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **batch: Any) -> Any:
            if batch:  # rolling: windows that lm-eval cut to fit
                self.bar = tqdm(desc="lm-eval", unit="window") if self.bar is None else self.bar
                self.bar.update(len(requests))
            else:
                self.truncated |= truncated(requests, self.max_length)
            return super()._loglikelihood_tokens(requests, disable_tqdm or bool(batch), **batch)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            of_likelihoods, self.batch_size_per_gpu = self.batch_size_per_gpu, task.generate_batch
            try:
                return super().generate_until(requests, disable_tqdm)
            finally:
                self.batch_size_per_gpu = of_likelihoods

        def tok_batch_encode(
            self, strings: Any, padding_side: str = "left", left_truncate_len: int | None = None, **more: Any
        ) -> Any:
            ids, mask = super().tok_batch_encode(strings, padding_side, None, **more)
            if left_truncate_len:
                lengths = mask.sum(1).tolist()
                self.truncated |= {s for s, n in zip(strings, lengths, strict=True) if n > left_truncate_len}
                ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
            return ids, mask

    wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    lm = Counting(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size(runtime, runtime.device),
        max_length=task.window,
        softmax_dtype=str(wide).removeprefix("torch."),
        add_bos_token=task.add_bos_token,
        chat_template_args=task.chat_template_args,
        device=str(model.device),
    )
    lm.truncated = set()
    return lm


def truncated(requests: Iterable[tuple[Any, list[int], list[int]]], window: int) -> set[Any]:
    """The texts of those requests that lose the beginning of their context; raises PointError for too long an answer.

    Requests are texts, tokens of the context and tokens of the continuation, as HFLM has them.
    """
    cut = set()
    for texts, context, continuation in requests:
        if len(continuation) > window:
            raise PointError(
                f"an answer has {len(continuation)} tokens, more than task.window={window}: {texts[1][:40]!r}..."
            )
        if len(context) + len(continuation) > window + 1:
            cut.add(texts)
    return cut


def prompts_change(task: str) -> str:
    return (
        f"{task}: its prompts change from one evaluation to the next, whatever the seed, so that a model and its "
        "baseline would not be asked the same"
    )


def count_truncated(samples: list[dict[str, Any]], truncated: set[Any]) -> int:
    """Documents of which a prompt was cut; `samples` are lm-eval's, one for each document and filter."""
    cut = set()
    for sample in samples:
        for arguments in sample["arguments"]:
            if tuple(arguments) in truncated if _is_pair(arguments) else arguments[0] in truncated:
                cut.add(sample["doc_id"])
    return len(cut)


def _is_pair(arguments: Any) -> bool:
    """Of a likelihood: context and continuation. A generation's second argument is a dictionary."""
    return all(isinstance(part, str) for part in arguments)


def require_finite(leaf: str, sample: dict[str, Any], lm: Any) -> None:
    """Raises PointError, naming task, document and layer, for a response of NaN or Inf."""
    responses = [response for request in sample["resps"] for response in request]
    numbers = [r[0] if isinstance(r, tuple) else r for r in responses]  # a tuple adds whether it would be generated
    if all(math.isfinite(n) for n in numbers if isinstance(n, float)):
        return
    first = sample["arguments"][0]
    ids = lm.tok_encode("".join(part for part in first if isinstance(part, str)))[: lm.max_length]
    layer = first_nonfinite_layer(lm.model, torch.tensor([ids], device=lm.device))
    where = f"first in the output of {layer}" if layer else "but not when its prompt is run again"
    raise PointError(f"{leaf}: the model gives NaN or Inf in document {sample['doc_id']}, {where}")
