"""The documents as lm-eval asks a task for them (its `custom_dataset`), and which answers are right."""

import json
import re
from pathlib import Path
from typing import Any

import datasets


def arithmetic(**_: Any) -> Any:
    return _read("arithmetic")


def extraction(**_: Any) -> Any:
    return _read("extraction")


def last_number(document: dict[str, Any], results: list[str]) -> dict[str, int]:
    """Right if the last number that is said is the answer."""
    numbers = re.findall(r"\d[\d,]*", results[0])
    return {"acc": int(bool(numbers) and numbers[-1].replace(",", "") == document["answer"])}


def says(document: dict[str, Any], results: list[str]) -> dict[str, int]:
    """Right if one of the answers that count is said, as whole words, in whatever case."""
    words = (rf"(?<!\w){re.escape(answer)}(?!\w)" for answer in document["answers"])
    return {"acc": int(any(re.search(word, results[0], re.IGNORECASE) for word in words))}


def _read(name: str) -> Any:
    lines = (Path(__file__).parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
