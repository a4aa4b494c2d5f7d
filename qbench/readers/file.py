"""`quantizer=file`: the variant is what a file holds that somebody else quantized, beside its original.

    quantizer=file quantizer.path=model-Q4_K_M.gguf          a file or a folder
    quantizer=file quantizer.id=ORG/NAME                     a repository of the Hub, quantizer.file= for one file of it
    -m experiment=files 'files=DIR/*,hub:ORG/NAME/FILE'      many of them beside qbench's own methods

The format is told from the file (reader.py). Each linear becomes a format object that decodes as the format's reference
decoder does. What else the file holds (norms, biases, routers, embeddings, head) takes the place of the original's and
is reported. A file of another model is refused: by its tensors and their shapes before a weight is read, and by
weights that do not resemble the original's when they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.errors import RequestError
from qbench.format.format import Format
from qbench.format.plain import Plain
from qbench.model.linears import Linears, find_linears
from qbench.quant.quantizer import InputStatistics, Quantizer
from qbench.readers import hub
from qbench.readers.reader import Held, Reader, ReadError
from qbench.record.quantization import FileRecord
from qbench.registry import READER, find, names
from qbench.values import is_pattern

HUB = "hub:"
WEIGHTS = (".gguf", ".safetensors")
SHOWN = 20  # names of files in a sentence
LEAST_COSINE = 0.2  # between a weight and what a file holds of it; that of unrelated matrices is below 0.01
SETTINGS = ("config.json", "quantization_config.json", "quantize_config.json", "hf_quant_config.json")
SETTINGS = (*SETTINGS, "quant_config.json", "model.safetensors.index.json.meta.json")  # AWQ's older one, and SINQ's


def reader_of(path: Path) -> tuple[str, Reader]:
    """The reader that recognizes the file or folder, with its name; raises ReadError if none does."""
    for name in (known := names(READER)):
        reader = find(READER, name)()
        if reader.recognizes(path):
            return name, reader
    instead = f"; for every file in it, say 'files={path}/*' in a sweep" if path.is_dir() else ""
    raise ReadError(f"{path} is in no format that is known here (readers: {', '.join(known)}){instead}")


def check_place(place: Path, key: str) -> None:
    """Raises RequestError, about the setting `key`, unless some reader recognizes what lies there."""
    if not (place.is_file() or place.is_dir()):  # nor is a pipe read, which would wait for a writer
        instead = "; a pattern names many, which takes a sweep: -m" if is_pattern(str(place)) else ""
        there = "is neither a file nor a folder" if place.exists() else "does not exist"
        raise RequestError(f"{key}={place} {there}; name a file or a folder{instead}", key=key)
    try:
        _, reader = reader_of(place)
        if (check := getattr(reader, "check", None)) is not None:
            check(place)
    except ReadError as error:
        raise RequestError(f"{key}: {error}", key=key) from None


def open_file(path: Path, model: Any) -> Held:
    """Opens what others quantized, for the model whose skeleton this is; raises ReadError."""
    return reader_of(path)[1].open(path, model)


def weight_files(path: Path) -> list[Path]:
    """The files below `path` that hold weights: itself, the parts of a split GGUF, or a folder's *.safetensors."""
    if path.is_dir():
        return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))
    stem, part, _ = path.name.rpartition("-00001-of-")
    return sorted(path.parent.glob(f"{stem}-*-of-*{path.suffix}")) if part else [path]


@dataclass(frozen=True)
class File(Quantizer):
    """What is in the file or folder `path`, or in `file` (all of it: null) of the repository `id` at `revision`."""

    partial: ClassVar[bool] = True  # a file is what it is: coverage and bits say how much of it is in 16 bit

    path: str | None = None
    id: str | None = None
    file: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.id is not None and self.path is not None:
            raise ValueError("quantizer.path and quantizer.id name two files; say one of them")
        if self.path is not None and self.path.startswith(HUB):
            repository, _, revision = self.path.removeprefix(HUB).partition("@")
            owner, _, rest = repository.partition("/")
            name, _, file = rest.partition("/")
            if not (owner and name):
                raise ValueError(f"{self.path} is no file of the Hub: it is hub:ORG/NAME or hub:ORG/NAME/FILE@REVISION")
            for field, value in (("path", None), ("id", f"{owner}/{name}"), ("file", file), ("revision", revision)):
                object.__setattr__(self, field, value or None)
        if self.path is not None and (self.file or self.revision):
            raise ValueError("quantizer.file and quantizer.revision are those of a repository: they need quantizer.id")

    def pinned(self) -> File:
        """The same file at a commit; raises RequestError for one that is not there or that no reader recognizes."""
        if not self.path and not self.id:
            raise RequestError(
                "quantizer=file: say quantizer.path=FILE_OR_DIR, or quantizer.id=ORG/NAME for a repository of the Hub",
                key="quantizer.path",
            )
        if self.id is None:
            check_place(self.place(), "quantizer.path")
            return self
        pinned = File(id=self.id, file=self.file, revision=hub.commit(self.id, self.revision, "quantizer"))
        place, key = pinned.place(), "quantizer.id" if self.file is None else "quantizer.file"
        if self.file is not None and not place.exists():
            raise RequestError(f"{key}: {self.id} has no file {self.file}{pinned._choices()}", key=key)
        if self.file is None and not any(place.glob("*.safetensors")):
            raise RequestError(
                f"{key}: {self.id} holds no safetensors; name one of its files with quantizer.file{pinned._choices()}",
                key="quantizer.file",
            )
        check_place(place, key)
        return pinned

    def _choices(self) -> str:
        """The repository's files that hold weights, to end a sentence with."""
        found = [name for name in hub.file_names(str(self.id), self.revision) if name.endswith(WEIGHTS)]
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return f": {', '.join(found[:SHOWN])}{more}" if found else ""

    def place(self) -> Path:
        """Where the files are; of the Hub, once they are fetched."""
        if self.id is None:
            return Path(str(self.path)).expanduser()
        patterns = [self.file] if self.file else ["*.safetensors", "*.json"]
        folder = hub.fetch(self.id, self.revision, patterns, node="quantizer")
        return folder / self.file if self.file else folder

    def files(self) -> list[Path]:
        place = self.place()
        beside = [place / name for name in SETTINGS if place.is_dir() and (place / name).is_file()]
        return [*weight_files(place), *beside]

    def settings(self) -> dict[str, Any]:
        return {}  # the content says it all

    def for_model(self, model: Any) -> Opened:
        place, states = self.place(), states_of(self.files())
        name, reader = reader_of(place)
        held = reader.open(place, model)
        label = place.name if self.id is None else "/".join(filter(None, (self.id, self.file)))
        opened = Opened(held, name, label, self.revision, states)
        opened.check(find_linears(model))
        return opened

    def quantize(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[Format]:
        raise TypeError("quantizer=file holds what is in the file: it is to be bound to a model first (for_model)")


@dataclass(frozen=True)
class Opened(Quantizer):
    """An open file in the place of a method: a weight is what the file holds under its name."""

    held: Held
    reader: str
    name: str
    revision: str | None
    states: Mapping[Path, tuple[int, ...]] = field(compare=False)  # of its files, when they were opened

    def check(self, found: Linears) -> None:
        """Raises ReadError unless the file holds all linear weights in their shapes."""
        for name, shape in shapes(found).items():
            entry = self.held.entries.get(f"{name}.weight")
            if entry is None:
                raise ReadError(f"{self.name} holds no {name}.weight, which the model has; is it a file of this model?")
            if tuple(entry.shape) != shape:
                raise ReadError(
                    f"{self.name} holds {name}.weight as {list(entry.shape)}, the model has {list(shape)}: it is a "
                    "file of another model"
                )

    def quantize_layers(
        self, names: Sequence[str], weights: Sequence[Tensor], stats: InputStatistics | None
    ) -> list[Format]:
        return [self._read(name, weight) for name, weight in zip(names, weights, strict=True)]

    def _read(self, name: str, weight: Tensor) -> Format:
        stored = self.held.read(f"{name}.weight")
        if isinstance(stored, Tensor):
            stored = Plain.of(stored, self.held.entries[f"{name}.weight"].kind)
        stored = stored.with_tensors({key: tensor.to(weight.device) for key, tensor in stored.tensors().items()})
        cosine = torch.cosine_similarity(stored.dequantize().flatten(), weight.float().flatten(), dim=0)
        if not cosine >= LEAST_COSINE and weight.any():
            raise ReadError(
                f"what {self.name} holds of it does not resemble the original's weight (cosine {float(cosine):.3f}): "
                "it is a file of another model, or its rows or columns are in another order"
            )
        return stored

    def in_place_of(self, name: str, parameter: Tensor) -> Format | Tensor | None:
        if (entry := self.held.entries.get(name)) is None:
            return None
        if tuple(entry.shape) != tuple(parameter.shape):
            raise ReadError(
                f"{self.name} holds {name} as {list(entry.shape)}, the model has {list(parameter.shape)}: it is a file "
                "of another model"
            )
        return self.held.read(name)

    def check_unchanged(self) -> None:
        """Raises ReadError if a file has been replaced or written to since it was opened."""
        now = states_of(self.states)
        if changed := [path.name for path, state in self.states.items() if now[path] != state]:
            raise ReadError(
                f"{changed[0]} was changed or replaced while it was read, so that nobody knows what was measured; "
                "run the point again when the file stays as it is"
            )

    def record(self, sha256: str) -> FileRecord:
        held = self.held
        return FileRecord(
            self.name, self.revision, sha256, self.reader, held.made_by, held.file_bytes, dict(held.ignored)
        )


def states_of(paths: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    """Size, time of the last change and inode of each file; nothing of one that is gone."""
    found: dict[Path, tuple[int, ...]] = {}
    for path in paths:
        try:
            about = path.stat()
        except OSError:
            found[path] = ()
        else:
            found[path] = (about.st_size, about.st_mtime_ns, about.st_ino, about.st_dev)
    return found


def shapes(found: Linears) -> dict[str, tuple[int, ...]]:
    """`[out, in]` of every matrix that is to be quantized, those of fused experts one by one, by name."""
    from qbench.layers.expert_form import expert_weights, form
    from qbench.model.linears import matrix

    known = {name: tuple(matrix(layer).shape) for name, layer in found.layers.items()}
    for name, module in found.experts.items():
        of_one = [tuple(weight.shape) for weight in expert_weights(module, 0)]
        for index in range(module.num_experts):
            known |= {f"{name}.{index}.{p}": shape for p, shape in zip(form(module).projections, of_one, strict=True)}
    return known
