"""lm-evaluation-harness' own tasks, untouched: its prompts, its windows, its metrics, its numbers to the last digit.

What is fixed and said in the protocol's name is what lm-eval's result tables leave open: the task's version, the
context length, the number of shots, the documents, and whether a BOS was asked for:
`wikitext:lmeval-v2.0-w2048-limit10`, `piqa:lmeval-v1.0-0shot-w2048`. The softmax is in fp32, the batch size fixed.

A rolling task (wikitext, c4) scores every token of every document once: the first window of a document has one prefix
token (BOS, else EOS) as context, the next ones one token of the text, the last one, being short, more. Its own
metrics count words and bytes of the text before detokenization; per token the same log-likelihood gives the
perplexity. Other tasks give a number per document, so accuracies are compared document by document: see TaskRecord.

task.path=FILE puts a local file's documents in place of the task's dataset, and leaves all else: JSON lines with the
task's own fields, or, for wikitext, the raw file, whose articles are the documents.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qbench.config import TaskConfig
from qbench.errors import RequestError
from qbench.evaluate.text import read_json_lines, read_text, wikitext_pages

SEED = 1234  # lm-eval's default for shots and sampling


@dataclass(frozen=True)
class TaskSource:
    """What can be said of lm-eval's tasks before lm-eval, which takes seconds, is imported."""

    task: TaskConfig
    documents: list[dict[str, Any]] | None  # of task.path
    sha256: str  # of the documents, the folder of further tasks, and lm-eval's version


@dataclass(frozen=True)
class LoadedTask:
    """One requested name: a task, a group, or a tag, with its leaf tasks."""

    name: str
    loaded: dict[str, Any]  # what TaskManager.load returns
    protocol: str
    version: str
    rolling: bool
    source: str
    revision: str | None

    @property
    def leaves(self) -> dict[str, Any]:
        return self.loaded["tasks"]


def read(task: TaskConfig) -> TaskSource:
    """Reads the local files; raises RequestError for settings that no task could satisfy."""
    if not task.names:
        raise RequestError("task.names must name lm-eval tasks, such as task.names=[hellaswag,piqa]")
    if len(set(task.names)) < len(task.names):
        raise RequestError(f"task.names has a name twice: {', '.join(task.names)}")
    if task.limit is not None and task.limit < 1:
        raise RequestError(f"task.limit must be at least 1, or null for all documents, got {task.limit}")
    if task.max_windows is not None:
        raise RequestError("task.max_windows is for protocols with windows of one text; lm-eval's have task.limit")
    if task.num_fewshot is not None and task.num_fewshot < 0:
        raise RequestError(f"task.num_fewshot must be at least 0, or null for the task's own, got {task.num_fewshot}")
    digest = hashlib.sha256(version("lm_eval").encode())
    documents = None
    if task.path is not None:
        if len(task.names) > 1:
            raise RequestError(f"task.path holds the documents of one task, task.names has {len(task.names)}")
        if task.num_fewshot:
            raise RequestError("task.path holds no documents for shots; leave out task.num_fewshot")
        documents = _documents(task)
        digest.update(repr(documents).encode())
    if task.include_path is not None:
        folder = Path(task.include_path).expanduser()
        if not folder.is_dir():
            raise RequestError(f"task.include_path={folder} is not a folder; it holds the YAML of lm-eval tasks")
        for file in sorted(file for file in folder.rglob("*") if file.suffix in (".yaml", ".py", ".json", ".jsonl")):
            digest.update(file.read_bytes())
    return TaskSource(task, documents, digest.hexdigest())


def load(source: TaskSource) -> list[LoadedTask]:
    """Has lm-eval load the tasks and their data; raises RequestError, with the closest names, when it cannot."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    seed_everything()
    return [_load(name, source) for name in source.task.names]


def seed_everything() -> None:
    """lm-eval's default seeds, which it sets before it loads tasks and runs them."""
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def _documents(task: TaskConfig) -> list[dict[str, Any]]:
    assert task.path is not None
    path = Path(task.path).expanduser()
    if {".json", ".jsonl", ".parquet"} & set(path.suffixes):
        return read_json_lines(path)
    if task.names != ["wikitext"]:
        raise RequestError(
            f"task.path={path} must be .json or .jsonl (or .parquet), a line for each document of {task.names[0]}"
        )
    return [{"page": page} for page in wikitext_pages(read_text(task).content)]


def _load(name: str, source: TaskSource) -> LoadedTask:
    task = source.task
    manager = _manager(name, task.include_path)
    spec: Any = name
    if source.documents is not None:
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = manager.task_index[name]
        if entry.kind.name != "TASK":
            raise RequestError(f"task.path works for a single task, lm-eval's {name} is a {entry.kind.name.lower()}")
        spec = load_yaml(entry.yaml_path, resolve_func=True) | {"custom_dataset": _in_place_of(source.documents)}
    try:
        loaded = manager.load(spec)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RequestError(
            f"lm-eval cannot load {name} ({reason}); its data comes from the Hugging Face Hub, or from task.path=FILE"
        ) from error
    for leaf in loaded["tasks"].values():
        if getattr(leaf, "UNSAFE_CODE", False):
            raise RequestError(f"lm-eval marks {leaf.task_name} as unsafe: it runs code that the model writes")
        _set_shots(leaf, task.num_fewshot)
    rolling = any(leaf.OUTPUT_TYPE == "loglikelihood_rolling" for leaf in loaded["tasks"].values())
    if rolling and len(loaded["tasks"]) > 1:
        raise RequestError(f"{name} holds rolling tasks; name them one by one: {', '.join(loaded['tasks'])}")
    whole = loaded.get("groups", {}).get(name) or next(iter(loaded["tasks"].values()))
    number = str(whole.VERSION if hasattr(whole, "VERSION") else whole.version)
    leaf = next(iter(loaded["tasks"].values()))
    where = Path(task.path).name if task.path else "/".join(filter(None, (leaf.DATASET_PATH, leaf.DATASET_NAME)))
    return LoadedTask(
        name=name,
        loaded=loaded,
        protocol=protocol_name(name, number, None if rolling else leaf.get_config("num_fewshot"), task),
        version=number,
        rolling=rolling,
        source=where,
        revision=None if task.path else _revision(leaf),
    )


def protocol_name(name: str, number: str, shots: int | None, task: TaskConfig) -> str:
    """`piqa:lmeval-v1.0-0shot-w2048-limit100`; `shots` is None for rolling tasks."""
    parts = [f"{name}:lmeval-v{number}"]
    if shots is not None:
        parts.append(f"{shots}shot")
    parts.append(f"w{task.window}")
    if task.limit is not None:
        parts.append(f"limit{task.limit}")
    if task.add_bos_token is not None:
        parts.append("bos" if task.add_bos_token else "nobos")
    return "-".join(parts)


def _manager(name: str, include_path: str | None) -> Any:
    """An index of lm-eval's tasks that holds `name`; indexing all 14,000 takes 10 s, so its own folder comes first."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    everything = Path(lm_eval.tasks.__file__).parent
    own = [everything / name] if (everything / name).is_dir() else []
    further = [Path(include_path).expanduser()] if include_path else []
    if own or further:
        manager = TaskManager(include_defaults=False, include_path=[*own, *further])
        if _complete(name, manager):
            return manager
    manager = TaskManager(include_path=further or None)
    if name not in manager.all_tasks:
        close = difflib.get_close_matches(name, manager.all_tasks, n=5)
        raise RequestError(
            f"lm-eval knows no task '{name}'"
            + (f"; the closest names are {', '.join(close)}" if close else "; see `lm-eval ls tasks`")
            + ". A task of your own: task.include_path=DIR"
        )
    return manager


def _complete(name: str, manager: Any) -> bool:
    """Whether the index holds the task, or the group with all of its members; a tag may have some anywhere."""
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name in ("TAG", "UNKNOWN"):
        return False
    members = entry.cfg.get("task") if entry.kind.name == "GROUP" else []
    return all(isinstance(member, str) and _complete(member, manager) for member in members or [])


def _in_place_of(documents: list[dict[str, Any]]) -> Any:
    """A dataset that has these documents in every split."""
    import datasets

    class AnySplit(dict):
        def __missing__(self, split: str) -> datasets.Dataset:
            return self.setdefault(split, datasets.Dataset.from_list(documents))

    return lambda **_: AnySplit()


def _set_shots(leaf: Any, asked: int | None) -> None:
    """lm-eval's own rule: a task that says 0 keeps 0, one that says nothing gets 0."""
    default = leaf.get_config("num_fewshot")
    if default is None or (asked is not None and default != 0):
        leaf.set_config(key="num_fewshot", value=asked or 0)
    leaf.set_fewshot_seed(seed=SEED)


def _revision(leaf: Any) -> str | None:
    """The commit of the Hub that the task's data came from, if its cache says so."""
    for split in _splits(leaf):
        if found := re.search(r"@([0-9a-f]{40})/", " ".join(split.info.download_checksums or {})):
            return found.group(1)
    return None


def _splits(leaf: Any) -> Iterator[Any]:
    yield from (leaf.dataset.values() if isinstance(leaf.dataset, dict) else [])
