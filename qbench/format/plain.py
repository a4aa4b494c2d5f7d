"""Plain: a weight that is not quantized, 16 or 32 bits a number, where a format is asked for.

A file that others made keeps some linears as they were. They are held, counted and listed like the rest, and do not
count as covered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.format import stack
from qbench.format.format import Format


@dataclass(frozen=True)
class Plain(Format):
    """Weights `[..., out, in]` as floating point numbers."""

    name: ClassVar[str] = "plain"

    shape: tuple[int, ...]
    numbers: Tensor  # fp16, bf16 or fp32 [..., out, in]
    method: str = ""
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(numbers: Tensor, method: str = "") -> Plain:
        return Plain(tuple(numbers.shape), numbers, method)

    @property
    def group_size(self) -> int:
        return self.shape[-1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.numbers.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"numbers": self.numbers}

    def with_tensors(self, named: Mapping[str, Tensor]) -> Plain:
        return replace(self, numbers=named["numbers"])

    def describe(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "method": self.method,
            "diagnostics": {key: float(value) for key, value in self.diagnostics.items()},
        }

    @classmethod
    def stack(cls, weights: Sequence[Format]) -> Format:
        """Also with weights in other formats, as files hold them."""
        from qbench.format.mixed import Mixed

        return stack.stack(weights) if all(isinstance(one, Plain) for one in weights) else Mixed.stack(weights)

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plain:
        shape, method = tuple(description["shape"]), description["method"]
        return Plain(shape, tensors["numbers"], method, description["diagnostics"])
