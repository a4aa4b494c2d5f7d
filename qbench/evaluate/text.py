"""What a protocol scores: one text, or a list of pages; embedded, from a local file (files.py), or from the Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from qbench.config import CalibrationConfig
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


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where a text lies: the fields that every setting which reads one has, and that change no number by themselves."""

    path: str | None = None  # local file, in place of the Hub
    dataset: str | None = None  # of the Hub
    subset: str | None = None
    data_files: str | None = None
    split: str | None = None
    column: str = "text"
    revision: str | None = None  # commit of the dataset


def read_text(source: TextSource, name: str, separator: str | None = None, group: str = "task") -> Text:
    """The text of `task` or `calibration` (the group): a file, a dataset, or the text embedded under `name`.

    `separator` stands between the rows of a dataset; None: an empty line, and a file is taken as it is. Raises
    RequestError, naming what would work, when the text cannot be had.
    """
    if source.path is not None:
        return _local(source, separator, Path(source.path).expanduser(), f"{group}.path")
    if source.dataset is not None:
        rows, origin = _rows(source, group)
        return Text(join_rows(rows, _between_rows(separator)), origin, source.revision)
    file = {each.name: each for each in resources.files("qbench.texts").iterdir()}.get(f"{name}.txt")
    if file is None:
        raise RequestError(f"{group}={name} names no text: set {group}.path=FILE or {group}.dataset=HUB_ID")
    return Text(file.read_bytes().decode("utf-8"), f"qbench.texts/{name}.txt")


def read_calibration(config: CalibrationConfig) -> Text:
    """The calibration text; as `read_text`."""
    source = TextSource(**{field.name: getattr(config, field.name) for field in fields(TextSource)})
    return read_text(source, config.name, config.separator, "calibration")


def read_pages(source: TextSource) -> Pages:
    """The pages of a task, from a local file of JSON lines or parquet, or the Hub; raises RequestError for others."""
    if source.path is None:
        rows, origin = _rows(source, "task")
        return Pages(rows, origin, source.revision)
    path = Path(source.path).expanduser()
    return Pages(column(read_rows(path, "task.path"), source.column, path, "task.path"), path.name)


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


def _local(source: TextSource, separator: str | None, path: Path, key: str) -> Text:
    content = read_whole(path, key)
    if not isinstance(content, str):  # the rows that the Hub would have given
        rows = column(content, source.column, path, key)
        return Text(join_rows(rows, _between_rows(separator)), path.name)
    if separator is None:
        return Text(content, path.name)
    return Text(join_rows(lines(content), separator), path.name)


def _between_rows(separator: str | None) -> str:
    """Between the rows of a dataset, whose column was asked for; a text file has rows only if it is asked for them."""
    return separator if separator is not None else "\n\n"


def _rows(source: TextSource, group: str) -> tuple[list[str], str]:
    """One column of a dataset of the Hub, and the dataset's name."""
    import datasets

    datasets.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what fails is said once, below
    files = None if source.data_files is None else {source.split: source.data_files}
    try:
        data = datasets.load_dataset(
            source.dataset,
            source.subset,
            data_files=files,
            split=source.split,
            revision=source.revision,
            verification_mode="basic_checks" if files is None else "no_checks",  # a few files are not all of C4
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise RequestError(
            f"cannot get {source.dataset} from the Hugging Face Hub ({reason}); give a local copy with "
            f"{group}.path=FILE, or use the embedded text with {group}=mini"
        ) from None
    origin = "/".join(str(part) for part in (source.dataset, source.subset, source.split) if part)
    return list(data[source.column]), origin
