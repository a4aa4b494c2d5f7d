"""A packed checkpoint of qbench's own (checkpoint/packed.py), read like any other file.

So a variant that somebody exported stands beside the original and other methods, as `quantizer=file`. Its hashes are
checked before a weight is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qbench.checkpoint import manifest
from qbench.errors import RequestError
from qbench.format.format import Format
from qbench.format.plain import Plain
from qbench.readers.reader import Entry, ReadError


@dataclass(frozen=True)
class PackedFile:
    def recognizes(self, path: Path) -> bool:
        return (path / manifest.MANIFEST).is_file()

    def open(self, path: Path, model: Any) -> PackedWeights:
        try:
            about = manifest.read(path)
            manifest.verify(path, about)
            return PackedWeights.of(path, about)
        except (RequestError, SafetensorError, OSError) as error:
            raise ReadError(str(error)) from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ReadError(f"{path / manifest.MANIFEST} does not describe what the folder holds: {error}") from None


@dataclass(frozen=True)
class PackedWeights:
    entries: Mapping[str, Entry]
    made_by: str
    file_bytes: int
    sources: Mapping[str, Callable[[], Format | Tensor]]
    ignored: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(folder: Path, about: Mapping[str, Any]) -> PackedWeights:
        places: dict[str, Path] = {}
        for name in sorted(file for file in about["files"] if file.endswith(".safetensors")):
            with safe_open(folder / name, "pt") as file:
                places |= dict.fromkeys(file.keys(), folder / name)
        entries: dict[str, Entry] = {}
        sources: dict[str, Callable[[], Format | Tensor]] = {}
        left = set(places)
        for layer, held in about["layers"].items():
            for prefix, described in held["weights"].items():
                names = {key: f"{layer}.{prefix}{key}" for key in described["buffers"]}
                left -= set(names.values())
                *lead, rows, columns = described["shape"]
                read = partial(_format, described, names, places)
                part = prefix.rstrip(".")
                for index in range(lead[0] if lead else 1):
                    name = f"{layer}.{index}.{part}.weight" if lead else f"{layer}.weight"
                    nbytes = sum(_nbytes(*buffer) for buffer in described["buffers"].values()) // (lead or [1])[0]
                    quantized = described.get("format") != Plain.name
                    entries[name] = Entry((rows, columns), described["method"], nbytes, quantized)
                    sources[name] = partial(_select, read, index) if lead else read
        for name in left:
            with safe_open(places[name], "pt") as file:
                stored = file.get_slice(name)
                shape, kind = tuple(stored.get_shape()), stored.get_dtype()
            entries[name] = Entry(shape, kind, 0, quantized=False)
            sources[name] = partial(_tensor, name, places[name])
        quantizer = about["origin"].get("quantizer") or {}
        told = " ".join(str(quantizer[key]) for key in ("name", "nbits") if quantizer.get(key) is not None)
        size = sum(path.stat().st_size for path in set(places.values()))
        return PackedWeights(entries, f"qbench {told}".strip(), size, sources)

    def read(self, name: str) -> Format | Tensor:
        try:
            return self.sources[name]()
        except (RequestError, SafetensorError, OSError, KeyError, ValueError) as error:
            raise ReadError(f"{name} cannot be read: {error}") from None


def _tensor(name: str, place: Path) -> Tensor:
    with safe_open(place, "pt") as file:
        return file.get_tensor(name)


def _format(described: Mapping[str, Any], names: Mapping[str, str], places: Mapping[str, Path]) -> Format:
    return manifest.rebuild(described, {key: _tensor(name, places[name]) for key, name in names.items()})


def _select(read: Callable[[], Format], index: int) -> Format:
    return read().select(index)


def _nbytes(dtype: str, shape: list[int]) -> int:
    import torch

    return getattr(torch, dtype).itemsize * torch.Size(shape).numel()
