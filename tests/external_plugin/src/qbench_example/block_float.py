"""Block floating point: integers of a few bits with one shared exponent, a power of two, per group of channels.

`W[o, i] = (code[o, i] - 2**(nbits - 1)) * 2**exponent[o, g(i)]`, the exponent in one byte. There is no kernel for it:
layers dequantize it, which every GPU and CPU can do, and results call that backend `dequantize + matmul`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.format.format import Format
from qbench.format.packing import PLANES, pack, unpack
from qbench.format.weight import per_group

LEAST, MOST = -126, 120  # exponents: no level is subnormal or infinite in fp32
SAID = ("shape", "nbits", "group_size", "method", "diagnostics")  # all but the tensors


@dataclass(frozen=True)
class BlockFloat(Format):
    """Weights `[..., out, in]`; build one with `BlockFloat.build`."""

    name: ClassVar[str] = "block-float"
    shape: tuple[int, ...]
    nbits: int
    group_size: int
    planes: tuple[Tensor, ...]  # the codes, uint8 [..., out, bytes] (qbench.format.packing)
    exponent: Tensor  # int8 [..., out, groups]
    method: str = ""
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def build(codes: Tensor, exponent: Tensor, *, nbits: int, group_size: int, method: str = "") -> BlockFloat:
        """From codes `[..., out, in]` in 0 .. 2**nbits - 1 and whole exponents `[..., out, groups]`."""
        return BlockFloat(tuple(codes.shape), nbits, group_size, pack(codes, nbits), exponent.to(torch.int8), method)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = unpack(self.planes, self.nbits, self.shape[-1]).float() - 2.0 ** (self.nbits - 1)
        return per_group(values, self.group_size, self.exponent.float().exp2(), torch.Tensor.mul_).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {f"codes_{i}": plane for i, plane in enumerate(self.planes)} | {"exponent": self.exponent}

    def with_tensors(self, named: Mapping[str, Tensor]) -> BlockFloat:
        planes = tuple(named[f"codes_{i}"] for i in range(len(self.planes)))
        return replace(self, planes=planes, exponent=named["exponent"])

    def stored_bytes(self) -> dict[str, int]:
        return {"codes": sum(plane.nbytes for plane in self.planes), "exponent": self.exponent.nbytes}

    def describe(self) -> dict[str, Any]:
        said = {name: getattr(self, name) for name in SAID}
        return said | {"shape": list(self.shape), "diagnostics": dict(self.diagnostics)}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BlockFloat:
        said = dict(description) | {"shape": tuple(description["shape"])}
        planes = tuple(tensors[f"codes_{i}"] for i in range(len(PLANES[said["nbits"]])))
        return cls(planes=planes, exponent=tensors["exponent"], **{name: said[name] for name in SAID})
