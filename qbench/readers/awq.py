"""AWQ's checkpoints in 4 bits, as AutoAWQ writes them (versions gemm and gemv), and AutoRound's where it packs so.

    gemm    qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales fp16 [groups, out]
    gemv    qweight int32 [out, in / 8], qzeros int32 [out, groups / 8], scales fp16 [out, groups], both padded

Eight codes fill a word. In gemm they are interleaved: from the lowest bits on, a word holds 0, 2, 4, 6, 1, 3, 5, 7.
Each channel's scale is part of the layer before, so that nothing but integers is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qbench.format.weight import QuantizedWeight
from qbench.format.words import unpack_words
from qbench.readers.folder import HeldFolder, Linear, integer, method_of, quantization_of
from qbench.readers.gptq import AUTOROUND, SCALES, describe, group_width, integers, packing_format
from qbench.readers.reader import ReadError

BITS, PER_WORD = 4, 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the codes 0 to 7 in a word of gemm


@dataclass(frozen=True)
class AWQ:
    """A qbench.readers.reader.Reader."""

    def recognizes(self, path: Path) -> bool:
        method = method_of(path)
        return method == "awq" or (method in AUTOROUND and packing_format(path) == "auto_awq")

    def open(self, path: Path, model: Any) -> HeldFolder:
        settings = quantization_of(path)
        version = str(settings.get("version", settings.get("format", "gemm"))).lower()
        if method_of(path) != "awq":
            version = "gemm"
        if version not in ("gemm", "gemv"):
            raise ReadError(f"{path} is packed for AWQ's version {version[:50]!r}, and read are gemm and gemv")
        size = integer(settings, "group_size", integer(settings, "q_group_size", -1))
        made_by = "AutoRound" if method_of(path) != "awq" else "AWQ"
        return HeldFolder(path, model, (Gemm if version == "gemm" else Gemv)(size), f"{made_by}, {describe(settings)}")


@dataclass(frozen=True)
class Gemm:
    """A layout of qbench.readers.folder: everything packed along `out`, interleaved."""

    group_size: int
    parts = ("qweight", "qzeros", "scales")
    marks = parts
    unused = MappingProxyType({})

    def kind(self, linear: Linear) -> str:
        rows, columns = linear.shape
        if rows % PER_WORD:
            raise linear.error(f"its {rows} rows are no multiple of {PER_WORD}")
        linear.require("qweight", (columns, rows // PER_WORD), dtypes=(torch.int32,))
        groups = (*linear.require("scales", dtypes=SCALES).shape, 0)[0]
        linear.require("scales", (groups, rows))
        linear.require("qzeros", (groups, rows // PER_WORD), dtypes=(torch.int32,))
        return f"int{BITS} g{group_width(linear, groups, self.group_size)}"

    def decode(self, linear: Linear, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        rows = linear.shape[0]

        def upright(words: Tensor) -> Tensor:
            codes = unpack_words(words.T, BITS, rows)
            return codes.unflatten(0, (-1, PER_WORD))[:, PLACES].flatten(0, 1)

        width = group_width(linear, len(tensors["scales"]), self.group_size)
        codes, zero = upright(tensors["qweight"]), upright(tensors["qzeros"])
        return integers(linear, codes, tensors["scales"].T, zero, BITS, width, None, "awq")


@dataclass(frozen=True)
class Gemv:
    """A layout of qbench.readers.folder: everything packed along `in`, in order."""

    group_size: int
    parts = Gemm.parts
    marks = Gemm.marks
    unused = MappingProxyType({})

    def width(self, linear: Linear) -> int:
        columns = linear.shape[1]
        width = columns if self.group_size == -1 else self.group_size
        if width < 1 or columns % width or columns % PER_WORD:
            raise linear.error(f"its {columns} input channels do not fall into groups of {width}")
        return width

    def kind(self, linear: Linear) -> str:
        (rows, columns), width = linear.shape, self.width(linear)
        linear.require("qweight", (rows, columns // PER_WORD), dtypes=(torch.int32,))
        words = (*linear.require("qzeros", dtypes=(torch.int32,)).shape, 0)[1]
        if words * PER_WORD < columns // width:
            raise linear.error(f"qzeros holds {words * PER_WORD} zero points a row, of {columns // width} groups")
        linear.require("qzeros", (rows, words))
        linear.require("scales", (rows, words * PER_WORD), dtypes=SCALES)
        return f"int{BITS} g{width}"

    def decode(self, linear: Linear, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        columns, width = linear.shape[1], self.width(linear)
        codes = unpack_words(tensors["qweight"].T, BITS, columns).T
        groups = columns // width
        zero = unpack_words(tensors["qzeros"].T, BITS, groups).T
        return integers(linear, codes, tensors["scales"][:, :groups], zero, BITS, width, None, "awq")
