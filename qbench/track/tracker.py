"""What a tracker is: somebody who is told of results besides the store, after they are on disk.

A tracker is a frozen dataclass of its settings, registered under `qbench.trackers` and chosen by `tracker=NAME`. It may
raise whatever it likes while it is told of a result: `harmless` makes a warning of it, so no tracker can lose a result.
What it sends leaves the machine, so users, hosts, environment variables and folders stay out of it: `without_places`
takes folders out of a text.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from qbench.record.result import Result

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """The three calls of a tracker; `folder` is the root of the store, and whatever a tracker keeps lies below it."""

    def check(self) -> None:
        """Raises RequestError before anything is measured if the tracker cannot work at all."""

    def point(self, result: Result, folder: Path, group: str | None) -> None:
        """Is told of a point that the store at `folder` holds; the same run_id again replaces what was told before.

        `group` is the name of the sweep that the point belongs to, None for a point alone.
        """

    def sweep(self, results: Sequence[Result], folder: Path, name: str) -> None:
        """Is told that a sweep has ended, with those of its results that are this tracker's; `name` is its group."""


@dataclass(frozen=True)
class NoTracker:
    """tracker=none: results go to the store only."""

    def check(self) -> None:
        pass

    def point(self, result: Result, folder: Path, group: str | None) -> None:
        pass

    def sweep(self, results: Sequence[Result], folder: Path, name: str) -> None:
        pass


@contextmanager
def harmless(tracker: Tracker) -> Iterator[None]:
    """In here `tracker` is told of what is on disk already; whatever it raises becomes a warning."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        log.warning("the result is saved, but the tracker %s failed: %s", type(tracker).__name__, reason)


def sweep_name(run_ids: Sequence[str]) -> str:
    """The same for the same points in any order: a resumed sweep is the sweep that it resumes."""
    from qbench.record.store import identity

    return f"sweep-{identity(sorted(run_ids))}"


def without_places(value: Any) -> Any:
    """The value as JSON holds it, in which no text names a folder of this machine, which would name its user as well.

    Of an absolute path the last name stays; the working directory becomes `.`, the home `~`.
    """
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(inner) for inner in value]
    if not isinstance(value, str):
        return value
    for place, short in ((os.getcwd(), "."), (str(Path.home()), "~")):
        if len(place) > 1:
            value = value.replace(place, short)
    return re.sub(r"(?<![\w.~:/-])(?:/|~[\w-]*/)[^\s'\",;]*", lambda found: Path(found.group()).name or "/", value)
