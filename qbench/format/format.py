"""Format: what a quantized linear holds, whatever the arithmetic behind it. All that layers and checkpoints ask of it.

A format is a frozen dataclass over tensors, with the fields `shape`, `method` and `diagnostics` besides its own. It
derives from Format and has what is counted and stacked from here, or writes all of it itself. One file is enough:

    @dataclass(frozen=True)
    class Signs(Format):                               # one bit a weight and one scale a row
        name: ClassVar[str] = "signs"                  # in the entry-point group qbench.formats
        shape: tuple[int, ...]
        signs: Tensor                                  # uint8 [..., out, in / 8]
        scale: Tensor                                  # fp16 [..., out, 1]
        method: str = ""
        diagnostics: Mapping[str, float] = field(default_factory=dict)

        group_size, dequantize, tensors, with_tensors, describe, rebuild

A quantizer returns it. A fused kernel for it is no part of it: qbench.kernels.kernel says how one is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from qbench.format import stack


@runtime_checkable
class Format(Protocol):
    """Weights `[out, in]`, or a stack of them `[experts, out, in]` whose tensors have that dimension in front."""

    name: ClassVar[str]  # as it is registered; a checkpoint says it of every weight
    shape: tuple[int, ...]  # [..., out, in]
    group_size: int  # input channels of one row that share a scale; all of them where there is one scale a row
    method: str  # the method in effect, which for one layer may differ from the one asked for
    diagnostics: Mapping[str, float]  # for its row in the result

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights `[..., out, in]`, computed in fp32 and cast to `dtype`, on the device of the tensors."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Every stored buffer by name: what is counted, moved and saved, and nothing computed anew.

        The names become those of a layer's buffers; weight, quantized, bias, format, kernel and layout are taken. A
        factor per input channel `[..., in]` that the dequantized weights contain is called `input_scale`.
        """
        ...

    def with_tensors(self, named: Mapping[str, Tensor]) -> Self:
        """The same weights over other buffers of the same names, on another device for example, meta included."""
        ...

    def describe(self) -> dict[str, Any]:
        """Everything but the tensors, `shape`, `method` and `diagnostics` included, as JSON holds it."""
        ...

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """What `describe` described, over its tensors; raises KeyError or ValueError if it cannot be one of these."""
        ...

    @classmethod
    def stack(cls, weights: Sequence[Self]) -> Self:
        """Stacks `[out, in]` into one `[n, out, in]`, bit for bit; raises ValueError saying in what they differ."""
        return stack.stack(weights)

    def select(self, index: int) -> Self:
        """Matrix `index` `[out, in]` of a stack; its tensors are views."""
        return stack.select(self, index)

    def stored_bytes(self) -> dict[str, int]:
        """Bytes by component, `nbytes` in all. What holds the numbers themselves is `codes`, all else is aux."""
        return {name: tensor.nbytes for name, tensor in self.tensors().items()}

    @property
    def nbytes(self) -> int:
        """Stored bytes, counted from the buffers."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def numel(self) -> int:
        """Weights, not stored numbers."""
        return torch.Size(self.shape).numel()

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.numel

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device
