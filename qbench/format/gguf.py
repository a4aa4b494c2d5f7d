"""GGUFBlocks: the format `gguf`, blocks of one GGUF type as a file has them; GGUFLatent: DeepSeek's kv_b in two parts.

Blocks lie along the input channels of a row, so rows can be taken apart and put in another order without decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.format.format import Format
from qbench.format.gguf_blocks import TYPES

AT_ONCE = 2**20  # weights that are decoded together: what a step takes besides stays below 50 MB


def row_bytes(type: str, columns: int) -> int:
    """Bytes of one row of `columns` weights; raises ValueError for an unknown type or a row of no whole blocks."""
    if type not in TYPES:
        raise ValueError(f"unknown GGUF type {type}; known are {', '.join(TYPES)}")
    block = TYPES[type]
    if columns % block.weights:
        raise ValueError(f"a row of {columns} weights is no multiple of the {block.weights} in a block of {type}")
    return columns // block.weights * block.nbytes


@dataclass(frozen=True)
class GGUFBlocks(Format):
    """Weights `[..., out, in]` as blocks of one type; `of_blocks` makes them."""

    name: ClassVar[str] = "gguf"

    shape: tuple[int, ...]
    type: str  # Q4_K
    blocks: Tensor  # uint8 [..., out, bytes of a row]
    method: str = ""
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    @property
    def group_size(self) -> int:
        return TYPES[self.type].weights

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The reference decoder's numbers, fp32, cast to `dtype`; a part of the rows at a time."""
        block = TYPES[self.type]
        flat = self._flat()
        out = torch.empty(len(flat), block.weights, dtype=dtype, device=flat.device)
        step = AT_ONCE // block.weights
        for start in range(0, len(flat), step):
            out[start : start + step] = block.decode(flat[start : start + step])
        return out.view(self.shape)

    def finite(self) -> bool:
        """Whether all fp16 scales are numbers; those of a damaged file may not be."""
        flat = self._flat()
        found = [flat[:, at + 1] & 0x7C for at in TYPES[self.type].halves]  # exponents of little-endian numbers
        return not any(bool((high == 0x7C).any()) for high in found)

    def tensors(self) -> dict[str, Tensor]:
        return {"blocks": self.blocks}

    def stored_bytes(self) -> dict[str, int]:
        """A block holds codes and scales together: all of it is counted as codes."""
        return {"codes": self.blocks.nbytes}

    def with_tensors(self, named: Mapping[str, Tensor]) -> GGUFBlocks:
        return replace(self, blocks=named["blocks"])

    def describe(self) -> dict[str, Any]:
        facts = {"shape": list(self.shape), "type": self.type}
        return facts | {"method": self.method, "diagnostics": dict(self.diagnostics)}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GGUFBlocks:
        shape, type, blocks = tuple(int(size) for size in description["shape"]), description["type"], tensors["blocks"]
        expected = (*shape[:-1], row_bytes(type, shape[-1]))
        if blocks.dtype != torch.uint8 or tuple(blocks.shape) != expected:
            raise ValueError(f"blocks of {type} for weights {list(shape)} are uint8 {list(expected)}")
        return cls(shape, type, blocks, description["method"], description["diagnostics"])

    def rows(self, index: Tensor) -> GGUFBlocks:
        """The same weights `[out, in]` with their rows in the order of `index` `[out]`."""
        return replace(self, blocks=self.blocks[index])

    def _flat(self) -> Tensor:
        """uint8 `[n, bytes of a block]`."""
        nbytes = TYPES[self.type].nbytes
        return self.blocks.reshape(self.blocks.numel() // nbytes, nbytes)


@dataclass(frozen=True)
class GGUFLatent(Format):
    """The projection out of the latent of DeepSeek's attention, `[heads (nope + v), lora]`, as newer files split it.

    Of a head, the rows of its keys are stored transposed and those of its values as they are; the two parts may be of
    different types.
    """

    name: ClassVar[str] = "gguf-latent"

    shape: tuple[int, ...]
    key_type: str
    value_type: str
    key: Tensor  # blocks of [..., heads, lora, nope]
    value: Tensor  # blocks of [..., heads, v, lora]
    method: str = ""
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    @property
    def group_size(self) -> int:
        return TYPES[self.value_type].weights

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        key, value = (part.dequantize(dtype) for part in self._parts())
        return torch.cat([key.mT, value], -2).flatten(-3, -2)

    def finite(self) -> bool:
        return all(part.finite() for part in self._parts())

    def tensors(self) -> dict[str, Tensor]:
        return {"key": self.key, "value": self.value}

    def stored_bytes(self) -> dict[str, int]:
        return {"codes": self.nbytes}

    def with_tensors(self, named: Mapping[str, Tensor]) -> GGUFLatent:
        return replace(self, **named)

    def describe(self) -> dict[str, Any]:
        facts = {"shape": list(self.shape), "key_type": self.key_type, "value_type": self.value_type}
        return facts | {"method": self.method, "diagnostics": dict(self.diagnostics)}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GGUFLatent:
        shape = tuple(int(size) for size in description["shape"])
        about = {key: description[key] for key in ("key_type", "value_type", "method", "diagnostics")}
        return cls(shape=shape, key=tensors["key"], value=tensors["value"], **about).checked()

    def checked(self) -> GGUFLatent:
        """Itself; raises ValueError where the two parts do not make the shape."""
        key, value = self._parts()
        (heads, lora, nope), (of_value, rows, columns) = key.shape[-3:], value.shape[-3:]
        if (heads, lora) != (of_value, columns) or tuple(self.shape[-2:]) != (heads * (nope + rows), lora):
            raise ValueError(f"keys {list(key.shape)} and values {list(value.shape)} make no {list(self.shape)}")
        return self

    def _parts(self) -> list[GGUFBlocks]:
        return [of_blocks(self.key_type, self.key), of_blocks(self.value_type, self.value)]


def of_blocks(type: str, blocks: Tensor, method: str = "") -> GGUFBlocks:
    """The weights whose rows are `blocks`, uint8 `[..., out, bytes of a row]`."""
    columns = blocks.shape[-1] // TYPES[type].nbytes * TYPES[type].weights
    return GGUFBlocks((*blocks.shape[:-1], columns), type, blocks, method)
