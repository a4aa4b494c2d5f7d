"""HQQ's checkpoints as the package saves them in safetensors: settings are small tensors beside the codes.

    W_q           packed codes of the table, see format/hqq.py; viewed as another dtype with view_as_float
    scale, zero   [rows, 1] (axis 1) or [1, columns] (axis 0)
    nbits, axis, group_size, shape, view_as_float       numbers; compute_dtype, packing are strings as bytes

Checkpoints that the package pickles (qmodel.pt) are never opened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qbench.format.hqq import IN_WORDS, PER_WORD, HQQWeight
from qbench.readers.folder import HeldFolder, Linear, config_of, holds_part, method_of
from qbench.readers.reader import ReadError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
COMPUTED = ("float16", "bfloat16", "float32")
SETTINGS = ("nbits", "axis", "group_size", "shape", "view_as_float", "compute_dtype")
SINQ_BESIDE = "model.safetensors.index.json.meta.json"  # its package packs alike, and keeps settings there
SMALL_BYTES = 256  # of a setting
NOTES = ("packing", "unpack_view_dtype", "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict")
NOTES = (*NOTES, "stores_quant_config", "channel_wise", "optimize", "round_zero")  # which change no number


@dataclass(frozen=True)
class HQQ:
    """A qbench.readers.reader.Reader."""

    def recognizes(self, path: Path) -> bool:
        return (
            method_of(path) == "hqq"
            or (path / "qmodel.pt").is_file()
            or (holds_part(path, "W_q") and not (path / SINQ_BESIDE).is_file())
        )

    def open(self, path: Path, model: Any) -> HeldFolder:
        if not config_of(path):
            raise ReadError(f"{path} holds no config.json")
        held = HeldFolder(path, model, Tables(), "HQQ")
        kinds = sorted({entry.kind for entry in held.entries.values() if entry.quantized})
        held.made_by = f"HQQ, {', '.join(kinds)}"
        return held


@dataclass(frozen=True)
class Tables:
    """A layout of qbench.readers.folder."""

    marks = ("W_q",)
    parts = ("W_q", "scale", "zero", *SETTINGS)
    unused = MappingProxyType(dict.fromkeys(NOTES, ""))

    def kind(self, linear: Linear) -> str:
        (rows, columns), codes = linear.shape, linear.require("W_q", dtypes=(torch.uint8, torch.int32, *FLOATS))
        for part in ("scale", "zero"):
            linear.require(part, dtypes=FLOATS)
        for part in SETTINGS:
            if linear.require(part, dtypes=(torch.uint8, torch.int32, torch.int64)).nbytes > SMALL_BYTES:
                raise linear.error(f"its {part} has {linear.stored[part].nbytes} bytes, and is one small setting")
        groups = max(1, math.prod(linear.stored["scale"].shape))
        bits = 3 if codes.dtype == torch.int32 else 8 * codes.nbytes // (rows * columns)
        return f"int{bits} g{rows * columns // groups}"

    def decode(self, linear: Linear, tensors: Mapping[str, Tensor]) -> HQQWeight:
        numbers = {name: tensors[name].flatten().tolist() for name in SETTINGS}
        dtype = "".join(map(chr, numbers["compute_dtype"])).removeprefix("torch.")
        if numbers["shape"] != list(linear.shape):
            raise linear.error(f"its shape is {numbers['shape']}, not {list(linear.shape)}")
        single = [numbers[name][0] if len(numbers[name]) == 1 else None for name in ("nbits", "axis", "group_size")]
        return table_weight(linear, single, dtype, tensors["W_q"], tensors["scale"], tensors["zero"], "hqq")


def table_weight(
    linear: Linear,
    settings: list[Any],
    dtype: str,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    method: str,
    **more: Any,
) -> HQQWeight:
    """The weight of `settings` nbits, axis and group_size, and of stored tensors; raises ReadError if they do not fit.

    `scale` and `zero` may have any shape of one number a group; `more` are further fields of the weight.
    """
    nbits, axis, group = settings
    if group is None and axis in (0, 1):
        group = linear.shape[axis]
    count = linear.shape[0] * linear.shape[1]
    whole = all(type(number) is int for number in (nbits, axis, group))
    if not whole or nbits not in PER_WORD or axis not in (0, 1) or not 0 < group <= count:
        told = f"{str(nbits)[:20]} bits, axis {str(axis)[:20]} and groups of {str(group)[:20]}"
        raise linear.error(f"it has {told}, which the package does not write for {list(linear.shape)}")
    if count % group:
        raise linear.error(f"its {count} weights do not fall into groups of {group}")
    if dtype not in COMPUTED:
        raise linear.error(f"its compute_dtype is {dtype[:50]!r}, and it can be {', '.join(COMPUTED)}")
    rows, columns = (count // group, group) if axis == 1 else (group, count // group)
    stored = torch.int32 if nbits in IN_WORDS else torch.uint8
    places = -(-rows // PER_WORD[nbits]), columns
    if codes.nbytes != places[0] * places[1] * stored.itemsize:
        raise linear.error(f"its W_q has {codes.nbytes} bytes, which are not {rows * columns} codes of {nbits} bits")
    parts = {"scale": scale, "zero": zero}
    for name, part in (parts | {key: value for key, value in more.items() if isinstance(value, Tensor)}).items():
        if part.is_floating_point() and not torch.isfinite(part).all():
            raise linear.error(f"its {name} is not finite")
    for name, part in parts.items():
        if part.numel() != count // group:
            raise linear.error(f"its {name} has {part.numel()} numbers for {count // group} groups")
    nested = {name: f"{name}_step" in more for name in parts}
    parts = {name: part if nested[name] else part.flatten() for name, part in parts.items()}
    codes = codes.contiguous().flatten().view(stored).view(places)
    return HQQWeight(linear.shape, nbits, axis, group, dtype, codes, **parts, method=method, **more)
