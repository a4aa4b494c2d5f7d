"""Random weights of a published model's shape, a block at a time: what any size costs, without a disk or a download.

Each tensor is made where it is wanted, from the seed, its block's number and its name alone. So a block is the same
whichever others are made, and the first blocks of a model are those of the model with fewer layers. Matrices and
experts are normal with the configuration's standard deviation, norms are ones, as the architecture initializes them.
Another kind of device, and another precision, draws other numbers from one seed: both are part of a point's identity.
A GPU with another number of multiprocessors may do so as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from qbench.errors import RequestError
from qbench.model.blocks import find_blocks
from qbench.sources import pretrained, shapes, skeleton
from qbench.sources.source import LoadedModel, check_seed
from qbench.sources.stream import assembled, parameter_bytes
from qbench.sources.tiny import NOTE, byte_tokenizer

VERSION = 1  # of what is drawn from a seed: a change makes other models


@dataclass(frozen=True)
class Random:
    """A model of the published `shape` (shapes.py), its first `layers` blocks or all, with a tokenizer of bytes."""

    original: ClassVar[bool] = True
    name: str = "random"
    shape: str | None = None
    layers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def named(self, given: Collection[str]) -> Random:
        """`random-SHAPE`: the shape alone is the published model, whose numbers would be put beside these."""
        own = self.name == "random"
        name = f"random-{self.shape}" if own and self.shape else self.name
        layers = f"-{self.layers}layers" if self.layers is not None and (own or "layers" in given) else ""
        seed = f"-seed{self.seed}" if self.seed != 0 and (own or "seed" in given) else ""
        return replace(self, name=name + layers + seed)

    def pinned(self) -> Random:
        return self

    def fingerprint(self) -> str:
        shape = self._shape()
        return f"random:{VERSION}:{shape}:{shapes.depth(shape, self.layers)}layers:seed{self.seed}"

    def made_by(self) -> None:
        return None

    def tokenizer(self, cache: Path) -> Any:
        return byte_tokenizer()

    def configuration(self) -> Any:
        return shapes.configuration(self._shape(), self.layers)

    def config_json(self) -> dict[str, Any]:
        kind, settings = shapes.SHAPES[self._shape()]
        depth = shapes.depth(self._shape(), self.layers)
        return {"model_type": kind.removesuffix("Config").lower(), **settings, "num_hidden_layers": depth}

    def skeleton(self) -> Any | None:
        return pretrained.without_storage(self.configuration)

    def load(
        self, dtype: torch.dtype, device: torch.device, cache: Path, offload: bool = False, identity: str | None = None
    ) -> LoadedModel:
        model = pretrained.settled(assembled(self.stream(dtype, device, cache), offload), device, offload)
        return LoadedModel(model, byte_tokenizer(), identity or self.fingerprint(), NOTE)

    def stream(self, dtype: torch.dtype, device: torch.device, cache: Path, identity: str | None = None) -> Drawn:
        return Drawn(self._shape(), self.seed, dtype, device, self.layers)

    def _shape(self) -> str:
        if not self.shape:
            raise RequestError(
                f"model={self.name} needs model.shape=NAME; choose from: {', '.join(sorted(shapes.SHAPES))}",
                key="model.shape",
                choices=shapes.SHAPES,
            )
        return self.shape


class Drawn:
    """A stream (stream.py) of seeded weights in `dtype` on `device`, of a shape, its first `layers` blocks or all.

    Raises RequestError for a shape that is not known.
    """

    resident = False
    note = NOTE

    def __init__(
        self, shape: str, seed: int, dtype: torch.dtype, device: torch.device, layers: int | None = None
    ) -> None:
        self.shape, self.seed, self.device = shape, seed, torch.device(device)
        self._skeleton = skeleton.make(shapes.configuration(shape, layers), dtype)
        self.prefix, self._blocks = find_blocks(self._skeleton)

    def __len__(self) -> int:
        return len(self._blocks)

    def bytes_of_block(self, i: int | None) -> int:
        """What the parameters of block `i` take in memory; None: of all that lies outside of the blocks."""
        return parameter_bytes(self._skeleton, self.prefix, i)

    def rest(self) -> Any:
        """The model in eval mode, all but its blocks real; its blocks stay on the meta device."""
        return skeleton.filled_rest(self._skeleton, self.prefix, self._fill, self.device)

    def block(self, i: int) -> nn.Module:
        """Block `i` in eval mode; nobody else holds it. On CUDA its tensors are filled by the current stream."""
        return skeleton.filled_block(self._skeleton, self._blocks, i, self.prefix, self._fill, self.device)

    def _fill(self, modules: list[tuple[str, nn.Module]]) -> None:
        """Draws every matrix and every stack of experts; what is tied to another tensor is left."""
        tied = self._skeleton.all_tied_weights_keys
        for name, module in modules:
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() < 2 or f"{name}.{key}" in tied:
                    continue
                content = f"{self.shape} {self.seed} {name}.{key}".encode()
                seed = int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1
                random = torch.Generator(self.device).manual_seed(seed)
                new = torch.empty_like(parameter, device=self.device)
                new.normal_(0, self._skeleton.config.initializer_range, generator=random)
                new = nn.Parameter(new, requires_grad=False)
                new._is_hf_initialized = True  # transformers' mark: no initialization overwrites it
                setattr(module, key, new)
