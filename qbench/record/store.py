"""The folder of results. Everything is written beside its place and renamed into it, the result itself last.

    outputs/results/RUN_ID/result.json            one point
    outputs/results/RUN_ID/windows-HASH.safetensors   its scores per window or document
    outputs/baselines/KEY.safetensors             what an unquantized model scored, shared by points
    outputs/models/                               converted models
    outputs/locks/                                held while a point or a reference is being measured
    outputs/sweeps/DATE/                          what the points of a sweep said while running

A process killed at any moment leaves the old state or the new one, and at worst a file whose name starts with
`.partial-`, which nothing reads and a later save to the same folder removes. Any number of processes and machines may
share the folder, if its file system renames atomically and has flock (local disks, NFSv4, Lustre mounted with flock).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from qbench.errors import RequestError, WriteError
from qbench.record.disk import refusal
from qbench.record.lock import locked, remove_stale
from qbench.record.result import Result, ResultError

log = logging.getLogger(__name__)

PARTIAL = ".partial-"


class Store:
    def __init__(self, root: str | Path) -> None:
        """Creates nothing. Raises RequestError when the folder could not be written."""
        self.root = Path(root)
        self.results = self.root / "results"
        self.baselines = self.root / "baselines"
        self.models = self.root / "models"
        if (reason := refusal(self.root)) is not None:
            raise RequestError(f"cannot write to outputs={self.root}: {reason}; set outputs=DIR to a writable folder")

    def save(self, result: Result, files: Mapping[str, Mapping[str, np.ndarray]] | None = None) -> Path:
        """Writes the point and returns the path of its result.json; `files` are those that the result refers to.

        Raises WriteError, with what is known of the point, when there is no room for it; what was there stays.
        """
        folder = self.results / result.run_id
        path = folder / "result.json"
        names = result.files()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, tensors in (files or {}).items():
                write_atomically(folder / name, save_tensors({k: np.ascontiguousarray(v) for k, v in tensors.items()}))
            write_atomically(path, result.to_json().encode())
            for other in folder.iterdir():
                if other.name not in names and other != path:
                    other.unlink(missing_ok=True)
        except OSError as error:
            measured = result.error or "it was measured"
            raise WriteError(
                replace(result, status="failed", error=f"{measured}, but not recorded in {folder}: {error.strerror}")
            ) from error
        return path

    def load(self, run_id: str) -> Result | None:
        """The recorded point, or None if there is none that can be read: it is then measured again."""
        path = self.results / run_id / "result.json"
        try:
            result = Result.from_json(path.read_bytes(), str(path))
        except (FileNotFoundError, ResultError):
            return None
        return result if all((path.parent / name).is_file() for name in result.files()) else None

    def lock(self, name: str, what: str) -> AbstractContextManager[None]:
        """Held while `name` is measured, so that no other process does the same; `what` tells humans what it is."""
        return locked(self.root / "locks" / f"{name}.lock", what)

    def save_baseline(self, key: str, scores: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
        """Keeps what an unquantized model scored; `about` says which model and text, and is checked when it is read.

        It only saves work: where it cannot be written, that is said and the next point measures it again.
        """
        tensors = {k: np.ascontiguousarray(v) for k, v in scores.items()}
        try:
            self.baselines.mkdir(parents=True, exist_ok=True)
            remove_stale(self.baselines, PARTIAL)
            write_atomically(self.baselines / f"{key}.safetensors", save_tensors(tensors, metadata=dict(about)))
        except OSError as error:
            log.warning(
                "the reference is not kept in %s (%s): the next point measures it again", self.baselines, error.strerror
            )

    def save_states(self, path: Path, tensors: Mapping[str, Any], about: Mapping[str, str]) -> bool:
        """Writes torch tensors that the original's scores go with; False, with a warning, where there is no room."""
        from safetensors.torch import save_file

        partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
        try:
            self.baselines.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, dict(about))
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            said = re.search(r"I/O error: (.*) \(os error", str(error))  # by safetensors, without errno
            reason = said[1] if said else getattr(error, "strerror", None) or error
            log.warning(
                "the reference is not kept in %s (%s): the next point measures it again", self.baselines, reason
            )
            return False
        return True

    def load_baseline(self, key: str, about: Mapping[str, str]) -> dict[str, np.ndarray] | None:
        """What was saved under the key, or None when it must be measured.

        Raises RequestError for a file that holds the scores of another model or text.
        """
        path = self.baselines / f"{key}.safetensors"
        try:
            with safe_open(path, "np") as file:
                found = file.metadata() or {}
                scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return None
        require_about(path, found, about)
        return scores


def require_about(path: Path, found: Mapping[str, str], about: Mapping[str, str]) -> None:
    """Raises RequestError when a kept file's metadata `found` say that it is of another model or text than `about`."""
    for what, expected in about.items():
        if found.get(what) != expected:
            raise RequestError(
                f"{path} holds a reference whose {what} is {found.get(what, 'not given')}, this point needs "
                f"{expected}; remove the file, and the original is measured again"
            )


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` in one step, on disk before it is visible."""
    descriptor, partial = tempfile.mkstemp(prefix=PARTIAL, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def identity(*parts: object) -> str:
    """A short name for anything JSON can hold: equal parts, equal name, in every process and on every machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
