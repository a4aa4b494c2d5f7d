"""A reader: a safetensors file with int8 weights `[out, in]`, `NAME.weight`, and an fp16 scale a row, `NAME.scale`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qbench.format.aux import Aux
from qbench.format.weight import QuantizedWeight
from qbench.readers.reader import Entry, ReadError

SUFFIX = ".rows.safetensors"


@dataclass(frozen=True)
class Rows:
    def recognizes(self, path: Path) -> bool:
        return path.is_file() and path.name.endswith(SUFFIX)

    def open(self, path: Path, model: Any) -> OpenRows:
        try:
            with safe_open(path, "pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ReadError(f"{path} is no file of rows: {' '.join(str(error).split())}") from None
        entries = {}
        for key, shape in shapes.items():
            if key.endswith(".scale"):
                continue
            scale = shapes.get(key.removesuffix(".weight") + ".scale")
            if scale is not None and (len(shape) != 2 or scale != (shape[0], 1)):
                raise ReadError(f"{path}: the scale of {key} {list(shape)} is {list(scale)}, not one number a row")
            quantized = scale is not None
            entries[key] = Entry(shape, "int8 rows" if quantized else "plain", 0, quantized)
        return OpenRows(path, entries, path.stat().st_size)


@dataclass(frozen=True)
class OpenRows:
    path: Path
    entries: dict[str, Entry]
    file_bytes: int
    made_by: str = "int8 with a scale a row"
    ignored: dict[str, str] = field(default_factory=dict)

    def read(self, name: str) -> QuantizedWeight | Tensor:
        try:
            with safe_open(self.path, "pt") as file:
                stored = file.get_tensor(name)
                if not self.entries[name].quantized:
                    return stored
                scale = file.get_tensor(name.removesuffix(".weight") + ".scale")
        except (SafetensorError, OSError) as error:
            raise ReadError(f"{name} cannot be read from {self.path}: {error}") from None
        if stored.is_floating_point() or not scale.is_floating_point():
            raise ReadError(f"{self.path}: {name} is not int8 with a floating point scale")
        codes = (stored.int() + 128).clamp(0, 255).byte()
        return QuantizedWeight.build(codes, Aux(scale.half()), nbits=8, group_size=codes.shape[1], method="int8 rows")
