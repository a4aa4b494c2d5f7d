"""Whether a folder can be written, found out without creating anything: a plan leaves no trace."""

from __future__ import annotations

import errno
import os
from pathlib import Path

LONGEST_NAME = 255  # bytes, of the usual file systems
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refusal(folder: Path) -> str | None:
    """Why files could not be written to `folder`, which need not exist yet; None if they could.

    A folder that a name contradicts (a file in the way, too long) or that this user may not write is found; a disk that
    is full is not, since it may be empty by the time.
    """
    try:
        there = folder.expanduser().absolute()
        while not there.exists():
            if len(os.fsencode(there.name)) > LONGEST_NAME:
                return os.strerror(errno.ENAMETOOLONG)
            there = there.parent
    except (OSError, ValueError, RuntimeError) as error:
        return getattr(error, "strerror", None) or str(error)
    if not there.is_dir():
        return os.strerror(errno.ENOTDIR)
    if not os.access(there, os.W_OK | os.X_OK):
        read_only = bool(os.statvfs(there).f_flag & os.ST_RDONLY)
        return os.strerror(errno.EROFS if read_only else errno.EACCES)
    return None
