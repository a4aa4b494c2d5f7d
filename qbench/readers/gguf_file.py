"""The container GGUF: what a file says of itself, none of it believed before it fits the file's size.

A file is a header (magic, version, two counts), settings by name, a table of tensors (name, shape, type, offset) and
the tensors, one after the other at multiples of an alignment, as llama.cpp demands it. Every count and length is
compared with the bytes that are left before anything is allocated for it: a damaged file costs no more than its size.
The package gguf's reader is not used: it takes lengths and offsets as they come.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qbench.format.gguf_blocks import FLOATS, TYPES
from qbench.readers.reader import ReadError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LONGEST_NAME = 63  # bytes; what llama.cpp has room for
LONGEST_LIST = 4096  # elements of a setting that are kept; of longer ones, as the vocabulary, the length
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
NAMES = {block.number: name for name, block in TYPES.items()}
REPACKED = {31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
Row = tuple[str, tuple[int, ...], str, int, int]  # name, shape, type, bytes, offset
PART = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: `shape` is torch's order, input channels last; its bytes are not read yet."""

    name: str
    type: str
    shape: tuple[int, ...]
    file: Path
    offset: int  # from the start of the file
    nbytes: int

    @property
    def quantized(self) -> bool:
        return self.type not in FLOATS

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    def read(self, start: int = 0, rows: int | None = None) -> Tensor:
        """The bytes of `rows` rows from `start` on, uint8 `[rows, bytes of a row]`; raises ReadError."""
        rows = self.rows - start if rows is None else rows
        row = self.nbytes // self.rows
        held = np.empty(rows * row, dtype=np.uint8)
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset + start * row)
                got = file.readinto(held)
        except OSError as error:
            raise ReadError(f"{self.file.name}: {error.strerror}") from None
        if got != len(held):
            raise ReadError(f"{self.file.name} ends within {self.name}: it was cut off after it was opened")
        return torch.from_numpy(held).view(rows, row)


@dataclass(frozen=True)
class Header:
    """What a file says, or the parts of one that is split."""

    path: Path
    settings: Mapping[str, Any]  # numbers, texts, short lists; of a long list its length
    tensors: Mapping[str, Stored]
    nbytes: int  # of all parts

    @property
    def architecture(self) -> str:
        return str(self.settings.get("general.architecture", ""))

    def setting(self, name: str) -> Any:
        """The setting `name` of the architecture, as in llama.block_count; None where the file has none."""
        return self.settings.get(f"{self.architecture}.{name}")


class Cursor:
    """Reads forward from a file of known size; ReadError where it ends too early."""

    def __init__(self, file: Any, path: Path, size: int) -> None:
        self.file, self.path, self.size, self.at = file, path, size, 0

    def take(self, count: int, what: str) -> bytes:
        self.expect(count, what)
        data = self.file.read(count)
        if len(data) != count:
            raise ReadError(f"{self.path.name} ends within {what}")
        self.at += count
        return data

    def expect(self, count: int, what: str) -> None:
        """Raises ReadError unless that many bytes are left."""
        if count > self.size - self.at:
            raise ReadError(
                f"{self.path.name} is damaged or cut off: {what} needs {count} bytes at {self.at} and the file has "
                f"{self.size}"
            )

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def text(self, what: str, longest: int | None = None) -> str:
        length = self.number("Q", what)
        if longest is not None and length > longest:
            raise ReadError(f"{self.path.name} is damaged: {what} is {length} bytes long, more than {longest}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise ReadError(f"{self.path.name} is damaged: {what} is no UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind == STRING:
            return self.text(what)
        if kind != ARRAY:
            raise ReadError(f"{self.path.name} is damaged: {what} is of the unknown type {kind}")
        inner, count = self.number("I", what), self.number("Q", what)
        if inner in SCALARS:
            width = struct.calcsize(f"<{SCALARS[inner]}")
            self.expect(count * width, what)
            if count > LONGEST_LIST:
                self.skip(count * width)
                return count
            return list(struct.unpack(f"<{count}{SCALARS[inner]}", self.take(count * width, what)))
        if inner != STRING:
            raise ReadError(f"{self.path.name} is damaged: {what} is a list of the type {inner}, which none holds")
        self.expect(8 * count, what)
        for _ in range(count):
            length = self.number("Q", what)
            self.expect(length, what)
            self.skip(length)
        return count

    def skip(self, count: int) -> None:
        """Goes on without reading; the bytes are there."""
        self.file.seek(count, os.SEEK_CUR)
        self.at += count


def is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read(path: Path) -> Header:
    """The header of a file, or of all parts of one that is split; raises ReadError."""
    if not (match := PART.match(path.name)):
        header = read_one(path)
        if (count := header.settings.get("split.count", 1)) not in (0, 1):
            raise ReadError(f"{path.name} is one of {count} parts, whose names must end in -00001-of-{count:05}.gguf")
        return header
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, min(count, 9999) + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ReadError(f"{path.name} is one of {count} parts, and {missing[0]} is not beside it")
    headers = [read_one(part) for part in parts]
    tensors: dict[str, Stored] = {}
    for number, (part, header) in enumerate(zip(parts, headers, strict=True)):
        if (header.settings.get("split.no"), header.settings.get("split.count")) != (number, count):
            raise ReadError(f"{part.name} does not say of itself that it is part {number + 1} of {count}")
        if twice := tensors.keys() & header.tensors.keys():
            raise ReadError(f"{part.name} is damaged: {min(twice)} is in another part as well")
        tensors |= header.tensors
    promised = headers[0].settings.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise ReadError(f"{path.name}: the parts hold {len(tensors)} tensors, and the first one says {promised}")
    return replace(headers[0], tensors=tensors, nbytes=sum(header.nbytes for header in headers))


def read_one(path: Path) -> Header:
    """The header of a single file; raises ReadError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _read(Cursor(file, path, size))
    except OSError as error:
        raise ReadError(f"{path.name}: {error.strerror}") from None


def _read(cursor: Cursor) -> Header:
    name = cursor.path.name
    if cursor.take(4, "the header") != MAGIC:
        raise ReadError(f"{name} does not begin with GGUF: it is no file of that kind, or damaged")
    version = cursor.number("I", "the header")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        order = " in big-endian order" if swapped in VERSIONS else ""
        raise ReadError(
            f"{name} is GGUF version {swapped if order else version}{order}; read are little-endian 2 and 3"
        )
    tensors, settings = cursor.number("Q", "the header"), cursor.number("Q", "the header")
    cursor.expect(13 * settings, f"a list of {settings} settings")
    found: dict[str, Any] = {}
    for _ in range(settings):
        key = cursor.text("the name of a setting", longest=2**16)
        if not key or key in found:
            raise ReadError(f"{name} is damaged: the setting {key[:80]!r} is there twice or has no name")
        found[key] = cursor.value(cursor.number("I", f"setting {key[:80]!r}"), f"setting {key[:80]!r}")
    cursor.expect(32 * tensors, f"a table of {tensors} tensors")
    table = [_row(cursor) for _ in range(tensors)]
    alignment = found.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ReadError(f"{name} is damaged: its alignment is {alignment!r}, no power of two from 8 on")
    return Header(cursor.path, found, _placed(cursor, table, alignment), cursor.size)


def _row(cursor: Cursor) -> Row:
    """The next tensor in the table."""
    file = cursor.path.name
    name = cursor.text("the name of a tensor", longest=LONGEST_NAME)
    if not name.isascii() or not name.isprintable() or " " in name or not name:
        raise ReadError(f"{file} is damaged: {name!r} is no tensor's name")
    dimensions = cursor.number("I", f"the shape of {name}")
    if not 1 <= dimensions <= 4:
        raise ReadError(f"{file} is damaged: {name} has {dimensions} dimensions; tensors have 1 to 4")
    shape = tuple(reversed([cursor.number("Q", f"the shape of {name}") for _ in range(dimensions)]))
    number, offset = cursor.number("I", f"the type of {name}"), cursor.number("Q", f"the offset of {name}")
    if number not in NAMES:
        known = f"{REPACKED[number]}, which llama.cpp gave up for Q4_0 and IQ4_NL" if number in REPACKED else number
        raise ReadError(f"{file}: {name} is stored as type {known}; read are {', '.join(TYPES)}")
    type = NAMES[number]
    block, elements = TYPES[type], math.prod(shape)
    if elements == 0 or shape[-1] % block.weights:
        raise ReadError(f"{file} is damaged: {name} has the shape {list(shape)}, no whole blocks of {type}")
    nbytes = elements // block.weights * block.nbytes
    if nbytes > cursor.size:
        raise ReadError(
            f"{file} is damaged or cut off: {name} {list(shape)} in {type} takes {nbytes} bytes and the file has "
            f"{cursor.size}"
        )
    return name, shape, type, nbytes, offset


def _placed(
    cursor: Cursor, table: list[tuple[str, tuple[int, ...], str, int, int]], alignment: int
) -> dict[str, Stored]:
    """The tensors with their places, which follow each other without gaps; raises ReadError where they do not."""
    file = cursor.path.name
    start, end = -(-cursor.at // alignment) * alignment, 0
    tensors: dict[str, Stored] = {}
    for name, shape, type, nbytes, offset in table:
        if name in tensors:
            raise ReadError(f"{file} is damaged: {name} is there twice")
        if offset != end:
            raise ReadError(f"{file} is damaged: {name} is said to begin at {offset}, where {end} must be")
        if (last := start + offset + nbytes) > cursor.size:
            raise ReadError(f"{file} is damaged or cut off: {name} ends at {last} and the file at {cursor.size}")
        tensors[name] = Stored(name, type, shape, cursor.path, start + offset, nbytes)
        end = -(-(end + nbytes) // alignment) * alignment
    return tensors
