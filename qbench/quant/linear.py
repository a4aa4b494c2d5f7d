"""QuantLinear: the layer that stands where an nn.Linear stood, and holds only packed buffers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.quant.weight import QuantizedWeight


class PackedWeight(nn.Module):
    """Holds one QuantizedWeight, or a stack of them, as buffers: whatever a model keeps packed, it keeps in these."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self._format = weight  # describes the format; its tensors are replaced by the module's buffers below
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> QuantizedWeight:
        """The weight over the buffers as they are now (moved, loaded)."""
        return self._format.with_tensors(dict(self.named_buffers(recurse=False)))

    def _apply(self, fn, recurse: bool = True):
        """Devices may change; the stored precision may not: `.half()` and `.to(dtype)` leave the buffers alone."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        # the description must not keep the buffers alive on the device they came from
        self._format = self.weight
        return self

    def extra_repr(self) -> str:
        w = self._format
        return f"shape={list(w.shape)}, nbits={w.nbits}, method={w.method}"


class QuantLinear(PackedWeight):
    """y = x W^T + b with `W` `[out, in]` kept packed; x is `[..., in]`, y is `[..., out]` in x's dtype.

    The weight is dequantized anew in every call: the packed buffers are all that stays in memory.
    """

    backend = "dequantize + matmul"

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def packed(self) -> dict[str, QuantizedWeight]:
        """Its weights by the prefix of their buffers' names; what a checkpoint describes."""
        return {"": self.weight}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.dequantize(x.dtype), self.bias)

    def _apply(self, fn, recurse: bool = True):
        biases, self.bias = self.bias, None  # unlike the buffers, the bias follows the model's dtype
        super()._apply(fn, recurse)
        self.bias = biases if biases is None else nn.Parameter(fn(biases.data), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        w = self._format
        return f"in_features={self.in_features}, out_features={self.out_features}, nbits={w.nbits}, method={w.method}"


def relative_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """||W - dequantized W|| / ||W|| in the Frobenius norm; 0 for an all-zero weight reproduced exactly."""
    reference = weight.float()
    error = torch.linalg.vector_norm(reference - quantized.dequantize())
    norm = torch.linalg.vector_norm(reference)
    return float(error / norm) if norm > 0 else float(error)
