"""QuantLinear: the layer that stands where an nn.Linear stood, and holds only packed buffers.

On a GPU, `use_kernels(model)` lays the packed buffers out once as the fused kernels read them (qbench.kernels); the
packed format is given up for it, so memory does not double, and comes back exactly with `restore()`. What is saved is
the packed format in either layout: `state_dict` gives it, and `in_packed_format` holds a model in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.format.weight import QuantizedWeight
from qbench.kernels import ops
from qbench.kernels.tiles import Tiles, from_tiles, to_tiles, unsupported

DEQUANTIZE = "dequantize + matmul"


TILE_BUFFERS = {"tiles_data": "data", "tiles_input_scale": "input_scale", "tiles_permutation": "permutation"}


class PackedWeight(nn.Module):
    """Holds one QuantizedWeight, or a stack of them, as buffers: whatever a model keeps packed, it keeps in these."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self._format = weight  # describes the format; its tensors are replaced by the module's buffers below
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        if weight.codebook is None:
            self.register_buffer("codebook", None)
        self._numbers: tuple[int, ...] | None = None  # of the tiles, while the weight is laid out for the kernels
        for name in TILE_BUFFERS:
            self.register_buffer(name, None, persistent=False)

    @property
    def weight(self) -> QuantizedWeight:
        """The weight over the buffers as they are now (moved, loaded); rebuilt bit for bit from the kernels' layout."""
        held = dict(self.named_buffers(recurse=False))
        if (tiles := self.tiles) is None:
            return self._format.with_tensors(held)
        kept = {name: held[name] for name in self._format.tensors() if name in held}
        if tiles.permutation is not None:
            kept["permutation"] = tiles.permutation
        return from_tiles(tiles, self._format.with_tensors(self._format.tensors() | kept))

    @property
    def format(self) -> QuantizedWeight:
        """The weight for counting its bytes: in the kernels' layout its tensors are on the meta device."""
        return self.weight if self._numbers is None else self._format

    @property
    def tiles(self) -> Tiles | None:
        """The weight as the kernels read it; None while it is in the packed format."""
        if self._numbers is None:
            return None
        return Tiles.over(
            self.tiles_data, self.tiles_input_scale, self.codebook, self.tiles_permutation, *self._numbers
        )

    def lay_out(self) -> bool:
        """Replaces the packed buffers by the kernels' layout; False, changing nothing, if they cannot hold it."""
        if self._numbers is not None:
            return True
        weight = self.weight
        if unsupported(weight):
            return False
        tiles = to_tiles(weight)
        if tiles.data.is_cuda:  # the kernels may read weights before the kernel in front of them has ended
            torch.cuda.synchronize(tiles.data.device)
        tensors = weight.tensors()
        self._format = weight.with_tensors({name: tensor.to("meta") for name, tensor in tensors.items()})
        for name in tensors:
            held = name.startswith("codes_") or (name in ("scale", "zero") and f"{name}_step" not in tensors)
            if held or name == "permutation":
                del self._buffers[name]
        for name, field in TILE_BUFFERS.items():
            self.register_buffer(name, getattr(tiles, field), persistent=False)
        self._numbers = tiles.numbers
        return True

    def restore(self) -> None:
        """Back to the packed format, as it was before `lay_out`."""
        if self._numbers is None:
            return
        weight = self.weight
        for name in TILE_BUFFERS:
            self._buffers[name] = None
        self._numbers, self._format = None, weight
        for name, tensor in weight.tensors().items():
            self._buffers.pop(name, None)
            self.register_buffer(name, tensor)

    def held_bytes(self) -> dict[str, int]:
        """Bytes of the buffers as they are in memory now, by component as in `QuantizedWeight.stored_bytes`.

        More than is stored when laid out for the kernels: the tiles pad rows and columns and hold scales in fp16, while
        t and the tables of an int8 aux, which the tiles cannot give back exactly, stay beside them.
        """
        counted: dict[str, int] = {}
        for name, tensor in self.named_buffers(recurse=False):
            sizes = self.tiles.parts() if name == "tiles_data" else {_component(name): tensor.nbytes}
            for part, size in sizes.items():
                counted[part] = counted.get(part, 0) + size
        return counted

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        """The packed format in either layout: tiles are no buffers that a checkpoint could hold."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._numbers is not None:
            destination.update({f"{prefix}{name}": tensor for name, tensor in self.weight.tensors().items()})

    def _apply(self, fn, recurse: bool = True):
        """Devices may change; the stored precision may not: `.half()` and `.to(dtype)` leave the buffers alone."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        # the description must not keep the buffers alive on the device they came from
        if self._numbers is None:
            self._format = self.weight
        return self

    def extra_repr(self) -> str:
        w = self._format
        return f"shape={list(w.shape)}, nbits={w.nbits}, method={w.method}"


class QuantLinear(PackedWeight):
    """y = x W^T + b with `W` `[out, in]` kept packed; x is `[..., in]`, y is `[..., out]` in x's dtype.

    In the kernels' layout one fused op multiplies; in the packed format the weight is dequantized anew in every call.
    Either way the packed buffers are all that stays in memory.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def packed(self) -> dict[str, QuantizedWeight]:
        """Its weights by the prefix of their buffers' names; what a checkpoint describes."""
        return {"": self.weight}

    def forward(self, x: Tensor) -> Tensor:
        if self._numbers is not None:
            tiles = self.tiles_data, self.tiles_input_scale, self.codebook, self.tiles_permutation
            return ops.dual_linear(x, *tiles, self.bias, *self._numbers)
        return F.linear(x, self.weight.dequantize(x.dtype), self.bias)

    def _apply(self, fn, recurse: bool = True):
        biases, self.bias = self.bias, None  # unlike the buffers, the bias follows the model's dtype
        super()._apply(fn, recurse)
        self.bias = biases if biases is None else nn.Parameter(fn(biases.data), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        w = self._format
        return f"in_features={self.in_features}, out_features={self.out_features}, nbits={w.nbits}, method={w.method}"


@contextmanager
def in_packed_format(model: nn.Module) -> Iterator[None]:
    """While it lasts, every packed weight of `model` is in the packed format; then each is laid out as it was."""
    laid_out = [m for m in model.modules() if isinstance(m, PackedWeight) and m.tiles is not None]
    try:
        for module in laid_out:
            module.restore()
        yield
    finally:
        for module in laid_out:
            module.lay_out()


def use_kernels(model: Any) -> None:
    """Lays every packed weight on a GPU out for the fused kernels; one that they cannot hold stays packed.

    QBENCH_KERNELS=0 in the environment leaves all of them packed, on plain torch.
    """
    for module in model.modules():
        if isinstance(module, PackedWeight) and _have_kernels(next(module.buffers()).device):
            module.lay_out()


def _have_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and ops.wanted()


def backend(weight: QuantizedWeight, dtype: torch.dtype) -> str:
    """What multiplies with a packed weight once `use_kernels` has seen it, for activations of `dtype`."""
    device = weight.planes[0].device
    if not _have_kernels(device):
        return DEQUANTIZE
    if reason := unsupported(weight):
        return f"{DEQUANTIZE} (no fused kernel for {reason})"
    return ops.backend(device, dtype)


def _component(buffer: str) -> str:
    """`codes_0` -> codes, `scale_step` -> scale, `tiles_permutation` -> permutation."""
    name = buffer.removeprefix("tiles_").removesuffix("_step").removesuffix("_offset")
    return "codes" if name.startswith("codes_") else name


def relative_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """||W - dequantized W|| / ||W|| in the Frobenius norm; 0 for an all-zero weight reproduced exactly."""
    reference = weight.float()
    error = torch.linalg.vector_norm(reference - quantized.dequantize())
    norm = torch.linalg.vector_norm(reference)
    return float(error / norm) if norm > 0 else float(error)
