"""Weights as bitsandbytes stores them: 4 bits in blocks (QLoRA, arXiv 2305.14314), 8 in rows (LLM.int8(), 2208.07339).

    4 bits    w[n] = levels[codes[n]] * absmax[n // block_size]      n = o * in + i: blocks run on into the next row
              absmax[b] = nested_levels[nested[b]] * nested_absmax[b // 256] + offset      with double quantization
    8 bits    W[o, i] = codes[o, i] * absmax[o] / 127

Everything is computed in fp32, in this order. A stack of experts has one more leading dimension, levels aside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.format import stack
from qbench.format.format import Format
from qbench.format.weight import per_group

ONCE = ("levels", "nested_levels")
NESTED = ("nested_levels", "nested_absmax", "offset")
PER_127 = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it


@dataclass(frozen=True)
class FourBit(Format):
    """NF4 or FP4, weights `[..., out, in]`; built from its stored tensors."""

    name: ClassVar[str] = "bnb-4bit"

    shape: tuple[int, ...]
    block_size: int  # weights, of one row and the next
    codes: Tensor  # uint8 [..., ceil(out * in / 2)], the first in the high bits
    levels: Tensor  # fp32 [16]
    absmax: Tensor  # fp32 [..., blocks], or uint8 with double quantization
    nested_block: int = 256  # blocks that share a nested_absmax
    nested_levels: Tensor | None = None  # fp32 [256]
    nested_absmax: Tensor | None = None  # fp32 [..., ceil(blocks / nested_block)]
    offset: Tensor | None = None  # fp32 [...]
    method: str = ""
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    @property
    def group_size(self) -> int:
        return min(self.block_size, self.shape[-1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = torch.stack([self.codes >> 4, self.codes & 15], -1).flatten(-2)
        rows, columns = self.shape[-2:]
        values = lookup(self.levels, codes[..., : rows * columns])
        return per_group(values, self.block_size, self._absmax(), torch.Tensor.mul_).view(self.shape).to(dtype)

    def _absmax(self) -> Tensor:
        """fp32 `[..., blocks]`."""
        if self.nested_levels is None or self.nested_absmax is None or self.offset is None:
            return self.absmax
        values = lookup(self.nested_levels, self.absmax)
        return per_group(values, self.nested_block, self.nested_absmax, torch.Tensor.mul_) + self.offset.unsqueeze(-1)

    def tensors(self) -> dict[str, Tensor]:
        named = {"codes": self.codes, "levels": self.levels, "absmax": self.absmax}
        return named | {name: tensor for name in NESTED if (tensor := getattr(self, name)) is not None}

    def with_tensors(self, named: Mapping[str, Tensor]) -> FourBit:
        return replace(self, **{name: named.get(name) for name in ("codes", "levels", "absmax", *NESTED)})

    def describe(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "block_size": self.block_size,
            "nested_block": self.nested_block,
            **said(self),
        }

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FourBit:
        parts = {name: tensors[name] for name in ("codes", "levels", "absmax")}
        nested = {name: tensors.get(name) for name in NESTED}
        sizes = {name: description[name] for name in ("block_size", "nested_block", "method", "diagnostics")}
        return FourBit(shape=tuple(description["shape"]), **sizes, **parts, **nested)

    @classmethod
    def stack(cls, weights: Sequence[FourBit]) -> FourBit:
        return stack.stack(weights, ONCE)

    def select(self, index: int) -> FourBit:
        return stack.select(self, index, ONCE)


@dataclass(frozen=True)
class Int8(Format):
    """Integers of 8 bits with a scale per row, weights `[..., out, in]`."""

    name: ClassVar[str] = "bnb-int8"

    shape: tuple[int, ...]
    codes: Tensor  # int8 [..., out, in]
    absmax: Tensor  # fp32 [..., out]
    method: str = ""
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    @property
    def group_size(self) -> int:
        return self.shape[-1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.codes.float().mul_(self.absmax.unsqueeze(-1)) * PER_127).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "absmax": self.absmax}

    def with_tensors(self, named: Mapping[str, Tensor]) -> Int8:
        return replace(self, codes=named["codes"], absmax=named["absmax"])

    def describe(self) -> dict[str, Any]:
        return {"shape": list(self.shape), **said(self)}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Int8:
        about = {name: description[name] for name in ("method", "diagnostics")}
        return Int8(tuple(description["shape"]), tensors["codes"], tensors["absmax"], **about)


def said(weight: Format) -> dict[str, Any]:
    """`method` and `diagnostics` as `describe` says them."""
    return {"method": weight.method, "diagnostics": {key: float(value) for key, value in weight.diagnostics.items()}}


def lookup(levels: Tensor, codes: Tensor) -> Tensor:
    """`levels[codes]` in fp32, by 32-bit indices, which indexing with [] would widen to 64."""
    return levels.index_select(0, codes.flatten().int()).view(codes.shape)
