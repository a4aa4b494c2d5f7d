"""Tasks of one's own in lm-eval's YAML, over a few made-up questions, in a folder for task.include_path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from qbench.config import RuntimeConfig
from qbench.evaluate.protocols.lmeval import LmEval

WORDS = [
    "river",
    "stone",
    "baker",
    "cloud",
    "violin",
    "harbor",
    "window",
    "letter",
    "garden",
    "mirror",
    "candle",
    "bridge",
]


def questions(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"q": f"{WORDS[i % 6]} number {i} is", "choices": [WORDS[i % 6], WORDS[(5 * i + 1) % 6]], "label": i % 2}
        for i in range(start, start + count)
    ]


def write(folder: Path, name: str, documents: int = 8, train: int = 0, **settings: Any) -> None:
    """A multiple-choice task with `documents` to score and, if asked, a split of others to draw shots from."""
    folder.mkdir(exist_ok=True)
    files = {"test": questions(documents, 100)} | ({"train": questions(train)} if train else {})
    paths = {split: str(folder / f"{name}_{split}.jsonl") for split in files}
    for split, rows in files.items():
        Path(paths[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": paths},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    task |= {"training_split": "train", "fewshot_split": "train"} if train else {}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | settings))


def group(folder: Path, name: str, members: list[Any], by_size: bool | None = None) -> None:
    """A group of tasks; one that aggregates accuracies if `by_size` says how."""
    found: dict[str, Any] = {"group": name, "task": members, "metadata": {"version": 1.0}}
    if by_size is not None:
        found["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean", "weight_by_size": by_size}]
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(found))


def asked(folder: Path, *names: str, **settings: Any) -> LmEval:
    settings = {"window": 512} | settings
    return LmEval(name="t", names=list(names), include_path=str(folder), **settings)


def prepare(task: LmEval, tokenizer: Any, **runtime: Any) -> Any:
    config = RuntimeConfig(**runtime)
    task.check(config)
    return task.prepare(task.read(), tokenizer, config)
