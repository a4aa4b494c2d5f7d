"""lm-eval's likelihood tasks without a model at hand: what they ask is recorded, and answered from what a pass found.

`Recording` is lm-eval's model layer, HFLM, but for the model: it tokenizes, splits context from continuation, puts the
prefix token before what has no context and cuts rolling windows, and writes down what HFLM would then run. A pass runs
that, longest first, right-padded as HFLM does it; `TaskReader` scores each row as HFLM does: the log-softmax of the
continuation's positions in fp32 or wider, and whether each of its tokens is the most probable one. `Answering` is the
model that lm-eval's `evaluate` is given then.

Imported late: lm-eval takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import repeat
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from qbench.errors import PointError
from qbench.evaluate import hflm
from qbench.evaluate.asks import Scores
from qbench.evaluate.score import row_chunks

if TYPE_CHECKING:
    from qbench.evaluate.lmeval import LoadedTask
    from qbench.evaluate.protocols.lmeval import LmEval

Tokens = tuple[int, ...]
Request = tuple[Tokens, Tokens]  # context, continuation
TYPES = ("loglikelihood", "loglikelihood_rolling")


class Recording(HFLM):
    """Writes requests down where HFLM would run its model."""

    def __init__(self, tokenizer: Any, task: LmEval) -> None:
        absent = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace())
        super().__init__(
            pretrained=absent,
            tokenizer=tokenizer,
            backend="causal",
            max_length=task.window,
            add_bos_token=task.add_bos_token,
            chat_template_args=task.chat_template_args,
        )
        template = self.apply_chat_template if task.apply_chat_template else None
        self.prompting = task.prompting | {"chat_template": template}
        self.pairs: dict[tuple[str, str], Request] = {}
        self.rolling: dict[str, list[Request]] = {}  # of a text, its windows
        self.first: dict[Request, str] = {}  # the document that asks it first
        self.truncated: set[tuple[str, str]] = set()

    def record(self, task: LoadedTask, limit: int | None) -> bool:
        """All that lm-eval's `evaluate` asks for the task; False if some of it is more than a likelihood."""
        for name, leaf in task.leaves.items():
            leaf.build_all_requests(limit=get_sample_size(leaf, limit), rank=0, world_size=1, **self.prompting)
            for kind in dict.fromkeys(instance.request_type for instance in leaf.instances):
                if kind not in TYPES:
                    return False
                instances = [instance for instance in leaf.instances if instance.request_type == kind]
                self._documents: Iterator[str] = (f"{name}\n{instance.doc_id}" for instance in instances)
                getattr(self, kind)(instances, disable_tqdm=kind != "loglikelihood")
        return True

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        for request, document in zip(requests, list(self._documents), strict=True):
            (self._text,) = request.args
            self.rolling[self._text], self._documents = [], repeat(document)
            super().loglikelihood_rolling([request], disable_tqdm)
        return []

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **batch: Any) -> Any:
        asked = self.ask(requests, self._documents)
        if batch:  # windows of a text, cut to fit
            self.rolling[self._text] += asked
        else:
            self.truncated |= hflm.truncated(requests, self.max_length)
            self.pairs |= {texts: request for (texts, *_), request in zip(requests, asked, strict=True)}
        return [(0.0, False)] * len(requests)

    def ask(self, requests: Sequence[tuple[Any, list[int], list[int]]], documents: Iterator[str]) -> list[Request]:
        """Requests as HFLM has them: texts, tokens of the context, tokens of the continuation."""
        asked = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        for request in asked:
            self.first.setdefault(request, next(documents))
        return asked


class Answering(LM):
    """Gives lm-eval what was found."""

    tokenizer_name = ""  # of lm-eval's cache of requests, which is not used

    def __init__(self, recording: Recording, found: dict[Request, tuple[float, bool]]) -> None:
        super().__init__()
        self.recording, self.found = recording, found
        self.tok_encode, self.max_length = recording.tok_encode, recording.max_length
        self.apply_chat_template = recording.apply_chat_template
        self.truncated: set[Any] = set()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        texts = [request.args for request in requests]
        self.truncated |= self.recording.truncated.intersection(texts)
        return [self.found[_known(self.recording.pairs, pair, r)] for pair, r in zip(texts, requests, strict=True)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        windows = [_known(self.recording.rolling, request.args[0], request) for request in requests]
        return [sum(self.found[window][0] for window in of_text) for of_text in windows]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("a generation needs the whole model")


def _known(recorded: dict[Any, Any], asked: Any, request: Any) -> Any:
    if asked not in recorded:
        raise PointError(hflm.prompts_change(request.task_name))
    return recorded[asked]


class TaskAsks:
    """Of all tasks, each input once: continuations of one token share that of their context, as in HFLM."""

    compares = False

    def __init__(self, recording: Recording, batch_size: int, told: Callable[[Any, Scores | None], Scores]) -> None:
        """`told(lm, original)` gives the scores of a model that lm-eval can ask."""
        self.recording, self.batch_size, self.told = recording, batch_size, told
        rows: dict[Tokens, list[Request]] = {}
        for context, continuation in recording.first:
            entered = (context + continuation)[-(recording.max_length + 1) :][:-1]
            rows.setdefault(entered, []).append((context, continuation))
        self.rows = sorted(rows.items(), key=lambda row: (-len(row[0]), row[0]))

    @cached_property
    def batches(self) -> Sequence[np.ndarray]:
        starts = range(0, len(self.rows), self.batch_size)
        return [_padded([ids for ids, _ in self.rows[start : start + self.batch_size]]) for start in starts]

    def reader(self, original: Scores | None) -> TaskReader:
        return TaskReader(self, original)


def _padded(rows: Sequence[Tokens]) -> np.ndarray:
    """`[rows, longest]`; zeros follow, which no token before them sees."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded


class TaskReader:
    """Scores are those of documents.py."""

    def __init__(self, asks: TaskAsks, original: Scores | None) -> None:
        self.asks, self.original = asks, original
        self.found: dict[Request, tuple[float, bool]] = {}

    def see(self, batch: int, row: int, logits: Tensor, original: Tensor | None) -> None:
        """As in asks.py. Raises PointError, naming task and document."""
        ids, requests = self.asks.rows[batch * self.asks.batch_size + row]
        longest = max(len(continuation) for _, continuation in requests)
        logits = logits[len(ids) - longest : len(ids)]
        # the tokens that follow, which all requests share but for the last one of each
        tokens = torch.tensor([*ids[len(ids) - longest + 1 :], *(own[-1] for _, own in requests)]).to(logits.device)
        following, last = tokens[: longest - 1], tokens[longest - 1 :]
        log_p, chosen = [], []
        for rows in row_chunks(logits):
            wide = torch.log_softmax(logits[rows], -1, dtype=torch.promote_types(logits.dtype, torch.float32))
            log_p.append(wide[: len(following[rows])].gather(1, following[rows, None])[:, 0])
            chosen.append(wide.argmax(-1))
        most_probable = torch.cat(chosen)
        agree = torch.cat([most_probable[:-1] == following, most_probable[-1] == last])
        found = torch.stack([torch.cat([*log_p, wide[-1, last]]), agree]).double().cpu().numpy()  # one transfer
        (shared, at_last), (agree_before, agrees) = (np.split(line, [longest - 1]) for line in found)
        for request, value, agreed in zip(requests, at_last, agrees, strict=True):
            own = slice(longest - len(request[1]), None)
            log_likelihood = float(shared[own].sum() + value)
            if not np.isfinite(log_likelihood):
                task, document = self.asks.recording.first[request].split("\n")
                raise PointError(f"{task}: the model gives NaN or Inf in document {document}")
            self.found[request] = log_likelihood, bool(agreed and agree_before[own].all())

    def scores(self) -> Scores:
        return self.asks.told(Answering(self.asks.recording, self.found), self.original)
