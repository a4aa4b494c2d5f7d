"""Reads single tensors of a folder's safetensors shards, straight to where they are wanted.

The format: 8 bytes, little endian, the length of a JSON header; the header, which gives every tensor's dtype, shape and
place; the bytes of the tensors. https://github.com/huggingface/safetensors#format. Headers are read and checked when
the folder is opened. Tensors are read when they are asked for, with `preadv` and not through a memory map: pages of a
map count as the process' memory for as long as it exists, and faulting them in is slower than reading.

    disk --preadv--> the tensor itself                               on a CPU
    disk --preadv--> ring of pinned chunks --the stream--> tensor    on a GPU, several threads at a time

Nothing of it waits for the kernels that run meanwhile, if the current stream is not theirs (ahead.py).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from qbench.errors import PointError, RequestError

CHUNK_BYTES = 16 << 20
CHUNKS = 8  # transformers converts weights in four threads: each can fill one chunk while another one leaves
SMALL_BYTES = 1 << 20  # tensors that malloc may keep the memory of
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HEADER_BYTES = 100_000_000  # of a header or an index; safetensors itself reads no longer header
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """One tensor on disk: `nbytes` from the byte `start` of its file on."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def select(self, index: int) -> Stored:
        """Element `index` of the first dimension."""
        nbytes = self.nbytes // self.shape[0]
        return Stored(self.file, self.dtype, self.shape[1:], self.start + index * nbytes, nbytes)


class Shards:
    """The tensors of a folder by name; `bytes_read` counts what has come off the disk so far.

    `files` are its shards where they have other names than transformers gives them. Raises RequestError, with one
    sentence, when a shard is absent, truncated or no safetensors file.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        self.tensors: dict[str, Stored] = {}
        self.bytes_read = 0
        self._files: dict[Path, Any] = {}
        self._lock = threading.Lock()
        self._ring: SimpleQueue[tuple[Tensor, torch.cuda.Event | None]] | None = None
        for file in _shards(folder) if files is None else files:
            for name, stored in _header(file).items():
                if name in self.tensors:
                    raise RequestError(f"{folder}: {name} is both in {self.tensors[name].file.name} and in {file.name}")
                self.tensors[name] = stored

    def read(self, name: str, device: torch.device, index: int | None = None) -> Tensor:
        """The tensor, or element `index` of it, on `device`, filled by its current stream; from any thread.

        Raises PointError when the file cannot be read any more, and when the device has no room.
        """
        stored = self.tensors[name] if index is None else self.tensors[name].select(index)
        try:
            target = _empty(stored.nbytes, device)
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise PointError(f"{name}, {stored.nbytes / 1e6:.1f} MB, has no room on {device}: {reason}") from error
        if device.type == "cpu":
            self._fill(target, stored, 0)
        else:
            for begin in range(0, stored.nbytes, CHUNK_BYTES):
                self._send(target[begin : begin + CHUNK_BYTES], stored, begin)
        return target.view(stored.dtype).view(stored.shape)

    def _send(self, target: Tensor, stored: Stored, begin: int) -> None:
        ring = self._chunks()
        chunk, free = ring.get()
        try:
            if free is not None:
                free.synchronize()
            staged = chunk[: target.numel()]
            self._fill(staged, stored, begin)
            target.copy_(staged, non_blocking=True)
            free = torch.cuda.current_stream(target.device).record_event() if target.is_cuda else None
        finally:
            ring.put((chunk, free))

    def _fill(self, target: Tensor, stored: Stored, begin: int) -> None:
        """Reads into a host tensor of bytes, from the byte `begin` of what is stored on."""
        view, done = memoryview(target.numpy()), 0
        while done < len(view):
            try:
                got = os.preadv(self._open(stored.file), [view[done:]], stored.start + begin + done)
            except OSError as error:
                raise PointError(f"{stored.file} cannot be read: {error.strerror}") from error
            if got == 0:
                raise PointError(f"{stored.file} has become shorter since it was opened")
            done += got
        with self._lock:
            self.bytes_read += done

    def _open(self, file: Path) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = file.open("rb", buffering=0)
            return self._files[file].fileno()

    def _chunks(self) -> SimpleQueue:
        with self._lock:
            if self._ring is None:
                self._ring = SimpleQueue()
                for _ in range(CHUNKS):
                    chunk = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
                    self._ring.put((chunk, None))
            return self._ring


class Lazy:
    """A tensor that is read when transformers' weight conversion asks for it as `lazy[...]`, in a thread of its own."""

    def __init__(self, shards: Shards, name: str, device: torch.device) -> None:
        self._shards, self._name, self._device = shards, name, device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def __getitem__(self, key: Any) -> Tensor:
        if self._stream is not None:
            # For good: the thread casts next, and a cast on another stream would not wait for the copy. It is a thread
            # of transformers' pool for this conversion, or the one that made this object and has the same stream.
            torch.cuda.set_stream(self._stream)
        return self._shards.read(self._name, self._device)


def _shards(folder: Path) -> list[Path]:
    """The files that transformers would read: one model.safetensors, or what the index lists."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / INDEX
    if not index.is_file():
        raise RequestError(f"{folder} has neither model.safetensors nor {INDEX}")
    return listed(index)


def listed(index: Path) -> list[Path]:
    """The shards that an index lists, all of which lie beside it; raises RequestError."""
    if index.stat().st_size > HEADER_BYTES:
        raise RequestError(f"{index} has {index.stat().st_size} bytes, which is no index of safetensors shards")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise RequestError(f"{index} lists {outside[0]!r}, which is no file beside it")
    except RequestError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{index} is not an index of safetensors shards: it needs a weight_map") from error
    for name in names:
        if not (index.parent / name).is_file():
            raise RequestError(f"{index.parent} lacks the shard {name}, which {index.name} lists")
    return [index.parent / name for name in names]


def _header(file: Path) -> dict[str, Stored]:
    """Raises RequestError unless the tensors fill the file, each after the other, without a gap."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(size - 8, HEADER_BYTES):
            raise RequestError(
                f"{file} is truncated or no safetensors file: no header fits into its {size} bytes; get it anew"
            )
        try:
            entries = json.loads(opened.read(length), object_pairs_hook=_once)
            entries.pop("__metadata__", None)
            found = {name: _stored(file, entry, 8 + length) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RequestError(f"{file} has no readable safetensors header: {str(error)[:200]}") from error
    place = 8 + length
    for stored in sorted(found.values(), key=lambda stored: (stored.start, stored.nbytes)):
        if stored.start != place:
            raise RequestError(f"{file} has no readable safetensors header: its tensors overlap or leave gaps")
        place += stored.nbytes
    if place != size:
        word = "is truncated" if size < place else "is too long"
        raise RequestError(f"{file} {word}: its header tells of {place} bytes, and it has {size}; get it anew")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice[0][0][:100]} is in it twice")
    return found


def _stored(file: Path, entry: dict[str, Any], data: int) -> Stored:
    if (named := str(entry["dtype"])) not in DTYPES:
        raise ValueError(f"{named[:20]} is none of the types {', '.join(DTYPES)}")
    dtype, shape = DTYPES[named], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    whole = all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end))
    if not whole or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{entry} does not add up")
    return Stored(file, dtype, shape, data + begin, end - begin)


def _empty(nbytes: int, device: torch.device) -> Tensor:
    """Bytes, in host memory such that they go back to the system with the tensor; malloc keeps most of what it gets."""
    if device.type != "cpu" or nbytes < SMALL_BYTES:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
