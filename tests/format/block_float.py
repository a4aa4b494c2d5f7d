"""A format that a third party could bring, in one file with its quantizer and its kernel: floats of 4 bits in blocks.

Each block of 32 input channels of a row shares a scale that is a power of two; within it a weight is one of the 16
values of e2m1 (a sign, two bits of exponent, one of mantissa).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qbench.format.format import Format
from qbench.format.packing import pack, unpack
from qbench.kernels.grouped import grouped_mm
from qbench.kernels.routes import Routes
from qbench.quant.quantizer import InputStatistics, Quantizer

BLOCK, BIAS = 32, 127
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class BlockFloat(Format):
    name: ClassVar[str] = "test-block-float"
    group_size: ClassVar[int] = BLOCK

    shape: tuple[int, ...]
    codes: Tensor  # uint8 [..., out, ceil(in / 2)]
    exponent: Tensor  # uint8 [..., out, blocks]: log2 of the scale, plus 127
    method: str = "block-float"
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = unpack((self.codes,), 4, self.shape[-1])
        return values_of(codes, self.exponent).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "exponent": self.exponent}

    def with_tensors(self, named: Mapping[str, Tensor]) -> BlockFloat:
        return replace(self, codes=named["codes"], exponent=named["exponent"])

    def describe(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "method": self.method, "diagnostics": dict(self.diagnostics)}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BlockFloat:
        shape = tuple(description["shape"])
        return cls(shape, tensors["codes"], tensors["exponent"], description["method"], description["diagnostics"])


def values_of(codes: Tensor, exponent: Tensor) -> Tensor:
    """fp32 `[..., out, in]` of codes `[..., out, in]` and exponents `[..., out, blocks]`."""
    levels = torch.tensor([*LEVELS, *(-level for level in LEVELS)], device=codes.device)
    scale = torch.exp2(exponent.float() - BIAS).repeat_interleave(BLOCK, -1)[..., : codes.shape[-1]]
    return levels[codes.long()] * scale


@dataclass(frozen=True)
class ToBlockFloat(Quantizer):
    """Rounds to the nearest value, under the smallest power of two that clips nothing."""

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> BlockFloat:
        rows, columns = weight.shape
        blocks = F.pad(weight.float(), (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
        exponent = (blocks.abs().amax(-1) / LEVELS[-1]).clamp_min(2.0**-BIAS).log2().ceil()
        levels = torch.tensor(LEVELS, device=weight.device)
        scaled = blocks / torch.exp2(exponent).unsqueeze(-1)
        codes = torch.bucketize(scaled.abs().contiguous(), (levels[1:] + levels[:-1]) / 2) + 8 * (scaled < 0)
        codes = codes.flatten(1)[:, :columns]
        diagnostics = {"largest_exponent": float(exponent.max())}
        exponent = (exponent + BIAS).to(torch.uint8)
        return BlockFloat((rows, columns), *pack(codes, 4), exponent, diagnostics=diagnostics)


@dataclass(frozen=True)
class BytePerCode:
    """The layout of `BytePerCodeKernel`."""

    codes: Tensor  # uint8 [..., out, in]
    exponent: Tensor

    def flat(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return (self.codes, self.exponent), ()

    def select(self, index: int) -> BytePerCode:
        return BytePerCode(self.codes[index], self.exponent[index])


@dataclass(frozen=True)
class BytePerCodeKernel:
    """A kernel in plain torch: it reads a code from a byte of its own."""

    buffers: tuple[str, ...] = ("codes", "exponent")
    pairs: int = 2

    def refusal(self, weight: BlockFloat) -> str | None:
        return f"{weight.shape[-1]} input channels" if weight.shape[-1] % BLOCK else None

    def lay_out(self, weight: BlockFloat) -> BytePerCode:
        return BytePerCode(unpack((weight.codes,), 4, weight.shape[-1]), weight.exponent)

    def beside(self, weight: BlockFloat) -> set[str]:
        return set()

    def over(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> BytePerCode:
        return BytePerCode(*tensors)

    def restore(self, layout: BytePerCode, form: BlockFloat) -> BlockFloat:
        return replace(form, codes=pack(layout.codes, 4)[0], exponent=layout.exponent)

    def held_bytes(self, layout: BytePerCode, beside: Mapping[str, Tensor]) -> dict[str, int]:
        return {"codes": layout.codes.nbytes, "exponent": layout.exponent.nbytes}

    def linear(self, x: Tensor, layout: BytePerCode, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, values_of(layout.codes, layout.exponent).to(x.dtype), bias)

    def experts(self, x: Tensor, index: Tensor, layouts: Sequence[BytePerCode]) -> list[Tensor]:
        stacks = [values_of(layout.codes, layout.exponent).to(x.dtype) for layout in layouts]
        return [torch.einsum("tkoi,ti->tko", stack[index.clamp_max(len(stack) - 1)], x) for stack in stacks]

    def grouped(self, x: Tensor, layout: BytePerCode, routes: Routes, gather: bool) -> Tensor:
        x = x.index_select(0, routes.token) if gather else x
        stack = values_of(layout.codes, layout.exponent).to(x.dtype)
        return grouped_mm(x, stack, routes.flat(), routes.rows)

    def backend(self, device: torch.device, dtype: torch.dtype) -> str:
        return "a byte per code"
