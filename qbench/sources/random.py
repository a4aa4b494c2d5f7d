"""Random weights of a published model's shape, a block at a time: what any size costs, without a disk or a download.

The same source as a folder (folder.py), but each tensor is made where it is wanted, from the seed, its block's number
and its name alone. So a block is the same whichever others are made, and the first blocks of a model are those of the
model with fewer layers. Matrices and experts are normal with the configuration's standard deviation, norms are ones, as
the architecture initializes them. Another kind of device draws other numbers from one seed.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from qbench.model.blocks import block_of, find_blocks
from qbench.sources import skeleton
from qbench.sources.shapes import configuration


class Random:
    """A source of seeded weights in `dtype` on `device`, of the shape `name`, with its first `layers` blocks or all.

    Raises RequestError for a shape that is not known.
    """

    def __init__(
        self, name: str, seed: int, dtype: torch.dtype, device: torch.device, layers: int | None = None
    ) -> None:
        self.name, self.seed, self.device = name, seed, torch.device(device)
        self._skeleton = skeleton.make(configuration(name, layers), dtype)
        self.prefix, self._blocks = find_blocks(self._skeleton)

    def __len__(self) -> int:
        return len(self._blocks)

    def bytes_of_block(self, i: int | None) -> int:
        """What the parameters of block `i` take in memory; None: of all that lies outside of the blocks."""
        named = self._skeleton.named_parameters()
        return sum(parameter.nbytes for name, parameter in named if block_of(name, self.prefix) == i)

    def rest(self) -> Any:
        """The model in eval mode, all but its blocks real; its blocks stay on the meta device."""
        model = skeleton.copy_of(self._skeleton, self._skeleton)
        outside = [(n, m) for n, m in model.named_modules() if block_of(f"{n}.", self.prefix) is None]
        self._fill(outside)
        model.tie_weights()
        for name, module in outside:
            skeleton.initialize(model, name, module, self.device)
        return model

    def block(self, i: int) -> nn.Module:
        """Block `i` in eval mode; nobody else holds it. On CUDA its tensors are filled by the current stream."""
        block = skeleton.copy_of(self._blocks[i], self._skeleton)
        inside = list(block.named_modules(prefix=f"{self.prefix}.{i}"))
        self._fill(inside)
        for name, module in inside:
            skeleton.initialize(self._skeleton, name, module, self.device)
        return block

    def _fill(self, modules: list[tuple[str, nn.Module]]) -> None:
        """Draws every matrix and every stack of experts; what is tied to another tensor is left."""
        tied = self._skeleton.all_tied_weights_keys
        for name, module in modules:
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() < 2 or f"{name}.{key}" in tied:
                    continue
                content = f"{self.name} {self.seed} {name}.{key}".encode()
                seed = int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1
                random = torch.Generator(self.device).manual_seed(seed)
                new = torch.empty_like(parameter, device=self.device)
                new.normal_(0, self._skeleton.config.initializer_range, generator=random)
                new = nn.Parameter(new, requires_grad=False)
                new._is_hf_initialized = True  # transformers' mark: no initialization overwrites it
                setattr(module, key, new)
