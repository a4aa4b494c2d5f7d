"""What a sweep sends to the process of a pass: one JSON file, from which its points run as the sweep prepared them.

    python -m qbench --pass outputs/sweeps/DATE/1-0f3c....json

The file holds each point's resolved configuration, so that the process composes nothing, and the fingerprint of the
weights, so that a large folder is hashed once for a whole sweep. Texts are read again, once a pass: the process needs
them. The run_id that comes of it must be the one that was sent; another one means that a text, a setting's default or
qbench itself has changed since the sweep began.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.config import from_container
from qbench.errors import RequestError
from qbench.record.store import write_atomically

if TYPE_CHECKING:
    from qbench.request.prepare import Prepared


@dataclass(frozen=True)
class Sent:
    """One point."""

    run_id: str
    identity: dict[str, Any]  # `weights` is the model's fingerprint
    config: dict[str, Any]  # what `Config` holds, resolved, as it was asked for
    command: list[str]  # the overrides that say the same, for people


@dataclass(frozen=True)
class SentPass:
    group: str  # the name of the sweep, for trackers
    points: list[Sent]


def write(sent: SentPass, path: Path) -> None:
    """Raises OSError where there is no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(sent), indent=1).encode())


def read(path: Path) -> SentPass:
    """Raises RequestError for a file that no sweep has written."""
    try:
        values = json.loads(path.read_bytes())
        return SentPass(**values | {"points": [Sent(**point) for point in values["points"]]})
    except OSError as error:
        raise RequestError(f"--pass: cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise RequestError(f"--pass: {path} is not what a sweep sends to a pass: {error}") from None


def prepare_again(sent: Sent, *shared: Callable[..., Any]) -> Prepared:
    """The point in this process; `shared` read texts, those of the evaluation and of the calibration.

    Raises RequestError when it is not the point that was sent.
    """
    from qbench.request.prepare import prepare

    weights = sent.identity["weights"]
    point = prepare(from_container(sent.config), sent.command, True, lambda _: weights, *shared)
    if point.run_id != sent.run_id:
        mine, theirs = asdict(point.identity), sent.identity
        changed = [key for key in mine if mine[key] != theirs.get(key)] or ["the version of qbench"]
        raise RequestError(
            f"the sweep sent the point {sent.run_id} and this process would measure {point.run_id}, which differs in "
            f"{', '.join(changed)}: what it reads has changed since the sweep began; the same command plans it anew"
        )
    return point


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Points share models and texts: each is fingerprinted or read once."""
    known: dict[str, Any] = {}

    def call(*settings: Any) -> Any:
        if (name := repr(settings)) not in known:
            known[name] = function(*settings)
        return known[name]

    return call
