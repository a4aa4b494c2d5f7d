"""GGUF files, whatever types they mix: each weight as the transformers model has it (gguf_names.py says where it lies).

What llama.cpp's conversion does to a weight is undone without decoding it: blocks lie along the input channels, so the
rows of Llama's q and k change places, an expert is a range of rows of its stack, and both keep their bits. Gemma's
norms are stored as w + 1. A newer DeepSeek file has kv_b in two parts (format/gguf.py, GGUFLatent).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbench.format.format import Format
from qbench.model.gguf_names import in_a_file
from qbench.readers import gguf_file
from qbench.readers.gguf_file import Header
from qbench.readers.gguf_names import Weight, latent, located
from qbench.readers.reader import Entry, ReadError

SHOWN = 20  # names of files in a sentence
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GGUF:
    """A file that begins with GGUF, or a folder with one such model in it, split or not."""

    def recognizes(self, path: Path) -> bool:
        if path.is_dir():
            return bool(models_in(path)) and not any(path.glob("*.safetensors"))
        return gguf_file.is_gguf(path)

    def check(self, path: Path) -> None:
        the_file(path)

    def open(self, path: Path, model: Any) -> GGUFFile:
        header = gguf_file.read(the_file(path))
        weights, ignored = located(header, model)
        return GGUFFile(weights, made_by(header), header.nbytes, ignored, header.path.name)


@dataclass(frozen=True)
class GGUFFile:
    """An open file (reader.Held)."""

    weights: Mapping[str, Weight]
    made_by: str
    file_bytes: int
    ignored: Mapping[str, str]
    name: str = ""
    entries: Mapping[str, Entry] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", {name: weight.entry() for name, weight in self.weights.items()})

    def read(self, name: str) -> Format | Tensor:
        weight = self.weights[name]
        parts = [piece.format() for piece in weight.pieces]
        if not all(part.finite() for part in parts):
            raise ReadError(f"{self.name} is damaged: {weight.pieces[0].stored.name} has scales that are no numbers")
        if weight.change == "latent":
            joined = latent(weight, parts)
            return joined if self.entries[name].quantized else joined.dequantize()
        if self.entries[name].quantized:
            return parts[0].rows(in_a_file(weight.shape[0], weight.heads)) if weight.change == "rows" else parts[0]
        values = [
            part.blocks.view(FLOAT_TYPES[piece.stored.type]).reshape(-1)
            for part, piece in zip(parts, weight.pieces, strict=True)
        ]
        if not all(torch.isfinite(value).all() for value in values):
            raise ReadError(f"{self.name} is damaged: {weight.pieces[0].stored.name} holds what is no number")
        if weight.change == "taking turns":
            return torch.stack(values, 1).view(weight.shape)
        if weight.change == "one after the other":
            return torch.cat([value.view(weight.shape[0], -1) for value in values], 1)
        value = values[0].view(weight.shape)
        if weight.change == "norm":
            return (value.float() - 1).to(value.dtype)
        return value[in_a_file(weight.shape[0], weight.heads)] if weight.change == "rows" else value


def models_in(folder: Path) -> list[Path]:
    """The GGUF files of a folder but for vision towers; of one that is split the first part."""
    found = [path for path in sorted(folder.glob("*.gguf")) if not path.name.startswith("mmproj")]
    return [path for path in found if not (match := gguf_file.PART.match(path.name)) or int(match[2]) == 1]


def the_file(path: Path) -> Path:
    """The file that is meant by a path; raises ReadError for a folder without one, or with several."""
    if not path.is_dir():
        return path
    found = models_in(path)
    if len(found) != 1:
        if not found:
            raise ReadError(f"{path} holds no GGUF model")
        names = ", ".join(file.name for file in found[:SHOWN])
        names += f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ReadError(f"{path} holds {len(found)} GGUF models, and one is to be named, as {found[0]}: {names}")
    return found[0]


def made_by(header: Header) -> str:
    """What is known of how the file was made: its type as llama.cpp names the mixture, by whom, with what matrix."""
    from gguf import LlamaFileType

    number = header.settings.get("general.file_type")
    try:
        mixture = LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        kinds = Counter(stored.type for stored in header.tensors.values() if len(stored.shape) > 1)
        mixture = " and ".join(kind for kind, _ in kinds.most_common(2))
    said = [f"GGUF {mixture}"]
    for key, words in (("general.quantized_by", "by"), ("quantize.imatrix.dataset", "importance from")):
        text = header.settings.get(key)
        if isinstance(text, str) and text.strip():
            said.append(f"{words} {' '.join(text.split())[:60]}")
    return ", ".join(said)
