"""A stand-in for the module `wandb` that keeps what it is told, where the real one writes files of its own format."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Run:
    """What `wandb.init` was given, and what was logged to it until `finish`."""

    about: dict[str, Any]
    dir: str
    logged: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def log(self, values: dict[str, Any]) -> None:
        self.logged |= values

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@dataclass
class Table:
    columns: list[str]
    data: list[list[Any]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.data]


@dataclass
class Image:
    image: Any
    caption: str


def install(monkeypatch: Any, key: bool = False) -> list[Run]:
    """Puts the stand-in in wandb's place; returns the list that its runs are appended to."""
    module, runs = types.ModuleType("wandb"), []
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)

    def init(**about: Any) -> Run:
        files = Path(about["dir"]) / "wandb" / f"{about['mode']}-run-2026{len(runs):04d}-{about['id']}" / "files"
        files.mkdir(parents=True, exist_ok=True)
        runs.append(Run(about, str(files)))
        return runs[-1]

    module.init, module.Table, module.Image, module.Histogram = init, Table, Image, list
    module.Settings = lambda **settings: settings
    module.login = lambda prompt: key
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs
