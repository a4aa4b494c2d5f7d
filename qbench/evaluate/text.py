"""The text a protocol scores: embedded, from a local file, or from the Hub."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from qbench.config import CalibrationConfig, TextConfig
from qbench.errors import RequestError


@dataclass(frozen=True)
class Text:
    content: str
    source: str  # where it came from, without folders

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_text(config: TextConfig) -> Text:
    """The text of a task or a calibration; raises RequestError, naming what would work, when it cannot be had."""
    group = "calibration" if isinstance(config, CalibrationConfig) else "task"
    if config.path is not None:
        return _local(config, Path(config.path).expanduser(), group)
    if config.dataset is not None:
        return _hub(config, group)
    file = resources.files("qbench.texts") / f"{config.name}.txt"
    if not file.is_file():
        raise RequestError(f"{group}={config.name} names no text: set {group}.path=FILE or {group}.dataset=HUB_ID")
    return Text(file.read_text(encoding="utf-8"), f"qbench.texts/{config.name}.txt")


def join_rows(rows: list[str], separator: str) -> str:
    """One string from a dataset's rows; a row that is only white space counts as empty, as in wikitext-2-raw-v1."""
    return separator.join(row if row.strip() else "" for row in rows)


def _local(config: TextConfig, path: Path, group: str) -> Text:
    try:
        content = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise RequestError(f"cannot read {group}.path={path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{group}.path={path} is not UTF-8 text (byte {error.start})") from None
    if config.separator is None:
        return Text(content, path.name)
    return Text(join_rows(content.splitlines(keepends=True), config.separator), path.name)


def _hub(config: TextConfig, group: str) -> Text:
    import datasets

    datasets.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what fails is said once, below
    try:
        data = datasets.load_dataset(
            config.dataset,
            config.subset,
            data_files=config.data_files,
            split=config.split,
            revision=config.revision,
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise RequestError(
            f"cannot get {config.dataset} from the Hugging Face Hub ({reason}); give a local copy with "
            f"{group}.path=FILE, or use the embedded text with {group}=mini"
        ) from None
    separator = config.separator if config.separator is not None else "\n\n"
    return Text(join_rows(list(data[config.column]), separator), f"{config.dataset}/{config.subset}/{config.split}")
