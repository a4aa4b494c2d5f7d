"""The sha256 of files, each hashed once: what was hashed is remembered in `outputs/hashes.json`.

A file is taken for the one that was hashed while its absolute path, size, inode, and the times of its last change of
content (mtime) and of anything (ctime) are the same, to the nanosecond. Whoever writes other content and puts the mtime
back still moves the ctime, which no program can set. What changed within the last SETTLED_S before it was read is not
remembered: a second change could bear the same time where clocks are coarse. The paths themselves are not written.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path

from qbench.checkpoint import manifest
from qbench.errors import RequestError
from qbench.record.store import write_atomically

NAME = "hashes.json"
SETTLED_S = 2.0
KEPT = 10_000  # files, the latest; a forgotten one is hashed again
LARGE_BYTES = 1 << 30  # takes about a second to hash
THREADS = 8  # hashing releases the interpreter's lock; one thread hashes 0.5 to 2 GB/s

_remembered: ContextVar[dict[str, str]] = ContextVar("remembered", default={})  # noqa: B039 only ever replaced
_unsaved: dict[str, str] = {}  # what this process has hashed since the last `save`


@contextmanager
def remembered_in(outputs: Path) -> Iterator[None]:
    """While it lasts, `sha256_of` knows what is remembered under `outputs`; at the end what is new is saved there."""
    token = _remembered.set(_read(outputs / NAME))
    try:
        yield
    finally:
        _remembered.reset(token)
        save(outputs)


def save(outputs: Path) -> None:
    """Writes what this process has hashed since the last time; does nothing while there is no such folder.

    Two processes may save at once: each adds to what it finds, and what one of them loses is hashed again.
    """
    if not _unsaved or not outputs.is_dir():
        return
    kept = list((_read(outputs / NAME) | _unsaved).items())[-KEPT:]
    with suppress(OSError):  # a folder that cannot be written, a full disk: the next run hashes again
        write_atomically(outputs / NAME, json.dumps(dict(kept), indent=0).encode())
    _unsaved.clear()


def sha256_of(paths: Collection[Path]) -> list[str]:
    """The sha256 of each file's content, 64 hex digits; files that are not remembered are read in parallel.

    Raises RequestError for one that cannot be read, such as a link of the Hub's cache to what was never fetched.
    A large model that is not remembered is about to be loaded: what loads it takes seconds to import, and so is
    imported meanwhile.
    """
    known = _remembered.get() | _unsaved
    try:
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            found = pool.map(_sha256, paths, [known] * len(paths))
            if sum(path.stat().st_size for path in paths if _state(path)[0] not in known) > LARGE_BYTES:
                import_module("transformers.core_model_loading")
                import_module("transformers.models.auto.modeling_auto")
            return list(found)
    except OSError as error:
        raise RequestError(f"cannot read {error.filename or 'a file'}: {error.strerror or error}") from None


def of_all(contents: Iterable[str]) -> str:
    """One sha256 for many."""
    return hashlib.sha256("".join(contents).encode()).hexdigest()


def _sha256(path: Path, known: dict[str, str]) -> str:
    key, changed = _state(path)
    if key in known:
        return known[key]
    started = time.time()
    found = manifest.file_sha256(path)
    if changed < started - SETTLED_S and _state(path)[0] == key:
        _unsaved[key] = found
    return found


def _state(path: Path) -> tuple[str, float]:
    """A name for the file as it is, and when it was last changed, in seconds since 1970."""
    about = path.stat()
    state = [os.path.realpath(path), about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
    changed = max(about.st_mtime_ns, about.st_ctime_ns) / 1e9
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32], changed


def _read(file: Path) -> dict[str, str]:
    """What is remembered; a file that is absent or damaged remembers nothing."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if _is_digest(value)}


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
