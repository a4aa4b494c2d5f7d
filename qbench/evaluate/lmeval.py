"""lm-evaluation-harness' own tasks, untouched: its prompts, its windows, its metrics, its numbers to the last digit.

What is fixed and said in the protocol's name is what lm-eval's result tables leave open: the task's version, the
context length, the number of shots, the documents, and whether a BOS was asked for:
`wikitext:lmeval-v2.0-w2048-limit10`, `piqa:lmeval-v1.0-0shot-w2048`. The softmax is in fp32, the batch size fixed.

A rolling task (wikitext, c4) scores every token of every document once: the first window of a document has one prefix
token (BOS, else EOS) as context, the next ones one token of the text, the last one, being short, more. Its own
metrics count words and bytes of the text before detokenization; per token the same log-likelihood gives the
perplexity. Other tasks give a number per document, so accuracies are compared document by document: see TaskRecord.

A tag (glue) stands for its tasks, one record each, and so does a group that aggregates nothing.

task.path=FILE puts a local file's documents in place of the task's dataset, and leaves all else: JSON lines with the
task's own fields, or, for wikitext, the raw file, whose articles are the documents.
"""

from __future__ import annotations

import difflib
import logging
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qbench.errors import RequestError
from qbench.evaluate import generation, shots
from qbench.texts import questions

if TYPE_CHECKING:
    from qbench.evaluate.protocols.lmeval import LmEval

EMBEDDED = Path(questions.__path__[0])


@dataclass(frozen=True)
class TaskSource:
    """What can be said of lm-eval's tasks before lm-eval, which takes seconds, is imported."""

    task: LmEval
    documents: list[dict[str, Any]] | None  # of task.path
    sha256: str  # of the documents, the folder of further tasks, and lm-eval's version


@dataclass(frozen=True)
class LoadedTask:
    """A task, or a group with a number of its own, with its leaf tasks: what one record is made of."""

    name: str
    loaded: dict[str, Any]  # in the form that TaskManager.load returns
    protocol: str
    version: str
    rolling: bool
    source: str
    revision: str | None
    num_fewshot: int | None  # None where the tasks of a group differ

    @property
    def leaves(self) -> dict[str, Any]:
        return self.loaded["tasks"]

    @property
    def group(self) -> Any:
        """lm-eval's group of this name; None for a task."""
        return self.loaded["groups"].get(self.name)

    def by_size(self, metric: str) -> bool:
        """Whether a group weighs its tasks by their documents for `METRIC,FILTER`; the last one listed counts."""
        name, _, filtered = metric.partition(",")
        for listed in reversed(self.group.aggregate_metric_list if self.group is not None else []):
            if listed.metric == name and (listed.filter_list is None or filtered in listed.filter_list):
                return bool(listed.weight_by_size)
        return True

    def higher_is_better(self, metric: str) -> bool | None:
        """As lm-eval's tasks declare it for `METRIC,FILTER`, True where none does; None where they contradict."""
        name = metric.partition(",")[0]
        declared = (leaf.higher_is_better().get(name) for leaf in self.leaves.values())
        found = {bool(better) for better in declared if better is not None}
        return None if len(found) > 1 else found.pop() if found else True


def load(source: TaskSource) -> list[LoadedTask]:
    """Has lm-eval load the tasks and their data; raises RequestError, with the closest names, when it cannot."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    seed_everything()
    tasks: dict[str, LoadedTask] = {}
    for name in source.task.names:
        for task in _load(name, source):
            if task.name in tasks:
                raise RequestError(f"task.names={','.join(source.task.names)} holds {task.name} twice")
            tasks[task.name] = task
    generation.check_asked(source.task, [leaf for task in tasks.values() for leaf in task.leaves.values()])
    return list(tasks.values())


def embedded(names: Iterable[str]) -> list[Path]:
    """The files of the tasks that qbench brings along, which need no network, if one of the names is theirs."""
    if not any((EMBEDDED / f"{name}.yaml").is_file() for name in names if Path(name).name == name):
        return []
    return [file for file in sorted(EMBEDDED.iterdir()) if file.suffix in (".yaml", ".jsonl", ".py")]


def seed_everything() -> None:
    """lm-eval's default seeds, which it sets before it loads tasks and runs them."""
    random.seed(0)
    np.random.seed(shots.SEED)
    torch.manual_seed(shots.SEED)


def _load(name: str, source: TaskSource) -> list[LoadedTask]:
    """One for a task or a group that aggregates; one for each member of a tag, or of a group that does not."""
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
    except IndexError as error:  # lm-eval looks at the first document
        raise RequestError(f"lm-eval cannot load {name}: a task of it has no documents") from error
    except ModuleNotFoundError as error:
        raise RequestError(f"lm-eval's {name} needs the package {error.name}, which is not installed") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RequestError(
            f"lm-eval cannot load {name} ({reason}); its data comes from the Hugging Face Hub, or from task.path=FILE"
        ) from error
    said = {leaf: _check(loaded["tasks"][leaf], source) for leaf in loaded["tasks"]}
    parts = _parts(loaded["groups"].get(name) or list(loaded["tasks"].values()))
    if not parts:
        raise RequestError(f"lm-eval's {name} holds no task")
    return [_loaded(part, said, task) for part in parts]


def _parts(item: Any) -> list[Any]:
    """The tasks and the groups with a number of their own that a task, group or list of those consists of."""
    if isinstance(item, list) or (hasattr(item, "has_aggregation") and not item.has_aggregation):
        return [part for member in item for part in _parts(member)]
    return [item]


def _check(leaf: Any, source: TaskSource) -> str:
    """Sets the shots of one of lm-eval's tasks and says what they are; raises RequestError if it cannot be run."""
    name = leaf.task_name
    if getattr(leaf, "UNSAFE_CODE", False):
        raise RequestError(f"lm-eval marks {name} as unsafe: it runs code that the model writes")
    if not len(leaf.eval_docs):
        raise RequestError(f"{name} has no documents")
    if not leaf.aggregation() and not callable(leaf.get_config("process_results")):
        raise RequestError(f"{name} defines no metric")
    generation.give(leaf, source.task)
    return shots.give(leaf, source.task.num_fewshot, stands_in=source.documents is not None)


def _loaded(part: Any, said: dict[str, str], task: LmEval) -> LoadedTask:
    is_group = hasattr(part, "get_all_tasks")
    leaves = {leaf.task_name: leaf for leaf in (part.get_all_tasks() if is_group else [part])}
    groups = {group.name: group for group in ([part, *part.get_all_groups()] if is_group else [])}
    name = part.name if is_group else part.task_name
    rolling = any(leaf.OUTPUT_TYPE == "loglikelihood_rolling" for leaf in leaves.values())
    if rolling and is_group:
        raise RequestError(f"{name} holds rolling tasks; name them one by one: {', '.join(leaves)}")
    number = str(part.version if is_group else part.VERSION)
    first = next(iter(leaves.values()))
    counts = {leaf.get_config("num_fewshot") for leaf in leaves.values()}
    where = Path(task.path).name if task.path else "/".join(filter(None, (first.DATASET_PATH, first.DATASET_NAME)))
    return LoadedTask(
        name=name,
        loaded={"tasks": leaves, "groups": groups, "group_map": {g.name: g.child_names for g in groups.values()}},
        protocol=protocol_name(name, number, "+".join(dict.fromkeys(said[leaf] for leaf in leaves)), task),
        version=number,
        rolling=rolling,
        source=where,
        revision=None if task.path else _revision(first),
        num_fewshot=counts.pop() if len(counts) == 1 else None,
    )


def protocol_name(name: str, number: str, shots: str, task: LmEval) -> str:
    """`piqa:lmeval-v1.0-0shot-w2048-limit100`; `shots` is empty for rolling tasks."""
    parts = [f"{name}:lmeval-v{number}"]
    if shots:
        parts.append(shots)
    parts.append(f"w{task.window}")
    parts += generation.named(task)
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
    own += [EMBEDDED] if embedded([name]) else []
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


def _revision(leaf: Any) -> str | None:
    """The commit of the Hub that the task's data came from, if its cache says so."""
    for split in _splits(leaf):
        if found := re.search(r"@([0-9a-f]{40})/", " ".join(split.info.download_checksums or {})):
            return found.group(1)
    return None


def _splits(leaf: Any) -> Iterator[Any]:
    yield from (leaf.dataset.values() if isinstance(leaf.dataset, dict) else [])
