"""Floats of 8 or 4 bits that share a scale per block: the formats `fp8`, `mxfp4` and `nvfp4` of today's hardware.

    W[o, i] ~= e4m3(codes[o, i]) * scale[b(o), g(i)]                          fp8; with scales 2**e also MXFP8
    W[o, i] ~= e2m1(codes[o, i]) * 2**(scale[o, g(i)] - 127)                  mxfp4, blocks of 32 input channels
    W[o, i] ~= e2m1(codes[o, i]) * (e4m3(scale[o, g(i)]) / global_scale)      nvfp4, blocks of 16 input channels

e4m3 is a sign, 4 bits of exponent and 3 of mantissa, +-448 at most, without infinities; e2m1 has the 16 values of
`E2M1`. Both, and e8m0, the exponent alone, are as in the OCP's Microscaling Formats (MX) v1.0. `b(o)` and `g(i)` count
blocks of rows and of input channels; the last ones may be ragged. Small floats are held as the bytes that they are
(uint8), since most of torch does not compute with them. A stack of experts has one more leading dimension everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from qbench.format.format import Format
from qbench.format.packing import unpack
from qbench.format.weight import per_group

E2M1 = tuple(sign * m for sign in (1.0, -1.0) for m in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))  # by code; 8 is -0
E2M1_MAX, E4M3_MAX = 6.0, 448.0
MX_BLOCK, NV_BLOCK = 32, 16
EXPONENT_BIAS = 127  # of e8m0, whose byte 255 is NaN
Expected = tuple[tuple[torch.dtype, ...], tuple[int, ...]]  # dtypes, and the shape


@dataclass(frozen=True)
class BlockFloat(Format):
    """What the three share: the fields that are tensors are stored, the others describe them."""

    shape: tuple[int, ...]
    codes: Tensor
    scale: Tensor
    method: str = ""
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    def expected(self) -> dict[str, Expected]:
        """What each tensor must be for weights of `shape`."""
        raise NotImplementedError

    def checked(self) -> Self:
        """Itself; raises ValueError where a tensor has not the type and shape that `shape` asks for."""
        for name, (dtypes, shape) in self.expected().items():
            tensor = getattr(self, name)
            if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must be {' or '.join(map(_said, dtypes))} {list(shape)} for weights {list(self.shape)}, "
                    f"got {_said(tensor.dtype)} {list(tensor.shape)}"
                )
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def with_tensors(self, named: Mapping[str, Tensor]) -> Self:
        return replace(self, **{name: named[name] for name in self.tensors()})

    def describe(self) -> dict[str, Any]:
        told = {f.name: value for f in fields(self) if not isinstance(value := getattr(self, f.name), Tensor)}
        lists = {name: list(value) for name, value in told.items() if isinstance(value, tuple)}
        return told | lists | {"diagnostics": {key: float(value) for key, value in self.diagnostics.items()}}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        told = {name: tuple(value) if isinstance(value, list) else value for name, value in description.items()}
        if unknown := (told.keys() | tensors.keys()) ^ {f.name for f in fields(cls)}:
            raise KeyError(f"{cls.name} has no {', '.join(sorted(unknown))}, or lacks it")
        return cls(**told, **tensors).checked()


@dataclass(frozen=True, kw_only=True)
class FP8Weight(BlockFloat):
    """e4m3 codes, uint8 `[..., out, in]`, and a scale for every block of `block` rows and input channels.

    One block holds the whole weight (per tensor), a row (per channel), 128 x 128 weights (DeepSeek's), or a group of a
    row. scale is `[..., blocks of rows, blocks of channels]` in fp32, bf16 or fp16, or uint8: e8m0 (ue8m0 elsewhere).
    """

    name: ClassVar[str] = "fp8"

    block: tuple[int, int]

    @property
    def group_size(self) -> int:
        return self.block[1]

    def expected(self) -> dict[str, Expected]:
        *lead, rows, columns = self.shape
        blocks = -(-rows // self.block[0]), -(-columns // self.block[1])
        floats = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
        return {"codes": ((torch.uint8,), self.shape), "scale": (floats, (*lead, *blocks))}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        rows, columns = self.block
        scale = power_of_two(self.scale) if self.scale.dtype == torch.uint8 else self.scale.float()
        scale = scale.repeat_interleave(rows, -2)[..., : self.shape[-2], :]
        return per_group(e4m3_values(self.codes), columns, scale, torch.Tensor.mul_).to(dtype)


@dataclass(frozen=True, kw_only=True)
class MXFP4Weight(BlockFloat):
    """e2m1 codes, uint8 `[..., out, ceil(in / 2)]`, low bits first; e8m0 scales, uint8 `[..., out, blocks]`."""

    name: ClassVar[str] = "mxfp4"
    group_size: ClassVar[int] = MX_BLOCK

    def expected(self) -> dict[str, Expected]:
        return _of_four_bits(self)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = e2m1_values(self.codes, self.shape[-1])
        return per_group(values, MX_BLOCK, power_of_two(self.scale), torch.Tensor.mul_).to(dtype)


@dataclass(frozen=True, kw_only=True)
class NVFP4Weight(BlockFloat):
    """e2m1 codes as in MXFP4, an e4m3 scale, uint8 `[..., out, blocks]`, and one more for all, fp32 `[..., 1, 1]`.

    compressed-tensors stores a global scale that divides, ModelOpt and NVIDIA's paper one that multiplies
    (`global_divides=False`): the products differ in the last bit, so that the format holds either.
    """

    name: ClassVar[str] = "nvfp4"
    group_size: ClassVar[int] = NV_BLOCK

    global_scale: Tensor
    global_divides: bool = True

    def expected(self) -> dict[str, Expected]:
        return _of_four_bits(self) | {"global_scale": ((torch.float32,), (*self.shape[:-2], 1, 1))}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        scale = e4m3_values(self.scale)
        scale = scale / self.global_scale if self.global_divides else scale * self.global_scale
        values = e2m1_values(self.codes, self.shape[-1])
        return per_group(values, NV_BLOCK, scale, torch.Tensor.mul_).to(dtype)


def e4m3_values(stored: Tensor) -> Tensor:
    """fp32 of e4m3 bytes, of the same shape; the bytes 127 and 255 are NaN."""
    return stored.view(torch.float8_e4m3fn).float()


def e2m1_values(packed: Tensor, columns: int) -> Tensor:
    """fp32 `[..., columns]` of e2m1 codes, two a byte."""
    codes = unpack((packed,), 4, columns)
    table = torch.tensor(E2M1, device=packed.device)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def power_of_two(stored: Tensor) -> Tensor:
    """fp32 of e8m0 bytes: 2**(byte - 127), exact, subnormal for 0; 255 is NaN."""
    return stored.view(torch.float8_e8m0fnu).float()


def _of_four_bits(weight: BlockFloat) -> dict[str, Expected]:
    *rows, columns = weight.shape
    bytes_, blocks = -(-columns // 2), -(-columns // weight.group_size)
    return {"codes": ((torch.uint8,), (*rows, bytes_)), "scale": ((torch.uint8,), (*rows, blocks))}


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
