"""What somebody else quantized, dequantized, as the original: where the checkpoint it was made of is not to be had.

    model=file model.path=X.gguf quantizer=none                                      perplexity without an original
    model=file model.path=X-Q8_0.gguf quantizer=file quantizer.path=X-Q4_K_M.gguf    Q8_0 stands in for it

Any reader's files will do (readers/). Configuration and tokenizer are those of the folder; of a GGUF file by itself
they are the file's own, as transformers reads them. Every result says in its note that this is a stand-in.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qbench.errors import PointError, RequestError
from qbench.layers.expert_form import form, put_expert, stacked_parameters
from qbench.model.blocks import NotAChainError, block_of, find_blocks
from qbench.readers import gguf_file
from qbench.readers.file import check_place, open_file, weight_files
from qbench.readers.gguf import the_file
from qbench.readers.reader import Held, ReadError
from qbench.sources import files, hashes, pretrained, skeleton
from qbench.sources.source import LoadedModel
from qbench.sources.stream import assembled

NOTE = "a stand-in for the original, dequantized from {}: differences are to this, not to 16-bit weights"


@dataclass(frozen=True)
class File:
    """The model that the file or folder `path` holds, known by its name."""

    original: ClassVar[bool] = True
    name: str = "file"
    path: str | None = None

    def named(self, given: Collection[str]) -> File:
        if not self.path or self.name != "file":
            return self
        return replace(self, name=Path(os.path.abspath(os.path.expanduser(self.path))).name.removesuffix(".gguf"))

    def pinned(self) -> File:
        return self

    def place(self) -> Path:
        """The file or folder; raises RequestError unless some reader recognizes it."""
        if not self.path:
            raise RequestError(f"model={self.name} needs model.path=FILE_OR_DIR, what somebody else quantized")
        place = Path(self.path).expanduser()
        check_place(place, "model.path")
        if place.is_file() and not gguf_file.is_gguf(place):
            raise RequestError(
                f"model.path={place} holds weights alone: name its folder, with config.json and a tokenizer",
                key="model.path",
            )
        try:
            return the_file(place) if place.is_dir() and not (place / "config.json").is_file() else place
        except ReadError as error:
            raise RequestError(f"model.path: {error}", key="model.path") from None

    def fingerprint(self) -> str:
        place = self.place()
        if (place / files.WEIGHTS).is_file() or (place / files.INDEX).is_file():
            return f"file:{files.fingerprint(place)}"
        beside = files.settings(place) if place.is_dir() else []
        contents = hashes.sha256_of([*weight_files(place), *beside])
        return f"file:{hashlib.sha256(''.join(contents).encode()).hexdigest()[:32]}"

    def made_by(self) -> None:
        return None

    def tokenizer(self, cache: Path) -> Any:
        from transformers import AutoTokenizer

        place = self.place()
        if place.is_dir():
            return pretrained.read_tokenizer(place, str(place))
        _header(place)
        return pretrained.readable(
            lambda: AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name, trust_remote_code=False),
            place.parent,
            str(place),
        )

    def configuration(self) -> Any:
        from transformers import AutoConfig

        place = self.place()
        if place.is_dir():
            found = pretrained.read_configuration(place, str(place))
        else:
            header = _header(place)
            found = pretrained.readable(
                lambda: AutoConfig.from_pretrained(place.parent, gguf_file=place.name, trust_remote_code=False),
                place.parent,
                str(place),
            )
            if (size := header.setting("attention.key_length")) and hasattr(found, "head_dim"):
                found.head_dim = size  # which transformers takes from the class
            if "rope_freqs.weight" in header.tensors:
                raise RequestError(
                    f"{place.name} slows its rotary frequencies down, which a configuration made of a GGUF file does "
                    "not say: put it into a folder with the model's config.json and tokenizer, and name that"
                )
        config = type(found).from_dict(found.to_dict())
        config.__dict__.pop("quantization_config", None)  # what follows is in 16 or 32 bits
        return config

    def skeleton(self) -> Any | None:
        return pretrained.without_storage(self.configuration)

    def load(
        self, dtype: torch.dtype, device: torch.device, cache: Path, offload: bool = False, identity: str | None = None
    ) -> LoadedModel:
        tokenizer, identity = self.tokenizer(cache), identity or self.fingerprint()
        try:
            stream = Dequantized(self.place(), self.configuration(), dtype, device)
            model = pretrained.settled(assembled(stream, offload), device, offload)
        except NotAChainError as error:
            raise RequestError(f"model.path={self.path}: {error}, and such a model is not read from a file") from None
        except PointError as error:
            raise RequestError(str(error)) from None
        return LoadedModel(model, tokenizer, identity, stream.note)

    def stream(
        self, dtype: torch.dtype, device: torch.device, cache: Path, identity: str | None = None
    ) -> Dequantized | None:
        try:
            return Dequantized(self.place(), self.configuration(), dtype, device)
        except NotAChainError:
            return None


class Dequantized:
    """A stream (stream.py) of what a file holds, in `dtype` on `device`.

    Raises RequestError, before a weight is read, for a file that is damaged or does not hold the configuration's model.
    """

    resident = False

    def __init__(self, place: Path, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.place, self.device = place, torch.device(device)
        self._skeleton, self._held = _opened(place, config, dtype)
        self.note = NOTE.format(self._held.made_by)
        self.prefix, self._blocks = find_blocks(self._skeleton)
        if absent := [name for name in self._wanted() if name not in self._held.entries]:
            raise RequestError(f"{place.name} holds no {absent[0]}, which the model of its configuration has")

    def __len__(self) -> int:
        return len(self._blocks)

    def bytes_of_block(self, i: int | None) -> int:
        """What block `i` takes in the file; None: all that lies outside of the blocks."""
        return sum(entry.nbytes for name, entry in self._held.entries.items() if block_of(name, self.prefix) == i)

    def rest(self) -> Any:
        """The model in eval mode, all but its blocks real; its blocks stay on the meta device."""
        return skeleton.filled_rest(self._skeleton, self.prefix, self._fill, self.device)

    def block(self, i: int) -> nn.Module:
        """Block `i` in eval mode; nobody else holds it. Raises PointError for what turns out to be damaged."""
        return skeleton.filled_block(self._skeleton, self._blocks, i, self.prefix, self._fill, self.device)

    def _wanted(self) -> list[str]:
        tied = self._skeleton.all_tied_weights_keys
        modules = self._skeleton.named_modules()
        return [
            n for path, module in modules for key in _keys(module) for n in _names(path, module, key) if n not in tied
        ]

    def _fill(self, modules: list[tuple[str, nn.Module]]) -> None:
        tied = self._skeleton.all_tied_weights_keys
        for path, module in modules:
            for key in _keys(module):
                if f"{path}.{key}" in tied:
                    continue
                old = getattr(module, key)
                if key in stacked_parameters(module):
                    _put(module, key, torch.empty_like(old, device=self.device))
                else:
                    _put(module, key, self._read(f"{path}.{key}").to(self.device, old.dtype).view(old.shape))
            for index in range(module.num_experts) if stacked_parameters(module) else ():
                matrices = [f"{path}.{index}.{projection}.weight" for projection in form(module).projections]
                put_expert(module, index, [self._read(name).to(self.device) for name in matrices])

    def _read(self, name: str) -> Tensor:
        try:
            held = self._held.read(name)
            return held if isinstance(held, Tensor) else held.dequantize()
        except ReadError as error:
            raise PointError(str(error)) from None


def _opened(place: Path, config: Any, dtype: torch.dtype) -> tuple[Any, Held]:
    """The model without weights, and what holds them; where the file has a head of its own, untied."""
    try:
        model = skeleton.make(config, dtype, trust_remote_code=False)
        held = open_file(place, model)
        tied = model.all_tied_weights_keys
        if config.tie_word_embeddings and any(name in held.entries for name in tied):
            config.tie_word_embeddings = False
            model = skeleton.make(config, dtype, trust_remote_code=False)
        return model, held
    except ReadError as error:
        raise RequestError(f"model.path: {error}", key="model.path") from None


def _keys(module: nn.Module) -> list[str]:
    """Names of the tensors that the module itself holds and that files hold: parameters, and stored buffers."""
    buffers = (name for name in module._buffers if name not in module._non_persistent_buffers_set)
    return [key for key in (*module._parameters, *buffers) if getattr(module, key) is not None]


def _names(path: str, module: nn.Module, key: str) -> list[str]:
    """What the tensor is called in a file: experts' matrices one by one."""
    if key not in stacked_parameters(module):
        return [f"{path}.{key}"]
    how = form(module)
    kinds = how.projections[-1:] if key == "down_proj" else how.projections[:-1]
    return [f"{path}.{index}.{kind}.weight" for index in range(module.num_experts) for kind in kinds]


def _put(module: nn.Module, key: str, value: Tensor) -> None:
    if key not in module._parameters:
        setattr(module, key, value)
        return
    parameter = nn.Parameter(value, requires_grad=False)
    parameter._is_hf_initialized = True  # transformers' mark: no initialization overwrites it
    setattr(module, key, parameter)


def _header(place: Path) -> gguf_file.Header:
    """The file's header, checked before transformers believes it; raises RequestError."""
    try:
        return gguf_file.read(place)
    except ReadError as error:
        raise RequestError(f"model.path: {error}", key="model.path") from None
