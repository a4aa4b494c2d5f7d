"""GPTQ's checkpoints, as AutoGPTQ and GPTQModel write them (checkpoint/autogptq.py says how): 2, 3, 4 or 8 bits.

Also AutoRound's, where it packs like AutoGPTQ. The first convention ("gptq") stores zero points less one, modulo
2**nbits; "gptq_v2" stores them as they are. g_idx, which act-order makes irregular, becomes a permutation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qbench.format.aux import Aux
from qbench.format.weight import QuantizedWeight
from qbench.format.words import unpack_words
from qbench.readers.folder import HeldFolder, Linear, integer, method_of, quantization_of
from qbench.readers.reader import ReadError

BITS = (2, 3, 4, 8)
CONVENTIONS = {"gptq": True, "gptq_v2": False}  # whether zero points are stored less one
AUTOROUND = ("auto-round", "intel/auto-round")  # its quant_method, today and before
SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class GPTQ:
    """A qbench.readers.reader.Reader."""

    def recognizes(self, path: Path) -> bool:
        method = method_of(path)
        return method == "gptq" or (method in AUTOROUND and packing_format(path) == "auto_gptq")

    def open(self, path: Path, model: Any) -> HeldFolder:
        settings = quantization_of(path)
        named = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if method_of(path) != "gptq":
            named = "gptq"
        if not isinstance(named, str) or named not in CONVENTIONS:
            raise ReadError(
                f"{path} has the checkpoint_format {str(named)[:50]!r}, and of GPTQ's {', '.join(CONVENTIONS)} are read"
            )
        order, symmetric = settings.get("desc_act") is True, settings.get("sym") is True
        layout = Words(integer(settings, "group_size", -1), v1=CONVENTIONS[named], order=order, symmetric=symmetric)
        made_by = "AutoRound" if method_of(path) != "gptq" else "GPTQ"
        return HeldFolder(path, model, layout, f"{made_by}, {describe(settings)}" + ", act-order" * order)


@dataclass(frozen=True)
class Words:
    """A layout of qbench.readers.folder: codes packed along `in`, zero points along `out`."""

    group_size: int  # as configured, -1 for whole rows; it only matters where the last group is ragged
    v1: bool
    order: bool = False  # every weight keeps its permutation, also one that is none: experts have to be alike
    symmetric: bool = False  # zero points that are all in the centre of the codes need no room
    parts = ("qweight", "qzeros", "scales", "g_idx")
    marks = parts
    unused = MappingProxyType({})

    def kind(self, linear: Linear) -> str:
        rows, columns = linear.shape
        words = linear.require("qweight", dtypes=(torch.int32,)).shape
        nbits = next((b for b in BITS if words == (-(-columns * b // 32), rows)), None)
        if nbits is None:
            raise linear.error(f"qweight {list(words)} holds no {list(linear.shape)} codes of 2, 3, 4 or 8 bits")
        groups = (*linear.require("scales", dtypes=SCALES).shape, 0)[0]
        linear.require("scales", (groups, rows))
        linear.require("qzeros", (groups, -(-rows * nbits // 32)), dtypes=(torch.int32,))
        if "g_idx" in linear.stored:
            linear.require("g_idx", (columns,), dtypes=(torch.int32, torch.int64))
        return f"int{nbits} g{group_width(linear, groups, self.group_size)}"

    def decode(self, linear: Linear, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        rows, columns = linear.shape
        nbits = int(self.kind(linear)[3])
        groups = len(tensors["scales"])
        width = group_width(linear, groups, self.group_size)
        zero = unpack_words(tensors["qzeros"].T, nbits, rows)
        zero = (zero + 1) & (2**nbits - 1) if self.v1 else zero
        codes = unpack_words(tensors["qweight"], nbits, columns).T
        permutation = None
        if "g_idx" in tensors:
            permutation = order_of(linear, tensors["g_idx"], width, self.order)
            codes = codes if permutation is None else codes[:, permutation]
        if self.symmetric and bool((zero == 2 ** (nbits - 1)).all()):
            zero = None
        return integers(linear, codes, tensors["scales"].T, zero, nbits, width, permutation, "gptq")


def describe(settings: Mapping[str, Any]) -> str:
    """ "4 bits, groups of 128", of a config's own words."""
    bits = settings.get("bits", settings.get("w_bit", "?"))
    size = settings.get("group_size", settings.get("q_group_size", -1))
    return f"{str(bits)[:9]} bits, " + ("one group a row" if size == -1 else f"groups of {str(size)[:9]}")


def packing_format(path: Path) -> str:
    """What AutoRound says of how it packed: auto_gptq or auto_awq, after "auto_round:"."""
    return str(quantization_of(path).get("packing_format", "")).lower().rpartition(":")[2]


def group_width(linear: Linear, groups: int, configured: int) -> int:
    """Input channels of one group; raises ReadError when no width gives so many groups."""
    columns = linear.shape[1]
    if configured > 0 and -(-columns // configured) == groups:
        return min(configured, columns)
    if groups < 1 or columns % groups:
        raise linear.error(f"its {columns} input channels do not fall into {groups} groups")
    return columns // groups


def order_of(linear: Linear, groups: Tensor, width: int, always: bool) -> Tensor | None:
    """The permutation `[in]` that puts columns of the same group together.

    None if they are together already, unless `always`. `groups` `[in]` is the group of every column. Raises ReadError
    unless each is of `width` columns, the last one less.
    """
    columns = linear.shape[1]
    expected = torch.arange(columns) // width
    if torch.equal(groups.long(), expected) and not always:
        return None
    ordered, permutation = groups.long().sort(stable=True)
    if not torch.equal(ordered, expected):
        raise linear.error(f"g_idx does not put its {columns} input channels into groups of {width}")
    return permutation


def integers(
    linear: Linear,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nbits: int,
    width: int,
    permutation: Tensor | None,
    method: str,
) -> QuantizedWeight:
    """A dual-scale weight of `codes` and `zero` uint8, `[out, in]` and `[out, groups]`, and `scale` as it is stored.

    Raises ReadError for a scale that is no number.
    """
    if not torch.isfinite(scale).all():
        raise linear.error("a scale is not a finite number")
    return QuantizedWeight.build(
        codes,
        Aux(scale.contiguous()),
        nbits=nbits,
        group_size=width,
        zero=None if zero is None else Aux(zero.contiguous()),
        permutation=permutation,
        method=method,
    )
