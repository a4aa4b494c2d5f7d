"""The folder of results. Everything is written beside its place and renamed into it, the result itself last.

    outputs/results/RUN_ID/result.json            one point
    outputs/results/RUN_ID/windows-HASH.safetensors   its per-window NLLs
    outputs/baselines/KEY.safetensors             per-window NLLs of an unquantized model, shared by points
    outputs/models/                               converted models

A process killed at any moment leaves the old state or the new one, and at worst a file whose name starts with
`.partial-`, which nothing reads and the next save of the same folder removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from qbench.errors import RequestError
from qbench.record.result import Result, ResultError

PARTIAL = ".partial-"


class Store:
    def __init__(self, root: str | Path) -> None:
        """Raises RequestError when the folder cannot be written."""
        self.root = Path(root)
        self.results = self.root / "results"
        self.baselines = self.root / "baselines"
        self.models = self.root / "models"
        try:
            for folder in (self.results, self.baselines):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise RequestError(
                f"cannot write to outputs={self.root}: {error.strerror}; set outputs=DIR to a writable folder"
            ) from None

    def save(self, result: Result, window_nll: Mapping[str, np.ndarray] | None = None) -> Path:
        """Writes the point and returns the path of its result.json; `window_nll` is what the result refers to."""
        folder = self.results / result.run_id
        folder.mkdir(parents=True, exist_ok=True)
        names = {record.window_nll_file for record in result.evaluation}
        if window_nll is not None:
            (name,) = names
            write_atomically(folder / name, save_tensors({k: np.ascontiguousarray(v) for k, v in window_nll.items()}))
        path = folder / "result.json"
        write_atomically(path, result.to_json().encode())
        for other in folder.iterdir():
            if other.name not in names and other != path:
                other.unlink(missing_ok=True)
        return path

    def load(self, run_id: str) -> Result | None:
        """The recorded point, or None if there is none that can be read: it is then measured again."""
        path = self.results / run_id / "result.json"
        try:
            result = Result.from_json(path.read_bytes(), str(path))
        except (FileNotFoundError, ResultError):
            return None
        complete = all((path.parent / record.window_nll_file).is_file() for record in result.evaluation)
        return result if complete else None

    def save_baseline(self, key: str, window_nll: np.ndarray) -> None:
        write_atomically(self.baselines / f"{key}.safetensors", save_tensors({"baseline": window_nll}))

    def load_baseline(self, key: str) -> np.ndarray | None:
        """Per-window NLLs in nats, fp64 `[windows]`, or None when they must be measured."""
        try:
            return load_tensors((self.baselines / f"{key}.safetensors").read_bytes())["baseline"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return None


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
