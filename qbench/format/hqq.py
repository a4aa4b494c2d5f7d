"""Weights as the packages hqq and sinq store them: codes of 1 to 8 bits, in groups that are rows or columns of a table.

    table[r, c] = (code[r, c] - zero) * scale        W = table reshaped to [out, in], times t with SINQ

The weight is reshaped to `[out * in / group_size, group_size]`, with a scale and zero point a row (axis 1), or to
`[group_size, out * in / group_size]`, with one a column (axis 0, whose groups are no part of a row). Both packages
compute in the dtypes of the stored tensors and round after every step, here as well: with fp16 scales, fp16.

SINQ (arXiv 2509.22944) may store scales and zero points in 8 bits, x * step + offset, with one step for those that are
the same place in each of 32 parts, or for all. A stack of experts has one more leading dimension, levels aside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.format import stack
from qbench.format.format import Format

PER_WORD = {8: 1, 6: 5, 5: 6, 4: 2, 3: 10, 2: 4, 1: 8}  # codes in a stored byte, or in an int32 for 3, 5 and 6 bits
IN_WORDS = (3, 5, 6)
ONCE = ("levels",)
OPTIONAL = ("scale_step", "scale_offset", "zero_step", "zero_offset", "input_scale", "levels")


@dataclass(frozen=True)
class HQQWeight(Format):
    """Weights `[..., out, in]`; `rows` and `columns` are those of the table, G its groups."""

    name: ClassVar[str] = "hqq"

    shape: tuple[int, ...]
    nbits: int
    axis: int
    group: int  # weights that share a scale
    dtype: str  # of codes while they are computed with, and of the result
    codes: Tensor  # [..., ceil(rows / PER_WORD), columns], the first rows in the high bits; uint8 or int32
    scale: Tensor  # [..., G], 16 or 32 bits, or uint8 [..., parts, G / parts]
    zero: Tensor  # likewise
    scale_step: Tensor | None = None  # [..., 1, G / parts]
    scale_offset: Tensor | None = None
    zero_step: Tensor | None = None
    zero_offset: Tensor | None = None
    input_scale: Tensor | None = None  # t [..., in]
    levels: Tensor | None = None  # [2**nbits], which codes index, in the dtype of the scales
    method: str = ""
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    @property
    def group_size(self) -> int:
        """With axis 0 a group is no part of a row, and every input channel has a scale of its own."""
        return min(self.group, self.shape[-1]) if self.axis == 1 else 1

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        computed = getattr(torch, self.dtype)
        groups = -1 if self.axis == 1 else -2  # where a scale is spread
        scale, zero = (self._aux(name).unsqueeze(groups) for name in ("scale", "zero"))
        codes = unpack_rows(self.codes, self.nbits)[..., : self.table[0], :]
        if self.levels is None:
            values = (codes.to(computed) - zero) * scale
        else:
            flat = self.levels.index_select(0, codes.flatten().int()).view(codes.shape)
            values, computed = (flat - zero.to(flat.dtype)) * scale, self.levels.dtype
        values = values.reshape(self.shape)
        if self.input_scale is not None:
            values = values * self.input_scale.unsqueeze(-2)
        return values.to(computed).to(dtype)

    @property
    def table(self) -> tuple[int, int]:
        """Rows and columns."""
        count = self.shape[-2] * self.shape[-1] // self.group
        return (count, self.group) if self.axis == 1 else (self.group, count)

    def _aux(self, name: str) -> Tensor:
        """Scales or zero points `[..., G]`, in the dtype that the package computes them in."""
        stored, step, offset = (getattr(self, f"{name}{part}") for part in ("", "_step", "_offset"))
        return stored if step is None or offset is None else (stored * step + offset).flatten(-2)

    def tensors(self) -> dict[str, Tensor]:
        named = {"codes": self.codes, "scale": self.scale, "zero": self.zero}
        return named | {name: tensor for name in OPTIONAL if (tensor := getattr(self, name)) is not None}

    def with_tensors(self, named: Mapping[str, Tensor]) -> HQQWeight:
        return replace(self, **{name: named.get(name) for name in ("codes", "scale", "zero", *OPTIONAL)})

    def describe(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            **{name: getattr(self, name) for name in ("nbits", "axis", "group", "dtype", "method")},
            "diagnostics": {key: float(value) for key, value in self.diagnostics.items()},
        }

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> HQQWeight:
        about = {name: description[name] for name in ("nbits", "axis", "group", "dtype", "method", "diagnostics")}
        parts = {name: tensors[name] for name in ("codes", "scale", "zero")}
        more = {name: tensors.get(name) for name in OPTIONAL}
        return HQQWeight(shape=tuple(description["shape"]), **about, **parts, **more)

    @classmethod
    def stack(cls, weights: Sequence[HQQWeight]) -> HQQWeight:
        return stack.stack(weights, ONCE)

    def select(self, index: int) -> HQQWeight:
        return stack.select(self, index, ONCE)


def unpack_rows(codes: Tensor, nbits: int) -> Tensor:
    """Codes `[..., rows, columns]`, uint8, of which `PER_WORD` of rows far apart share a byte or word."""
    count = PER_WORD[nbits]
    parts = [(codes >> (nbits * (count - 1 - slot))) & (2**nbits - 1) for slot in range(count)]
    return torch.cat(parts, -2).to(torch.uint8)


def pack_rows(codes: Tensor, nbits: int) -> Tensor:
    """The inverse of `unpack_rows`; rows that are over are 0."""
    count, wide = PER_WORD[nbits], torch.int32 if nbits in IN_WORDS else torch.uint8
    codes = torch.nn.functional.pad(codes.to(wide), (0, 0, 0, -codes.shape[-2] % count))
    packed = torch.zeros_like(codes[..., : codes.shape[-2] // count, :])
    for slot, part in enumerate(codes.chunk(count, -2)):
        packed |= part << (nbits * (count - 1 - slot))
    return packed
