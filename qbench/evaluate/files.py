"""A user's file as what it holds: text, lines, JSON objects or the rows of a table, told by its first bytes.

Text is UTF-8 and is taken as it is: nothing is translated or stripped, but a byte order mark at its start is no part of
it. A line ends at "\\n" and nowhere else: U+2028, U+2029, U+0085, form feeds and their like are characters of a line,
as JSON allows them in a string and as the Hub's rows hold them; so is the "\\r" of a "\\r\\n", which JSON takes for a
space. gzip is unpacked and parquet, which is what the Hub delivers, is read, whatever the file's name. All else, such
as another encoding or a damaged archive, is refused in one sentence that begins with `KEY=PATH` (`task.path=FILE`).
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from pathlib import Path
from typing import Any

from qbench.errors import RequestError

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
BOM = "\ufeff"
WIDE_MARKS = (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff", b"\xff\xfe", b"\xfe\xff")  # of UTF-32 and UTF-16
ARCHIVES = {  # first bytes -> what it is
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
}


def read_whole(path: Path, key: str) -> str | list[dict[str, Any]]:
    """The file's text, or, of a parquet file, its rows; raises RequestError, naming `key`, for what is neither."""
    content = _bytes(path, key)
    if content.startswith(PARQUET):
        return _table(content, path, key)
    if path.suffix == ".parquet":
        raise RequestError(f"{key}={path} is no parquet file, whatever its name says")
    return _text(content, path, key)


def lines(text: str) -> list[str]:
    """The lines of a text, each with its newline if it has one."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def read_rows(path: Path, key: str) -> list[dict[str, Any]]:
    """JSON lines, one object each, blank ones left out, or the rows of a parquet file.

    Raises RequestError, naming the line.
    """
    content = read_whole(path, key)
    if not isinstance(content, str):
        return content
    rows = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip(" \t\r"):
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise RequestError(f"{key}={path}, line {number} is not a JSON object; one object per line is expected")
        if "\\u" in line and (half := re.search(r"[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))):
            raise RequestError(
                f"{key}={path}, line {number} holds \\u{ord(half[0]):04x}, half of a surrogate pair, which is no "
                "character; write both halves, or leave it out"
            )
        rows.append(row)
    if not rows:
        raise RequestError(f"{key}={path} is empty")
    return rows


def column(rows: list[dict[str, Any]], name: str, path: Path, key: str) -> list[str]:
    """The text that every row holds under `name`; raises RequestError naming the first row that holds none."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(name), str):
            group = key.partition(".")[0]
            there = ", ".join(map(str, row)) or "nothing"
            raise RequestError(
                f"{key}={path}, line {number} has no text under '{name}'; set {group}.column=NAME, there is {there}"
            )
    return [row[name] for row in rows]


def _bytes(path: Path, key: str) -> bytes:
    """The file, unpacked if it is gzip."""
    if path.is_dir():
        raise RequestError(f"{key}={path} is a folder; give a file in it")
    try:
        content = path.read_bytes()
        if content.startswith(GZIP) or (content and path.suffix == ".gz"):
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(f"cannot read {key}={path}: damaged: {error}; fetch the file again") from None
    except OSError as error:
        raise RequestError(f"cannot read {key}={path}: {error.strerror or error}") from None
    except ValueError:  # a NUL in the name
        raise RequestError(f"{key}={str(path)!r} is no file name") from None
    if not content:
        raise RequestError(f"{key}={path} is empty")
    return content


def _text(content: bytes, path: Path, key: str) -> str:
    for first, name in ARCHIVES.items():
        if content.startswith(first):
            raise RequestError(
                f"{key}={path} is packed with {name}, which is not read; unpack it, or pack it with gzip"
            )
    if content.startswith(WIDE_MARKS) or _every_other_is_nul(content[:4096]):
        raise RequestError(f"{key}={path} is UTF-16 or UTF-32, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{key}={path} is not UTF-8 text (byte {error.start}); convert it, such as by iconv -f LATIN1 -t UTF-8"
        ) from None
    if not (text := text.removeprefix(BOM)):
        raise RequestError(f"{key}={path} is empty")
    return text


def _every_other_is_nul(content: bytes) -> bool:
    """Whether it looks like UTF-16 without a mark: half of it, on even or on odd places, is nearly all NUL."""
    return len(content) > 3 and any(content[at::2].count(0) > 0.8 * len(content[at::2]) for at in (0, 1))


def _table(content: bytes, path: Path, key: str) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise RequestError(f"cannot read {key}={path}: damaged: {reason}") from None
    if not rows:
        raise RequestError(f"{key}={path} is empty")
    return rows
