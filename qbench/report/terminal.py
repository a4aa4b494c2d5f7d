"""The leaderboard of some points alone, on a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TextIO

from qbench.record.outline import Outline
from qbench.report import anatomy, board, columns, entries, table


def show(outputs: Path, run_ids: Collection[str], file: TextIO) -> None:
    """The leaderboard of some points alone, such as those of a sweep that has just ended."""
    kept = entries.latest(entries.read(outputs, run_ids, Outline).entries)
    parts, kept = anatomy.split(kept)
    tables = [columns.table(section) for section in board.sections(kept, *columns.order("quality"))]
    tables += [anatomy.table(one) for one in anatomy.anatomies(parts, outputs)]
    file.write(table.write(tables, "table", width(file)))


def width(file: TextIO) -> int | None:
    return shutil.get_terminal_size().columns if file.isatty() else None
