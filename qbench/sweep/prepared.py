"""What a sweep sends to the process of a point: one JSON file, from which the point runs as the sweep prepared it.

    python -m qbench --point outputs/sweeps/DATE/3-RUN_ID.json

The file holds the resolved configuration, so that the process composes nothing, and the fingerprint of the weights, so
that a large folder is hashed once for a whole sweep. Texts are read again: the process needs them. The run_id that
comes of it must be the one that was sent; another one means that a text, a setting's default or qbench itself has
changed since the sweep began.
"""

from __future__ import annotations

import json
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
    run_id: str
    identity: dict[str, Any]  # `weights` is the model's fingerprint
    config: dict[str, Any]  # what `Config` holds, resolved, as it was asked for
    command: list[str]  # the overrides that say the same, for people
    group: str  # the name of the sweep, for trackers


def write(sent: Sent, path: Path) -> None:
    """Raises OSError where there is no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(sent), indent=1).encode())


def read(path: Path) -> Sent:
    """Raises RequestError for a file that no sweep has written."""
    try:
        return Sent(**json.loads(path.read_bytes()))
    except OSError as error:
        raise RequestError(f"--point: cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise RequestError(f"--point: {path} is not what a sweep sends to a point: {error}") from None


def prepare_again(sent: Sent) -> Prepared:
    """The point in this process. Raises RequestError when it is not the point that was sent."""
    from qbench.request.prepare import prepare

    weights = sent.identity["weights"]
    point = prepare(from_container(sent.config), sent.command, fingerprint=lambda _: weights)
    if point.run_id != sent.run_id:
        mine, theirs = asdict(point.identity), sent.identity
        changed = [key for key in mine if mine[key] != theirs.get(key)] or ["the version of qbench"]
        raise RequestError(
            f"the sweep sent the point {sent.run_id} and this process would measure {point.run_id}, which differs in "
            f"{', '.join(changed)}: what it reads has changed since the sweep began; the same command plans it anew"
        )
    return point
