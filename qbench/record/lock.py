"""Locks between processes, and between machines on a shared folder: expensive work is done once and waited for.

They are locks of the operating system (flock), so they end with the process that holds them, however it ends. They
only save work: what is written is right without them too, since every file is renamed into its place when complete.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

STALE_SECONDS = 3600  # nothing that is renamed into its place takes that long to write


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds the lock file `path`; while another process does, says so once (`what` is waited for) and waits.

    Where the file system has no locks, the work may be done twice; that is said and nothing else happens.
    """
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a kill
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s: another process is at it, waiting", what)
            lock.acquire(poll_interval=0.2)
    except OSError as error:
        log.warning("%s: no lock in %s (%s); concurrent points may do this twice", what, path.parent, error.strerror)
    try:
        yield
    finally:
        if lock.is_locked:
            path.unlink(missing_ok=True)  # while held: who waits for this file sees that it is gone and makes a new one
            lock.release()


def remove_stale(folder: Path, prefix: str) -> None:
    """Removes what killed writers left in `folder` under names with `prefix`; younger things may still be written."""
    for path in folder.glob(f"{prefix}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime < STALE_SECONDS:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
