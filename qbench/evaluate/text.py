"""What a protocol scores: one text, or a list of pages; embedded, from a local file (files.py), or from the Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from qbench.config import CalibrationConfig, TextConfig
from qbench.errors import RequestError
from qbench.evaluate.files import column, lines, read_rows, read_whole

OWN_TOKENS = 8  # more than a tokenizer puts around a text by itself: BOS, EOS, a space in front


@dataclass(frozen=True)
class Text:
    content: str
    source: str  # where it came from, without folders
    revision: str | None = None  # commit of the Hub dataset

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Pages:
    """Documents that must not be joined before they are chosen, such as the web pages of C4."""

    content: list[str]
    source: str
    revision: str | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.content).encode()).hexdigest()


def read_text(config: TextConfig) -> Text:
    """The text of a task or a calibration; raises RequestError, naming what would work, when it cannot be had."""
    group = "calibration" if isinstance(config, CalibrationConfig) else "task"
    if config.path is not None:
        return _local(config, Path(config.path).expanduser(), f"{group}.path")
    if config.dataset is not None:
        return _hub(config, group)
    file = resources.files("qbench.texts") / f"{config.name}.txt"
    if not file.is_file():
        raise RequestError(f"{group}={config.name} names no text: set {group}.path=FILE or {group}.dataset=HUB_ID")
    return Text(file.read_bytes().decode("utf-8"), f"qbench.texts/{config.name}.txt")


def read_pages(config: TextConfig) -> Pages:
    """The pages of a task, from a local file of JSON lines or parquet, or the Hub; raises RequestError for others."""
    if config.path is None:
        rows, source = _rows(config, "task", config.column)
        return Pages(rows, source, config.revision)
    path = Path(config.path).expanduser()
    return Pages(column(read_rows(path, "task.path"), config.column, path, "task.path"), path.name)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The documents of a task: JSON lines, `.gz` or not, or parquet; raises RequestError, naming the line."""
    return read_rows(path, "task.path")


def wikitext_pages(raw: str) -> list[str]:
    """The articles of a raw WikiText file, as lm-eval's `wikitext_document_level` has them: 62 in the test file.

    An article starts at a heading of the first level, ` = Title = `; its lines are joined by newlines. What stands
    before the first heading is dropped if it is blank.
    """
    pages: list[str] = []
    lines: list[str] = []
    for line in raw.split("\n"):
        if re.fullmatch(r"= (?!= ).*(?<! =) =", line.strip()):
            if "".join(lines).strip():
                pages.append("\n".join(lines))
            lines = []
        lines.append(line)
    return [*pages, "\n".join(lines)]


def most_tokens(content: str) -> int:
    """No tokenizer makes more tokens of a text: each stands for a byte of its UTF-8 at the least, but for a few.

    That holds where the alphabet is bytes and where unknown characters fall back to bytes. Tokenizers that normalize
    first may lengthen what is not ASCII, hence the longest of the normal forms.
    """
    names = () if content.isascii() else ("NFC", "NFD", "NFKC", "NFKD")
    forms = [content, *(unicodedata.normalize(name, content) for name in names)]
    return max(len(form.encode()) for form in forms) + OWN_TOKENS


def join_rows(rows: Iterable[str], separator: str) -> str:
    """One string from a dataset's rows; a row that is only white space counts as empty, as in wikitext-2-raw-v1."""
    return separator.join(row if row.strip() else "" for row in rows)


def _local(config: TextConfig, path: Path, key: str) -> Text:
    content = read_whole(path, key)
    if not isinstance(content, str):  # the rows that the Hub would have given
        return Text(join_rows(column(content, config.column, path, key), _separator(config)), path.name)
    if config.separator is None:
        return Text(content, path.name)
    return Text(join_rows(lines(content), config.separator), path.name)


def _hub(config: TextConfig, group: str) -> Text:
    rows, source = _rows(config, group, config.column)
    return Text(join_rows(rows, _separator(config)), source, config.revision)


def _separator(config: TextConfig) -> str:
    """Between the rows of a dataset, whose column was asked for; a text file has rows only if it is asked for them."""
    return config.separator if config.separator is not None else "\n\n"


def _rows(config: TextConfig, group: str, column: str) -> tuple[list[str], str]:
    """One column of a dataset of the Hub, and the dataset's name."""
    import datasets

    datasets.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what fails is said once, below
    files = None if config.data_files is None else {config.split: config.data_files}
    try:
        data = datasets.load_dataset(
            config.dataset,
            config.subset,
            data_files=files,
            split=config.split,
            revision=config.revision,
            verification_mode="basic_checks" if files is None else "no_checks",  # a few files are not all of C4
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise RequestError(
            f"cannot get {config.dataset} from the Hugging Face Hub ({reason}); give a local copy with "
            f"{group}.path=FILE, or use the embedded text with {group}=mini"
        ) from None
    return list(data[column]), "/".join(str(part) for part in (config.dataset, config.subset, config.split) if part)
