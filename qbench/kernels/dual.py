"""The fused kernel of the format dual-scale, as layers call it: its layout is tiles.py, its ops are ops.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.format.weight import QuantizedWeight
from qbench.kernels import grouped, ops
from qbench.kernels.routes import Routes
from qbench.kernels.tiles import Tiles, from_tiles, to_tiles, unsupported

AUX_PARTS = ("", "_step", "_offset")


@dataclass(frozen=True)
class DualScaleKernel:
    """A qbench.kernels.kernel.Kernel."""

    buffers: tuple[str, ...] = ("data", "input_scale", "codebook", "permutation", "signs")

    @property
    def pairs(self) -> int:
        return ops.EXPERT_PAIRS

    def refusal(self, weight: QuantizedWeight) -> str | None:
        return unsupported(weight)

    def lay_out(self, weight: QuantizedWeight) -> Tiles:
        return to_tiles(weight)

    def beside(self, weight: QuantizedWeight) -> set[str]:
        """t, which the tiles hold padded and in another order, and an int8 aux, which is fp16 in the tiles."""
        names = set(weight.tensors())
        tables = {f"{aux}{part}" for aux in ("scale", "zero") if f"{aux}_step" in names for part in AUX_PARTS}
        return names & (tables | {"input_scale"})

    def over(self, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tiles:
        return Tiles.over(tensors, numbers)

    def restore(self, layout: Tiles, form: QuantizedWeight) -> QuantizedWeight:
        return from_tiles(layout, form)

    def held_bytes(self, layout: Tiles, beside: Mapping[str, Tensor]) -> dict[str, int]:
        counted = layout.parts()
        for name, tensor in beside.items():
            part = name.removesuffix("_step").removesuffix("_offset")
            counted[part] = counted.get(part, 0) + tensor.nbytes
        return counted

    def linear(self, x: Tensor, layout: Tiles, bias: Tensor | None = None) -> Tensor:
        return ops.linear(x, layout, bias)

    def experts(self, x: Tensor, index: Tensor, layouts: Sequence[Tiles]) -> list[Tensor]:
        if len(layouts) == 2:
            return ops.linear_both_experts(x, index, *layouts)
        return [ops.linear_experts(x, index, layout) for layout in layouts]

    def grouped(self, x: Tensor, layout: Tiles, routes: Routes, gather: bool) -> Tensor:
        return grouped.dual_linear(x, layout, routes, gather)

    def backend(self, device: torch.device, dtype: torch.dtype) -> str:
        return ops.backend(device, dtype)
