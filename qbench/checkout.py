"""What a checkout offers: the entry points in its pyproject.toml, whatever is or was installed.

A wheel holds plugins/ and conf/ inside qbench/; in a checkout they lie beside it, and `qbench/__init__.py` adds that
place to its `__path__`. So `python -m qbench` and `python -m pytest` run from a checkout that is not installed, with an
older qbench installed beside it, or with stale metadata in the way: what runs is the code that lies there, and its
members are those that its pyproject.toml names. Other packages' entry points come from their metadata, as ever.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "qbench-llm"
ROOT = Path(__file__).resolve().parents[1]


def entry_points(group: str) -> list[metadata.EntryPoint]:
    """The entry points of a group: ours from pyproject.toml in a checkout, else all from the packages' metadata."""
    if (declared := _declared()) is None:
        return [entry for entry, _ in _installed(group, tuple(sys.path))]
    others = [entry for entry, package in _installed(group, tuple(sys.path)) if package != DISTRIBUTION]
    return others + [metadata.EntryPoint(name, value, group) for name, value in declared.get(group, {}).items()]


@cache
def _installed(group: str, path: tuple[str, ...]) -> list[tuple[metadata.EntryPoint, str | None]]:
    """Those of all packages on the path with each one's package: to read their metadata takes longer than a plan."""
    return [(entry, entry.dist and entry.dist.name) for entry in metadata.entry_points(group=group)]


@cache
def _declared() -> dict[str, dict[str, str]] | None:
    """Group -> name -> value, as pyproject.toml beside the package says; None when there is none of ours."""
    file = ROOT / "pyproject.toml"
    if not file.is_file():
        return None
    import tomllib

    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    return project.get("entry-points", {}) if project.get("name") == DISTRIBUTION else None
