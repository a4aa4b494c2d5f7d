"""The text a protocol scores: embedded, from a local file, or from the Hub."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from qbench.config import TaskConfig
from qbench.errors import RequestError


@dataclass(frozen=True)
class Text:
    content: str
    source: str  # where it came from, without folders

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_text(task: TaskConfig) -> Text:
    """The task's text; raises RequestError when it cannot be had, naming what would work instead."""
    if task.path is not None:
        return _local(task, Path(task.path).expanduser())
    if task.dataset is not None:
        return _hub(task)
    file = resources.files("qbench.texts") / f"{task.name}.txt"
    if not file.is_file():
        raise RequestError(f"task={task.name} names no text: set task.path=FILE or task.dataset=HUB_ID")
    return Text(file.read_text(encoding="utf-8"), f"qbench.texts/{task.name}.txt")


def join_rows(rows: list[str], separator: str) -> str:
    """One string from a dataset's rows; a row that is only white space counts as empty, as in wikitext-2-raw-v1."""
    return separator.join(row if row.strip() else "" for row in rows)


def _local(task: TaskConfig, path: Path) -> Text:
    try:
        content = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise RequestError(f"cannot read task.path={path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"task.path={path} is not UTF-8 text (byte {error.start})") from None
    if task.separator is None:
        return Text(content, path.name)
    return Text(join_rows(content.splitlines(keepends=True), task.separator), path.name)


def _hub(task: TaskConfig) -> Text:
    import datasets

    datasets.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what fails is said once, below
    try:
        data = datasets.load_dataset(task.dataset, task.subset, split=task.split, revision=task.revision)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise RequestError(
            f"cannot get {task.dataset} from the Hugging Face Hub ({reason}); give a local copy with "
            "task.path=FILE, or use the embedded text with task=mini"
        ) from None
    separator = task.separator if task.separator is not None else "\n\n"
    return Text(join_rows(list(data[task.column]), separator), f"{task.dataset}/{task.subset}/{task.split}")
