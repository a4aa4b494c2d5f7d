"""What a model wrote itself: answers to the embedded prompts, sampled once, kept, and scored by `task=self`.

Text that the original writes is where a chat model spends its life, and where its own probabilities are high: damage
there is what people meet who talk to it. It is sampled from the original, at the asked temperature, after the chat
template where the tokenizer has one. Every kept answer has exactly the asked number of tokens: one that ends earlier is
left out, so that all weigh the same, and the end of an answer is not scored.

It is written once for one model, precision and kind of device, and kept in `outputs/texts`. Another machine may sample
another text; the file can be taken there (`task.path=FILE`), and its hash tells the two apart.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from qbench.config import RuntimeConfig
from qbench.errors import RequestError
from qbench.model.offload import runs_offloaded
from qbench.record.store import Store, identity, write_atomically
from qbench.sources.source import Source

log = logging.getLogger(__name__)

FORMAT = "qbench-written-1"
BATCH = 8  # answers that are sampled together; part of what is sampled
CANDIDATES = 8  # sampled at most, for each answer that is asked for


@dataclass(frozen=True)
class Sampling:
    """What an answer depends on besides the model."""

    answers: int
    tokens: int  # of each answer
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Author:
    """The original that writes, on its way to being loaded."""

    model: Source
    weights: str  # its fingerprint
    dtype: torch.dtype
    device: torch.device
    runtime: RuntimeConfig
    store: Store
    here: bool  # whether this machine has the device


@dataclass(frozen=True)
class Written:
    """Answers with their prompts, as token ids of the model that wrote them."""

    sampling: Sampling
    chat: bool  # the prompts are in the tokenizer's chat template
    prompts: list[list[int]]
    answers: list[list[int]]
    source: str  # where they lie, without folders
    revision: None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([self.prompts, self.answers]).encode()).hexdigest()


def prompts() -> list[str]:
    return (resources.files("qbench.texts") / "prompts.txt").read_text(encoding="utf-8").splitlines()


def read(path: Path) -> Written:
    """Raises RequestError for a file that is not what `write` leaves."""
    try:
        held = json.loads(path.read_bytes())
        if held["format"] != FORMAT:
            raise ValueError
        ids = [held["prompts"], held["answers"]]
        whole = all(ids) and len(ids[0]) == len(ids[1]) and all(each for kind in ids for each in kind)
        if not whole or not all(type(i) is int and i >= 0 for kind in ids for each in kind for i in each):
            raise ValueError
        sampling = Sampling(**held["sampling"])
        if len(ids[1]) < sampling.answers or any(len(each) != sampling.tokens for each in ids[1]):
            raise ValueError
        return Written(sampling, bool(held["chat"]), *ids, path.name)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}; it holds what a model has written") from None
    except (ValueError, KeyError, TypeError):
        raise RequestError(
            f"{path} does not hold what a model has written; task=self leaves such files in outputs/texts"
        ) from None


def kept(author: Author, sampling: Sampling) -> Written:
    """What the author has written, or writes now. Raises RequestError, one sentence, where it cannot."""
    if not author.model.original:
        raise RequestError(
            f"task=self is written by the original, and {author.model.name} is quantized already; give task.path=FILE, "
            "what its original wrote"
        )
    dtype = str(author.dtype).removeprefix("torch.")
    asked = hashlib.sha256("\n".join(prompts()).encode()).hexdigest()
    key = identity(FORMAT, author.weights, dtype, author.device.type, asdict(sampling), asked, BATCH)
    path = author.store.root / "texts" / f"self-{key}.json"
    if not path.is_file() and not author.here:
        raise RequestError(
            "task=self is written by the original before its points are sent elsewhere, and that device is not here; "
            "run one point of it there first, and give its outputs/texts file as task.path"
        )
    with author.store.lock(f"text-{key}", "what the original writes"):
        if not path.is_file():
            log.info("the original writes %d answers of %d tokens, once", sampling.answers, sampling.tokens)
            tokenizer = author.model.tokenizer(author.store.models)
            chat, asked_ids, answers = _write(author, tokenizer, sampling)
            texts = [
                {"prompt": tokenizer.decode(p), "answer": tokenizer.decode(a)}
                for p, a in zip(asked_ids, answers, strict=True)
            ]
            held = {"format": FORMAT, "model": author.model.name, "weights": author.weights, "dtype": dtype}
            held |= {"device": author.device.type, "sampling": asdict(sampling), "chat": chat}
            held |= {"prompts": asked_ids, "answers": answers, "texts": texts}  # the texts are for people
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(held, ensure_ascii=False, indent=1).encode())
    return read(path)


def _write(author: Author, tokenizer: Any, sampling: Sampling) -> tuple[bool, list[list[int]], list[list[int]]]:
    """Whether there is a chat template, the prompts' ids and the answers', as many as are asked for."""
    loaded = author.model.load(author.dtype, author.device, author.store.models, author.runtime.offload, author.weights)
    try:
        with runs_offloaded(loaded.model, author.runtime.offload):
            return sample(loaded.model, tokenizer, sampling)
    finally:
        del loaded
        gc.collect()
        if author.device.type == "cuda":
            torch.cuda.empty_cache()


@torch.inference_mode()
def sample(model: Any, tokenizer: Any, sampling: Sampling) -> tuple[bool, list[list[int]], list[list[int]]]:
    """Answers to the prompts in turn. Raises RequestError for a model that ends nearly all of them too early."""
    chat = bool(getattr(tokenizer, "chat_template", None))
    asked = [_ids(tokenizer, prompt, chat) for prompt in prompts()]
    ends = _ends(model, tokenizer)
    found: list[tuple[list[int], list[int]]] = []
    tried = 0
    for first in range(0, CANDIDATES * sampling.answers, BATCH):
        batch = [asked[n % len(asked)] for n in range(first, first + BATCH)]
        for prompt, answer in zip(batch, _answers(model, batch, ends, sampling, first), strict=True):
            tried += 1
            if len(answer) == sampling.tokens and not ends & set(answer):
                found.append((prompt, answer))
        if len(found) >= sampling.answers:
            kept = found[: sampling.answers]
            return chat, [p for p, _ in kept], [a for _, a in kept]
    raise RequestError(
        f"the original ends {tried - len(found)} of {tried} answers before {sampling.tokens} tokens, so that there are "
        f"{len(found)} of the {sampling.answers} that task.answers asks for; ask for shorter ones with task.tokens"
    )


def _answers(model: Any, batch: list[list[int]], ends: set[int], sampling: Sampling, first: int) -> list[list[int]]:
    """One answer a prompt, sampled together; the prompts are padded on the left."""
    from transformers import GenerationConfig

    longest, pad = max(map(len, batch)), min(ends, default=0)
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in batch], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=model.device)
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        repetition_penalty=1.0,
        max_new_tokens=sampling.tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(1_000_003 * sampling.seed + first)
        try:
            made = model.generate(ids, attention_mask=mask, generation_config=config)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise RequestError("the original gives NaN or Inf when it writes; it cannot be measured") from None
    return made[:, longest:].tolist()


def _ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(f"{prompt}\n\n")["input_ids"])
    message = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program of its own
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RequestError(f"task=self: the tokenizer's chat template takes no question alone: {said}") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the model's own, several for some, and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    every = own if isinstance(own, list) else [own]
    return {int(i) for i in (*every, tokenizer.eos_token_id) if i is not None}
