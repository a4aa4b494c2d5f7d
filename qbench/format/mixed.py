"""Mixed: a stack of experts that are not stored alike, as others' files hold them: some in 4 bits, one in 16.

Every matrix keeps its own format. What it is made of is one weight, or as many as the stack has matrices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.format.format import Format
from qbench.format.plain import Plain


@dataclass(frozen=True)
class Mixed(Format):
    """Weights `[out, in]` of one part, or `[experts, out, in]` of a part each."""

    name: ClassVar[str] = "mixed"

    shape: tuple[int, ...]
    parts: tuple[Format, ...]  # [out, in]
    method: str = ""
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(weight: Format) -> Mixed:
        """One weight `[out, in]`, so that it stacks with any other of its shape."""
        return Mixed(tuple(weight.shape), (weight,), weight.method, weight.diagnostics)

    @property
    def group_size(self) -> int:
        """The largest of its parts'."""
        return max(part.group_size for part in self.parts)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.stack([part.dequantize(dtype) for part in self.parts]).view(self.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {f"m{i}_{key}": tensor for i, part in enumerate(self.parts) for key, tensor in part.tensors().items()}

    def with_tensors(self, named: Mapping[str, Tensor]) -> Mixed:
        parts = (
            part.with_tensors({key: named[f"m{i}_{key}"] for key in part.tensors()})
            for i, part in enumerate(self.parts)
        )
        return replace(self, parts=tuple(parts))

    def describe(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "parts": [{"format": part.name} | part.describe() for part in self.parts],
            "method": self.method,
            "diagnostics": {key: float(value) for key, value in self.diagnostics.items()},
        }

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mixed:
        from qbench.registry import FORMAT, find

        parts = []
        for i, described in enumerate(description["parts"]):
            own, start = dict(described), f"m{i}_"
            held = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
            parts.append(find(FORMAT, own.pop("format")).rebuild(own, held))
        about = {name: description[name] for name in ("method", "diagnostics")}
        return Mixed(tuple(description["shape"]), tuple(parts), **about)

    @classmethod
    def stack(cls, weights: Sequence[Format]) -> Mixed:
        """Of weights in any formats, `[out, in]` each."""
        shape = tuple(weights[0].shape)
        for weight in weights:
            if tuple(weight.shape) != shape:
                raise ValueError(f"weights of one stack must share their shape, got {shape} and {tuple(weight.shape)}")
        parts = [part for weight in weights for part in (weight.parts if isinstance(weight, Mixed) else (weight,))]
        return Mixed((len(parts), *shape), tuple(parts), "+".join(sorted({weight.method for weight in weights})))

    def select(self, index: int) -> Mixed:
        return replace(Mixed.of(self.parts[index]), method=self.method)

    def stored_bytes(self) -> dict[str, int]:
        return dict(sum((Counter(part.stored_bytes()) for part in self.parts), Counter()))


def quantized_numel(weight: Format) -> int:
    """Number of weights that are not stored in 16 or 32 bits."""
    if isinstance(weight, Mixed):
        return sum(map(quantized_numel, weight.parts))
    return 0 if isinstance(weight, Plain) else weight.numel
