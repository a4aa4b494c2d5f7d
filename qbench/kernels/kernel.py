"""Kernel: what multiplies with a format's weights without dequantizing them first; most formats have none.

A kernel reads a weight in a layout of its own, which takes the place of the format's tensors while it runs. A package
that brings a format and a kernel for it says so where it defines the format:

    kernel.register(Mine, MyKernel())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qbench.format.format import Format
from qbench.format.weight import QuantizedWeight
from qbench.kernels.dual import DualScaleKernel
from qbench.kernels.routes import Routes


class Layout(Protocol):
    """Weights `[..., out, in]` as a kernel reads them: plain data, that comes apart into tensors and numbers."""

    def flat(self) -> tuple[Sequence[Tensor | None], Sequence[int]]:
        """Its tensors, a None where a part is not stored, and its numbers: all that an op of torch can be handed."""
        ...

    def select(self, index: int) -> Any:
        """Matrix `index` of a stack, as views."""
        ...


class Kernel(Protocol):
    """A fused kernel, and the layout that it reads; layers call nothing else. It keeps no state."""

    buffers: tuple[str, ...]  # what the tensors of `Layout.flat` are called, one by one
    pairs: int  # (token, expert) pairs that one launch of `experts` serves; 0 if there is no such launch

    def refusal(self, weight: Format) -> str | None:
        """Why the layout cannot hold this weight, as in `no fused kernel for ...`; None if it can."""
        ...

    def lay_out(self, weight: Format) -> Layout:
        """The weight in the kernel's layout, on its device."""
        ...

    def beside(self, weight: Format) -> set[str]:
        """Names of the format's tensors that stay beside the layout, because it cannot give them back exactly."""
        ...

    def over(self, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Layout:
        """What `Layout.flat` took apart. Under torch.compile too."""
        ...

    def restore(self, layout: Layout, form: Format) -> Format:
        """The weight bit for bit as `lay_out` was given it; `form` holds what stayed beside, the rest of it is meta."""
        ...

    def held_bytes(self, layout: Layout, beside: Mapping[str, Tensor]) -> dict[str, int]:
        """Bytes in memory by the components of `Format.stored_bytes`, padding included."""
        ...

    def linear(self, x: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
        """x `[..., in]` times the weight `[out, in]`, plus bias `[out]`; in x's dtype. Under torch.compile too."""
        ...

    def experts(self, x: Tensor, index: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
        """x `[tokens, in]` times matrices index `[tokens, k]` of each of one or two stacks: `[tokens, k, out]` each.

        Where an index is none of the stack's, since that expert lives elsewhere, the result may be anything.
        """
        ...

    def grouped(self, x: Tensor, layout: Layout, routes: Routes, gather: bool) -> Tensor:
        """Pairs sorted by expert times their matrices: `[pairs, out]`. With `gather` x is `[tokens, in]`, else sorted.

        Asks the GPU nothing, so that it may run in a CUDA graph; `grouped.multiply` does it for any dense stack.
        """
        ...

    def backend(self, device: torch.device, dtype: torch.dtype) -> str:
        """What multiplies on `device`, for activations of `dtype`, as a result records it."""
        ...


_kernels: dict[type, Kernel] = {QuantizedWeight: DualScaleKernel()}


def register(format: type, kernel: Kernel) -> None:
    """Lets `kernel` serve the weights of `format`, instead of what served it before."""
    _kernels[format] = kernel


def kernel_of(weight: Format) -> Kernel | None:
    return _kernels.get(type(weight))
