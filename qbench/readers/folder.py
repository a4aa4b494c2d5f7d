"""What folders of quantized safetensors have in common: config.json says how, shards hold several tensors a matrix.

    config.json        quantization_config: quant_method and its settings
    *.safetensors      model.layers.0.self_attn.q_proj.qweight, .qzeros, .scales; and plain tensors

A Layout knows the parts in which one format stores a matrix. Headers say which matrices are quantized; what a config
says is believed only where headers cannot tell. Shapes are checked against the model's before anything is read.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qbench.errors import PointError, RequestError
from qbench.format.format import Format
from qbench.format.mixed import Mixed
from qbench.layers.expert_form import form
from qbench.readers.names import Fused, Names, matrices, matrix_of
from qbench.readers.reader import Entry, ReadError
from qbench.readers.shards import INDEX, Shards, Stored, listed

CPU = torch.device("cpu")
CONFIG_BYTES = 64 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHOWN = 3  # names in a sentence


@dataclass(frozen=True)
class Linear:
    """One quantized matrix as a checkpoint stores it: the headers of its parts, by their names."""

    module: str  # in the checkpoint's words
    shape: tuple[int, int]  # [out, in], the model's
    stored: Mapping[str, Stored]
    classes: tuple[str, ...] = ("Linear",)  # of the module that holds it in the model

    def error(self, reason: str) -> ReadError:
        return ReadError(f"{self.module}: {reason}")

    def require(self, part: str, *shapes: tuple[int, ...], dtypes: Iterable[torch.dtype] = ()) -> Stored:
        """The header of a part; raises ReadError unless it is there, of one of the shapes and one of the dtypes."""
        if part not in self.stored:
            raise self.error(f"{part} is missing beside {', '.join(sorted(self.stored))}")
        stored = self.stored[part]
        if shapes and stored.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise self.error(
                f"{part} has the shape {list(stored.shape)}, and a weight {list(self.shape)} needs {wanted}"
            )
        if dtypes and stored.dtype not in dtypes:
            raise self.error(f"{part} is stored in {str(stored.dtype).removeprefix('torch.')}, which it cannot be")
        return stored


class Layout(Protocol):
    """How one format stores its matrices."""

    parts: tuple[str, ...]  # of a quantized matrix, after its module's name and a dot
    marks: tuple[str, ...]  # those of `parts` that no matrix in 16 bits has
    unused: Mapping[str, str]  # names of what only an engine reads, with the reason; "" for what changes no number

    def kind(self, linear: Linear) -> str:
        """How it is stored, in words, from headers alone; raises ReadError unless they fit its shape."""
        ...

    def decode(self, linear: Linear, tensors: Mapping[str, Tensor]) -> Format:
        """The weight of parts that `kind` has accepted; raises ReadError for values that mean nothing."""
        ...


class HeldFolder:
    """A qbench.readers.reader.Held."""

    def __init__(self, path: Path, model: Any, layout: Layout, made_by: str) -> None:
        self.made_by, self._layout, self._path = made_by, layout, path
        check_architecture(path, model)
        try:
            self._shards = Shards(path, shards_of(path))
        except (RequestError, OSError) as error:
            raise ReadError(str(error)) from error
        self.file_bytes = sum(file.stat().st_size for file in {s.file for s in self._shards.tensors.values()})
        self._names = Names(model)
        self.entries: dict[str, Entry] = {}
        self.ignored: dict[str, str] = {}
        self._linears: dict[str, Linear] = {}
        self._plain: dict[str, tuple[str, Fused | None]] = {}  # by entry: the checkpoint's key
        quantized, plain = self._sort()
        for module, stored in quantized.items():
            self._add_linear(module, stored)
        for key in plain:
            self._add_plain(key, self._shards.tensors[key])
        if not self._linears:
            raise ReadError(f"{path} holds no weight quantized as its config.json says")
        kinds: dict[str, set[str]] = defaultdict(set)  # of the matrices that will be one stack
        for name, entry in self.entries.items():
            if stack := self._names.stack_of(name):
                kinds[stack].add(entry.kind)
        self._mixed = {stack for stack, found in kinds.items() if len(found) > 1}
        if lacking := self._names.lacking(set(self.entries)):
            more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
            raise ReadError(f"{path} lacks {', '.join(lacking[:SHOWN])}{more}, which the original has")

    def read(self, name: str) -> Format | Tensor:
        if name in self._linears:
            linear = self._linears[name]
            self._check_no_bias(linear)
            found = self._layout.decode(linear, {p: self._tensor(f"{linear.module}.{p}") for p in linear.stored})
            return Mixed.of(found) if self._names.stack_of(name) in self._mixed else found
        key, fused = self._plain[name]
        if fused is None:
            tensor = self._tensor(key)
            return tensor.T.contiguous() if name in self._names.transposed else tensor
        index, projection, _ = name.removeprefix(f"{fused.module}.").split(".")
        how = form(self._names.experts[fused.module])
        return matrix_of(how, projection, fused.parameter, self._tensor(key, int(index)))

    def _check_no_bias(self, linear: Linear) -> None:
        """AutoGPTQ gives every layer a bias; where the original has none, it has to be zero."""
        if (key := f"{linear.module}.bias") in self.ignored and bool(self._tensor(key).any()):
            raise linear.error("it has a bias, and the original's layer has none")

    def _tensor(self, key: str, index: int | None = None) -> Tensor:
        try:
            return self._shards.read(key, CPU, index)
        except PointError as error:
            raise ReadError(str(error)) from error

    def _sort(self) -> tuple[dict[str, dict[str, Stored]], list[str]]:
        """The parts of every quantized module, and the keys of all other tensors."""
        layout, modules = self._layout, defaultdict(dict)
        for key, stored in self._shards.tensors.items():
            for part in layout.parts:
                if key.endswith(f".{part}"):
                    modules[key.removesuffix(f".{part}")][part] = stored
                    break
        quantized = {name: parts for name, parts in modules.items() if not parts.keys().isdisjoint(layout.marks)}
        taken = {f"{module}.{part}" for module, parts in quantized.items() for part in parts}
        plain = []
        for key in self._shards.tensors:
            if (last := key.rpartition(".")[2]) in layout.unused:
                if reason := layout.unused[last]:
                    self.ignored[key] = reason
            elif key not in taken:
                plain.append(key)
        return quantized, plain

    def _add_linear(self, module: str, stored: Mapping[str, Stored]) -> None:
        name = self._names.place(f"{module}.weight")
        if not isinstance(name, str) or name not in self._names.shapes:
            if not self._names.superfluous(f"{module}.weight"):
                raise ReadError(f"{module} is quantized, and the original has no such weight")
            self.ignored[f"{module}.weight"] = "the architecture has no use for it"
            return
        shape = self._names.matrix_shape(name)
        if len(shape) != 2:
            raise ReadError(f"{module} is quantized, and the original's {list(shape)} is no matrix")
        linear = Linear(module, shape, stored, self._names.classes(name))
        nbytes = sum(part.nbytes for part in stored.values())
        self._enter(name, Entry(shape, self._layout.kind(linear), nbytes, quantized=True))
        self._linears[name] = linear

    def _add_plain(self, key: str, stored: Stored) -> None:
        place = self._names.place(key)
        if place is None:
            self.ignored[key] = "the original has no such parameter"
        elif isinstance(place, Fused):
            how, experts = form(self._names.experts[place.module]), self._names.experts[place.module]
            self._check_plain(key, stored, tuple(getattr(experts, place.parameter).shape))
            for index in range(experts.num_experts):
                for projection, shape in matrices(how, place.parameter, stored.shape).items():
                    name = f"{place.module}.{index}.{projection}.weight"
                    nbytes = shape[0] * shape[1] * stored.dtype.itemsize
                    self._enter(name, Entry(shape, dtype_name(stored.dtype), nbytes, quantized=False))
                    self._plain[name] = key, place
        elif place in self._names.buffers:
            self.ignored[key] = "a buffer, which the original has of its own"
        else:
            self._check_plain(key, stored, self._names.shapes[place])
            shape = self._names.matrix_shape(place)
            self._enter(place, Entry(shape, dtype_name(stored.dtype), stored.nbytes, quantized=False))
            self._plain[place] = key, None

    def _check_plain(self, key: str, stored: Stored, shape: tuple[int, ...]) -> None:
        if stored.shape != shape:
            raise ReadError(f"{key} has the shape {list(stored.shape)}, and the original's is {list(shape)}")
        if not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
            raise ReadError(f"{key} is stored in {dtype_name(stored.dtype)}, and nothing says what its codes stand for")

    def _enter(self, name: str, entry: Entry) -> None:
        if name in self.entries:
            raise ReadError(f"{self._path} holds {name} twice, in two ways")
        self.entries[name] = entry


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}.get(
        dtype, str(dtype).removeprefix("torch.")
    )


def config_of(path: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object in the folder of `path`, or {} where there is none that can be read."""
    file = (path if path.is_dir() else path.parent) / name
    try:
        if file.stat().st_size > CONFIG_BYTES:
            return {}
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def quantization_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its quantization, {} if nothing: in config.json, or beside it as older tools did."""
    config = config_of(path)
    for place in (config, config.get("text_config")):
        for name in ("quantization_config", "compression_config"):  # the latter is compressed-tensors' older one
            if isinstance(place, dict) and isinstance(found := place.get(name), dict):
                return found
    if found := config_of(path, "quantize_config.json"):
        return {"quant_method": "gptq"} | found
    if "w_bit" in (found := config_of(path, "quant_config.json")):
        return {"quant_method": "awq"} | found
    return {}


def method_of(path: Path) -> str:
    """quant_method, in lower case; "" where nothing is quantized."""
    return str(quantization_of(path).get("quant_method", "")).lower()


def holds_part(path: Path, part: str) -> bool:
    """Whether a folder without settings holds tensors of this last name, by its headers."""
    if not path.is_dir() or method_of(path) or not config_of(path):
        return False
    try:
        return any(key.endswith(f".{part}") for key in Shards(path, shards_of(path)).tensors)
    except (RequestError, ReadError, OSError):
        return False


def integer(settings: Mapping[str, Any], name: str, default: int | None) -> int:
    """A whole number out of a configuration; raises ReadError for anything else."""
    value = settings.get(name, default)
    if type(value) is not int:
        raise ReadError(f"the quantization_config has {name}={str(value)[:50]!r}, which is no whole number")
    return value


def check_architecture(path: Path, model: Any) -> None:
    """Raises ReadError when the folder says that it holds another architecture than the original's."""
    theirs, ours = config_of(path).get("model_type"), getattr(model.config, "model_type", None)
    if isinstance(theirs, str) and ours and theirs != ours:
        raise ReadError(f"{path} holds a model of the architecture {theirs[:50]}, and the original is a {ours}")


def shards_of(path: Path) -> list[Path] | None:
    """The shards of a folder, or of one file; None for the names that transformers gives them.

    Raises ReadError where weights are pickled: they are never opened, since they can run code.
    """
    if path.is_file():
        return [path]
    if (path / "model.safetensors").is_file() or (path / INDEX).is_file():
        return None
    if indices := sorted(path.glob("*.safetensors.index.json")):
        return listed(indices[0])
    if files := sorted(path.glob("*.safetensors")):
        if len(files) > 1:
            raise ReadError(f"{path} has {len(files)} safetensors files and no index: name the one that is meant")
        return files
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in PICKLES):
        raise ReadError(f"{path} has pickled weights ({pickles[0]}), which are never opened; save it as safetensors")
    raise ReadError(f"{path} holds no safetensors file")
