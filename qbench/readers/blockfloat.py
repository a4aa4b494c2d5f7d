"""Block floats in folders: FP8 as DeepSeek, FBGEMM and ModelOpt store it, ModelOpt's NVFP4, compressed-tensors' floats.

    fp8          weight e4m3 [out, in]; weight_scale_inv [blocks of rows, blocks of channels], or one number, multiplies
    fbgemm_fp8   the same with weight_scale [out, 1]
    modelopt     the same with weight_scale, one number; NVFP4: weight uint8 [out, in / 2], weight_scale e4m3
                 [out, in / 16], and weight_scale_2, one number, which multiplies
    compressed-tensors   as checkpoint/compressed.py writes it; also with activations in FP8 (float-quantized)

Scales in e8m0, or in uint8, are powers of two; MXFP8 is FP8 with such scales for 32 input channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from qbench.format.blockfloat import (
    MX_BLOCK,
    NV_BLOCK,
    FP8Weight,
    MXFP4Weight,
    NVFP4Weight,
    e4m3_values,
    power_of_two,
)
from qbench.format.format import Format
from qbench.readers.folder import HeldFolder, Linear, config_of, method_of, quantization_of
from qbench.readers.reader import ReadError

E4M3, E8M0 = (torch.float8_e4m3fn,), (torch.uint8, torch.float8_e8m0fnu)
SCALES = (torch.float32, torch.bfloat16, torch.float16, *E8M0)
GLOBAL = ((), (1,), (1, 1))  # shapes of one number
NAMES = {"fp8": "FP8", "fbgemm_fp8": "FBGEMM FP8", "modelopt": "ModelOpt"}
EIGHT_BITS = ("float-quantized", "naive-quantized", "mxfp8-quantized")  # of compressed-tensors' formats
ACTIVATIONS = "of activations, which stay in 16 bits here"
CACHE = "of the cache of keys and values, which stays in 16 bits here"
Block = tuple[int, int]


@dataclass(frozen=True)
class FP8:
    """A qbench.readers.reader.Reader: folders of FP8, and ModelOpt's of NVFP4 too."""

    def recognizes(self, path: Path) -> bool:
        return method(path) in NAMES

    def open(self, path: Path, model: Any) -> HeldFolder:
        block = quantization_of(path).get("weight_block_size")
        if block is not None and not (isinstance(block, list) and len(block) == 2 and all(map(_is_size, block))):
            raise ReadError(f"{path} has weight_block_size={str(block)[:50]}, which are no two positive numbers")
        held = HeldFolder(path, model, Floats(tuple(block) if block else None), NAMES[method(path)])
        kinds = sorted({entry.kind for entry in held.entries.values() if entry.quantized})
        held.made_by = f"{NAMES[method(path)]}, {', '.join(kinds)}"
        return held


def method(path: Path) -> str:
    """quant_method; ModelOpt's older folders say it in a file of their own."""
    producer = config_of(path, "hf_quant_config.json").get("producer")
    modelopt = isinstance(producer, dict) and producer.get("name") == "modelopt"
    return method_of(path) or ("modelopt" if modelopt else "")


@dataclass(frozen=True)
class Floats:
    """A layout of qbench.readers.folder."""

    block: Block | None  # as configured; the shape of the scales says it where it can
    marks = ("weight_scale_inv", "weight_scale", "weight_scale_2")
    parts = ("weight", *marks)
    unused = MappingProxyType(
        dict.fromkeys(("activation_scale", "input_scale", "input_scale_ub"), ACTIVATIONS)
        | dict.fromkeys(("k_scale", "v_scale", "q_scale"), CACHE)
    )

    def kind(self, linear: Linear) -> str:
        if "weight_scale_2" in linear.stored:
            linear.require("weight_scale_2", *GLOBAL, dtypes=(torch.float32,))
            return four_bits(linear, "weight", NV_BLOCK, E4M3)
        return fp8_kind(linear, self._scale(linear), self.block)

    def decode(self, linear: Linear, tensors: Mapping[str, Tensor]) -> Format:
        if "weight_scale_2" in linear.stored:
            return nvfp4(linear, tensors["weight"], tensors["weight_scale"], tensors["weight_scale_2"], divides=False)
        return fp8(linear, tensors["weight"], tensors[self._scale(linear)], self.block)

    def _scale(self, linear: Linear) -> str:
        return "weight_scale" if "weight_scale" in linear.stored else "weight_scale_inv"


class Group(Protocol):
    """One of compressed-tensors' config groups, as far as it says how weights are stored."""

    format: str
    weights: Mapping[str, Any]


def float_kind(linear: Linear, group: Group) -> str:
    """How the group stores a matrix, from headers alone; raises ReadError for what is not read."""
    if group.weights.get("symmetric", True) is not True or "weight_zero_point" in linear.stored:
        raise linear.error("its floats have zero points, which are not read")
    if group.format in EIGHT_BITS and group.weights.get("num_bits") == 8:
        return fp8_kind(linear, "weight_scale", _configured(group.weights))
    if group.format == "nvfp4-pack-quantized":
        linear.require("weight_global_scale", *GLOBAL, dtypes=(torch.float32,))
        return four_bits(linear, "weight_packed", NV_BLOCK, E4M3)
    if group.format == "mxfp4-pack-quantized":
        return four_bits(linear, "weight_packed", MX_BLOCK, E8M0)
    raise linear.error(
        f"it is stored as {group.format[:50]} of {str(group.weights.get('num_bits'))[:9]} bits, and of "
        f"compressed-tensors' floats {', '.join(EIGHT_BITS)} of 8 bits, nvfp4-pack-quantized and mxfp4-pack-quantized "
        "are read"
    )


def float_weight(linear: Linear, group: Group, tensors: Mapping[str, Tensor]) -> Format:
    """The weight of parts that `float_kind` has accepted."""
    scale = tensors["weight_scale"]
    if group.format == "nvfp4-pack-quantized":
        return nvfp4(linear, tensors["weight_packed"], scale, tensors["weight_global_scale"], divides=True)
    if group.format == "mxfp4-pack-quantized":
        return mxfp4(linear, tensors["weight_packed"], scale)
    return fp8(linear, tensors["weight"], scale, _configured(group.weights))


def _configured(weights: Mapping[str, Any]) -> Block | None:
    block, width = weights.get("block_structure"), weights.get("group_size")
    if weights.get("strategy") == "block" and isinstance(block, list) and len(block) == 2 and all(map(_is_size, block)):
        return tuple(block)
    return (1, width) if weights.get("strategy") == "group" and _is_size(width) else None


def fp8_kind(linear: Linear, scale: str, configured: Block | None) -> str:
    linear.require("weight", linear.shape, dtypes=E4M3)
    stored = linear.require(scale, dtypes=SCALES)
    rows, columns = block_of(linear, stored.shape, configured)
    name = "mxfp8" if (rows, columns) == (1, MX_BLOCK) and stored.dtype in E8M0 else "fp8"
    if (rows, columns) == linear.shape:
        return f"{name} a scale a tensor"
    if rows == 1:
        return f"{name} a scale a row" if columns == linear.shape[1] else f"{name} g{columns}"
    return f"{name} {rows}x{columns}"


def block_of(linear: Linear, scales: tuple[int, ...], configured: Block | None) -> Block:
    """Rows and input channels that share a scale, by the shape of the scales; raises ReadError where none fit it."""
    (rows, columns), scales = linear.shape, tuple(scales)
    if scales in GLOBAL:
        return rows, columns
    if scales == (rows,):
        return 1, columns
    if len(scales) == 2 and configured and scales == (-(-rows // configured[0]), -(-columns // configured[1])):
        return configured
    if len(scales) == 2 and all(scales) and rows % scales[0] == 0 and columns % scales[1] == 0:
        return rows // scales[0], columns // scales[1]
    raise linear.error(f"scales {list(scales)} do not divide a weight {list(linear.shape)} into blocks")


def four_bits(linear: Linear, codes: str, width: int, dtypes: tuple[torch.dtype, ...]) -> str:
    """The kind of two codes a byte with a scale for `width` input channels."""
    rows, columns = linear.shape
    if columns % width:
        raise linear.error(f"its {columns} input channels do not fall into blocks of {width}")
    linear.require(codes, (rows, columns // 2), dtypes=(torch.uint8, torch.int8))
    linear.require("weight_scale", (rows, columns // width), dtypes=dtypes)
    return "nvfp4" if width == NV_BLOCK else "mxfp4"


def fp8(linear: Linear, weight: Tensor, scale: Tensor, configured: Block | None) -> FP8Weight:
    block = block_of(linear, scale.shape, configured)
    codes = weight.view(torch.uint8)
    if scale.dtype in E8M0:
        scale = scale.view(torch.uint8)
    check_numbers(linear, power_of_two(scale) if scale.dtype == torch.uint8 else scale)
    check_numbers(linear, e4m3_values(codes), "code")
    blocks = -(-linear.shape[0] // block[0]), -(-linear.shape[1] // block[1])
    return FP8Weight(linear.shape, codes, scale.reshape(blocks), "fp8", block=block).checked()


def mxfp4(linear: Linear, codes: Tensor, scale: Tensor) -> MXFP4Weight:
    scale = scale.view(torch.uint8)
    check_numbers(linear, power_of_two(scale))
    return MXFP4Weight(linear.shape, codes.view(torch.uint8), scale, "mxfp4").checked()


def nvfp4(linear: Linear, codes: Tensor, scale: Tensor, global_scale: Tensor, divides: bool) -> NVFP4Weight:
    scale, global_scale = scale.view(torch.uint8), global_scale.reshape(1, 1)
    check_numbers(linear, e4m3_values(scale))
    check_numbers(linear, global_scale.reciprocal() if divides else global_scale)
    return NVFP4Weight(
        linear.shape,
        codes.view(torch.uint8),
        scale,
        "nvfp4",
        global_scale=global_scale,
        global_divides=divides,
    ).checked()


def check_numbers(linear: Linear, values: Tensor, what: str = "scale") -> None:
    """Raises ReadError unless all are finite."""
    if not torch.isfinite(values).all():
        raise linear.error(f"a {what} is not a finite number")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31
