"""bitsandbytes' checkpoints as transformers saves them: NF4 and FP4, doubly quantized or not, and int8.

4 bits    weight uint8 [out * in / 2, 1], weight.absmax, weight.quant_map, with double quantization
          weight.nested_absmax and weight.nested_quant_map; weight.quant_state.bitsandbytes__nf4 is a JSON object
          as bytes: blocksize, shape, nested_blocksize, nested_offset
8 bits    weight int8 [out, in], SCB fp32 [out] the largest |w| of each row, weight_format 0 for rows
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qbench.format.bitsandbytes import FourBit, Int8
from qbench.format.format import Format
from qbench.quant.codebook import FP4_LEVELS, NF4_LEVELS
from qbench.readers.folder import HeldFolder, Linear, method_of

LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}
STATE = "weight.quant_state.bitsandbytes__"
STATE_BYTES = 4096
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FP32 = (torch.float32,)


@dataclass(frozen=True)
class BitsAndBytes:
    """A qbench.readers.reader.Reader."""

    def recognizes(self, path: Path) -> bool:
        return method_of(path) in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")

    def open(self, path: Path, model: Any) -> HeldFolder:
        held = HeldFolder(path, model, States(), "bitsandbytes")
        kinds = sorted({entry.kind for entry in held.entries.values() if entry.quantized})
        held.made_by = f"bitsandbytes, {', '.join(kinds)}"
        return held


@dataclass(frozen=True)
class States:
    """A layout of qbench.readers.folder."""

    marks = (
        *(f"{STATE}{levels}" for levels in LEVELS),
        *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        *("SCB", "weight_format"),
    )
    parts = ("weight", *marks)
    unused = MappingProxyType({})

    def kind(self, linear: Linear) -> str:
        rows, columns = linear.shape
        if "SCB" in linear.stored or "weight_format" in linear.stored:
            linear.require("weight", (rows, columns), dtypes=(torch.int8,))
            linear.require("SCB", (rows,), dtypes=FP32)
            return "int8"
        levels = next((name for name in LEVELS if f"{STATE}{name}" in linear.stored), None)
        if levels is None:
            raise linear.error("its quant_state is missing")
        size = linear.require(f"{STATE}{levels}", dtypes=(torch.uint8,)).nbytes
        if size > STATE_BYTES:
            raise linear.error(f"its quant_state has {size} bytes, and a few hundred are usual")
        if linear.require("weight").nbytes != -(-rows * columns // 2):
            raise linear.error(f"its weight has {linear.stored['weight'].nbytes} bytes for {rows * columns} codes")
        linear.require("weight.quant_map", (16,), dtypes=FP32)
        if nested := "weight.nested_absmax" in linear.stored or "weight.nested_quant_map" in linear.stored:
            linear.require("weight.nested_quant_map", (256,), dtypes=FP32)
            linear.require("weight.nested_absmax", dtypes=FP32)
        linear.require("weight.absmax", dtypes=(torch.uint8,) if nested else FP32)
        return f"{levels.upper()} doubly quantized" if nested else levels.upper()

    def decode(self, linear: Linear, tensors: Mapping[str, Tensor]) -> Format:
        if any(
            not torch.isfinite(part).all()
            for name, part in tensors.items()
            if name != "weight" and part.is_floating_point()
        ):
            raise linear.error("a scale is not a finite number")
        if self.kind(linear) == "int8":
            if "weight_format" in tensors and bool(tensors["weight_format"].any()):
                raise linear.error("its weight_format is not that of rows, and only this one is stored by name")
            return Int8(linear.shape, tensors["weight"], tensors["SCB"], method="int8")
        levels = next(name for name in LEVELS if f"{STATE}{name}" in tensors)
        if not torch.equal(tensors["weight.quant_map"], torch.tensor(LEVELS[levels])):
            raise linear.error(f"its quant_map is not that of {levels}")
        return four_bits(linear, tensors, levels, state_of(linear, tensors[f"{STATE}{levels}"]))


def four_bits(linear: Linear, tensors: Mapping[str, Tensor], levels: str, state: Mapping[str, Any]) -> FourBit:
    """The weight of its parts and its state; raises ReadError when the state is not one of them."""
    (rows, columns), block = linear.shape, state.get("blocksize")
    if block not in BLOCK_SIZES:
        raise linear.error(f"its quant_state has blocksize={str(block)[:50]}, which is none of bitsandbytes'")
    if state.get("shape") != [rows, columns]:
        raise linear.error(f"its quant_state is that of a weight {str(state.get('shape'))[:50]}, not {[rows, columns]}")
    blocks = -(-rows * columns // block)
    linear.require("weight.absmax", (blocks,))
    codes = tensors["weight"].contiguous().view(torch.uint8).flatten()
    parts = {"codes": codes, "levels": tensors["weight.quant_map"], "absmax": tensors["weight.absmax"]}
    if "weight.nested_absmax" in tensors:
        inner, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(inner) is not int or inner < 1 or type(offset) is not float or not abs(offset) < 1e30:
            raise linear.error("its quant_state has no nested_blocksize and nested_offset")
        linear.require("weight.nested_absmax", (-(-blocks // inner),))
        parts |= {
            "nested_levels": tensors["weight.nested_quant_map"],
            "nested_absmax": tensors["weight.nested_absmax"],
            "offset": torch.tensor(offset),
        }
        return FourBit(shape=(rows, columns), block_size=block, nested_block=inner, method=levels, **parts)
    return FourBit(shape=(rows, columns), block_size=block, method=levels, **parts)


def state_of(linear: Linear, stored: Tensor) -> dict[str, Any]:
    """The JSON object that uint8 `[bytes]` spell; raises ReadError for anything else."""
    try:
        state = json.loads(bytes(stored.flatten().tolist()).decode("utf-8"))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise linear.error("its quant_state is no JSON object")
    return state
