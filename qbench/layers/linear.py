"""QuantLinear: the layer that stands where an nn.Linear stood, and holds a weight in its format, whichever that is.

On a GPU, `use_kernels(model)` lays the packed buffers out once as the format's fused kernel reads them, if it has one;
the packed format is given up for it, so memory does not double, and comes back exactly with `restore()`. What is saved
is the packed format in either layout: `state_dict` gives it, and `in_packed_format` holds a model in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.format.format import Format
from qbench.kernels import grouped, ops
from qbench.kernels.kernel import Kernel, Layout, kernel_of
from qbench.kernels.routes import Routes

DEQUANTIZE = "dequantize + matmul"
LAID_OUT = "kernel_"  # in front of the names of a layout's buffers


class PackedWeight(nn.Module):
    """Holds one quantized weight, or a stack of them, as buffers: whatever a model keeps packed, it keeps in these."""

    def __init__(self, weight: Format) -> None:
        super().__init__()
        self._format = weight  # describes the weight; its tensors are replaced by the module's buffers below
        self._kernel: Kernel | None = None  # while the weight is laid out for it
        self._numbers: list[
            int
        ] = []  # of that layout; a compiler takes those of a list one by one, a tuple's as they are
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)

    @property
    def quantized(self) -> Format:
        """The weight over the buffers as they are now (moved, loaded); rebuilt bit for bit from a kernel's layout."""
        if self._kernel is None:
            return self._format.with_tensors(self._stored())
        form = self._format.with_tensors(self._format.tensors() | self._stored())
        return self._kernel.restore(self.layout, form)

    @property
    def format(self) -> Format:
        """The weight for counting its bytes: in a kernel's layout its tensors are on the meta device."""
        return self.quantized if self._kernel is None else self._format

    @property
    def kernel(self) -> Kernel | None:
        """What multiplies with the weight; None while it is in the packed format."""
        return self._kernel

    @property
    def layout(self) -> Layout | None:
        """The weight as its kernel reads it; None while it is in the packed format."""
        if self._kernel is None:
            return None
        return self._kernel.over([getattr(self, LAID_OUT + name) for name in self._kernel.buffers], self._numbers)

    def lay_out(self) -> bool:
        """Replaces the packed buffers by its kernel's layout; False, changing nothing, if no kernel can hold it."""
        if self._kernel is not None:
            return True
        weight = self.quantized
        kernel = kernel_of(weight)
        if kernel is None or kernel.refusal(weight):
            return False
        tensors, numbers = kernel.lay_out(weight).flat()
        if weight.device.type == "cuda":  # the kernels may read weights before the kernel in front of them has ended
            torch.cuda.synchronize(weight.device)
        stored = weight.tensors()
        self._format = weight.with_tensors({name: tensor.to("meta") for name, tensor in stored.items()})
        for name in stored.keys() - kernel.beside(weight):
            del self._buffers[name]
        for name, tensor in zip(kernel.buffers, tensors, strict=True):
            self.register_buffer(LAID_OUT + name, tensor, persistent=False)
        self._kernel, self._numbers = kernel, list(numbers)
        return True

    def restore(self) -> None:
        """Back to the packed format, as it was before `lay_out`."""
        if self._kernel is None:
            return
        weight = self.quantized
        for name in self._kernel.buffers:
            delattr(self, LAID_OUT + name)
        self._kernel, self._numbers, self._format = None, [], weight
        for name, tensor in weight.tensors().items():
            self._buffers.pop(name, None)
            self.register_buffer(name, tensor)

    def held_bytes(self) -> dict[str, int]:
        """Bytes of the buffers as they are in memory now, by component as in `Format.stored_bytes`.

        More than is stored when laid out for a kernel: dual-scale's pads rows and columns and holds scales in fp16,
        while t and the tables of an int8 aux, which it cannot give back exactly, stay beside.
        """
        if self._kernel is None:
            return self.quantized.stored_bytes()
        return self._kernel.held_bytes(self.layout, self._stored())

    def multiply_with_matrix(self) -> Callable[[Tensor, int], Tensor]:
        """For a stack: a function of x `[tokens, in]` and an index that multiplies x with that matrix, `[tokens, out]`.

        The function holds the stack as it is now, so that it is put together once for many experts.
        """
        kernel, layout = self._kernel, self.layout
        if kernel is not None and layout is not None:
            return lambda x, index: kernel.linear(x, layout.select(index))
        weight = self.quantized
        return lambda x, index: F.linear(x, weight.select(index).dequantize(x.dtype))

    def multiply_sorted(self, x: Tensor, routes: Routes, gather: bool) -> Tensor:
        """For a stack: pairs of token and expert, sorted by expert, times their matrices: `[pairs, out]`.

        x is `[tokens, in]` with `gather`, else `[pairs, in]` and sorted. Nothing is read back from the GPU.
        """
        kernel, layout = self._kernel, self.layout
        if kernel is not None and layout is not None:
            return kernel.grouped(x, layout, routes, gather)
        return grouped.multiply(x, self.quantized, routes, gather)

    def _stored(self) -> dict[str, Tensor]:
        """The format's tensors that are buffers now: all of them, or those that stay beside a kernel's layout."""
        return {name: self._buffers[name] for name in self._format.tensors() if name in self._buffers}

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        """The packed format in either layout: a kernel's buffers are none that a checkpoint could hold."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._kernel is not None:
            destination.update({f"{prefix}{name}": tensor for name, tensor in self.quantized.tensors().items()})

    def _apply(self, fn, recurse: bool = True):
        """Devices may change; the stored precision may not: `.half()` and `.to(dtype)` leave the buffers alone."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        # the description must not keep the buffers alive on the device they came from
        if self._kernel is None:
            self._format = self.quantized
        return self

    def extra_repr(self) -> str:
        return f"shape={list(self._format.shape)}, {_told(self._format)}"


class Absent(Tensor):
    """A quantized linear's `weight`: shape and device, which models ask for, and no numbers.

    Computing with it raises TypeError with a sentence.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, shape: Sequence[int], device: torch.device) -> Absent:
        return Tensor._make_wrapper_subclass(cls, shape, device=device)

    def __repr__(self) -> str:
        return f"Absent(shape={list(self.shape)}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise TypeError(
            "the weight of a quantized linear cannot be computed with: LINEAR.quantized is what it holds, and "
            "LINEAR.quantized.dequantize() is a tensor"
        )


class QuantLinear(PackedWeight):
    """y = x W^T + b with `W` `[out, in]` kept packed; x is `[..., in]`, y is `[..., out]` in x's dtype.

    In a kernel's layout one fused op multiplies; in the packed format the weight is dequantized anew in every call.
    Either way the packed buffers are all that stays in memory.
    """

    def __init__(self, weight: Format, bias: Tensor | None = None) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.dense: dict[torch.dtype, Tensor] | None = None  # while `held_dense` lasts, the weight by precision

    @property
    def weight(self) -> Absent:
        """Models and libraries expect a tensor by this name; what the layer holds is `quantized`."""
        return Absent((self.out_features, self.in_features), next(self.buffers()).device)

    def packed(self) -> dict[str, Format]:
        """Its weights by the prefix of their buffers' names; what a checkpoint describes."""
        return {"": self.quantized}

    def forward(self, x: Tensor) -> Tensor:
        if self._kernel is not None:
            return self._kernel.linear(x, self.layout, self.bias)
        if self.dense is None:
            return F.linear(x, self.quantized.dequantize(x.dtype), self.bias)
        if x.dtype not in self.dense:
            self.dense[x.dtype] = self.quantized.dequantize(x.dtype)
        return F.linear(x, self.dense[x.dtype], self.bias)

    def _apply(self, fn, recurse: bool = True):
        biases, self.bias = self.bias, None  # unlike the buffers, the bias follows the model's dtype
        super()._apply(fn, recurse)
        self.bias = biases if biases is None else nn.Parameter(fn(biases.data), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {_told(self._format)}"


def packed_weights(model: Any) -> dict[str, PackedWeight]:
    """What holds the packed weights of `model`, by the names of the modules; a stack of experts is one of them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


@contextmanager
def in_packed_format(model: nn.Module) -> Iterator[None]:
    """While it lasts, every packed weight of `model` is in the packed format; then each is laid out as it was."""
    laid_out = [module for module in packed_weights(model).values() if module.kernel is not None]
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
    for module in packed_weights(model).values():
        if _have_kernels(next(module.buffers()).device):
            module.lay_out()


@contextmanager
def held_dense(model: nn.Module) -> Iterator[None]:
    """While it lasts, linears on a CPU hold their weights dequantized beside the packed ones; same numbers, to the bit.

    For generation, where a step of a few tokens would dequantize the whole model anew.
    """
    linears = [m for m in model.modules() if isinstance(m, QuantLinear) and m.kernel is None]
    held = [linear for linear in linears if next(linear.buffers()).device.type == "cpu"]
    try:
        for linear in held:
            linear.dense = {}
        yield
    finally:
        for linear in held:
            linear.dense = None


def _have_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and ops.wanted()


def backend(weight: Format, dtype: torch.dtype) -> str:
    """What multiplies with a packed weight once `use_kernels` has seen it, for activations of `dtype`."""
    kernel = kernel_of(weight)
    if not _have_kernels(weight.device):
        return DEQUANTIZE
    if kernel is None or (reason := kernel.refusal(weight)):
        reason = f"the format {weight.name}" if kernel is None else reason
        return f"{DEQUANTIZE} (no fused kernel for {reason})"
    return kernel.backend(weight.device, dtype)


def backend_of(device: torch.device) -> str:
    """What multiplies with a dual-scaled weight on `device`, for activations in bf16."""
    return ops.backend(device, torch.bfloat16) if _have_kernels(device) else DEQUANTIZE


def _told(weight: Format) -> str:
    return f"format={weight.name}, bits_per_weight={weight.bits_per_weight:.3f}, method={weight.method}"


def relative_error(weight: Tensor, quantized: Format) -> Tensor:
    """||W - dequantized W|| / ||W|| in the Frobenius norm; 0 for an all-zero weight reproduced exactly; one element."""
    reference = weight.float()
    error = torch.linalg.vector_norm(reference - quantized.dequantize())
    norm = torch.linalg.vector_norm(reference)
    return torch.where(norm > 0, error / norm, error)
