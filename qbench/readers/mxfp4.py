"""MXFP4 as gpt-oss is published: the fused experts of a block, stacked, all other weights in BF16.

    model.layers.0.mlp.experts.gate_up_proj_blocks  uint8 [experts, out, in / 32, 16]  two e2m1 codes a byte, low first
    model.layers.0.mlp.experts.gate_up_proj_scales  uint8 [experts, out, in / 32]      e8m0
    the same of down_proj

The model holds these matrices transposed, `[experts, in, out]`, and gate and up row by row in turns; here every expert
and projection is a weight `[out, in]` by itself, read from its own place in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qbench.format.blockfloat import MX_BLOCK, MXFP4Weight
from qbench.format.format import Format
from qbench.layers.expert_form import form
from qbench.readers.blockfloat import mxfp4
from qbench.readers.folder import HeldFolder, Linear, method_of
from qbench.readers.names import Fused, matrices, matrix_of
from qbench.readers.reader import Entry
from qbench.readers.shards import Stored

PROJECTIONS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class MXFP4:
    """A qbench.readers.reader.Reader."""

    def recognizes(self, path: Path) -> bool:
        return method_of(path) == "mxfp4"

    def open(self, path: Path, model: Any) -> HeldStacks:
        return HeldStacks(path, model, Stacks(), "MXFP4, stacks of experts")


@dataclass(frozen=True)
class Stacks:
    """A layout of qbench.readers.folder, whose modules are those that hold experts."""

    parts = tuple(f"{name}_{part}" for name in PROJECTIONS for part in ("blocks", "scales"))
    marks = parts
    unused = MappingProxyType({})

    def kind(self, linear: Linear) -> str:
        return "mxfp4"

    def decode(self, linear: Linear, tensors: Mapping[str, Tensor]) -> Format:
        return mxfp4(linear, tensors["blocks"], tensors["scales"])


class HeldStacks(HeldFolder):
    """A folder in which what is quantized are stacks, of which a weight is one matrix."""

    def _add_linear(self, module: str, stored: Mapping[str, Stored]) -> None:
        for name in PROJECTIONS:
            whole, place = Linear(module, (0, 0), stored), self._names.place(f"{module}.{name}")
            if not isinstance(place, Fused):
                raise whole.error(f"it has quantized experts in {name}, and the original has none of that name")
            experts = self._names.experts[place.module]
            known = matrices(form(experts), place.parameter, tuple(getattr(experts, place.parameter).shape))
            rows, columns = sum(shape[0] for shape in known.values()), next(iter(known.values()))[1]
            count, groups = experts.num_experts, columns // MX_BLOCK
            if columns % MX_BLOCK:
                raise whole.error(f"the {columns} input channels of {name} do not fall into blocks of {MX_BLOCK}")
            whole = replace(whole, shape=(rows, columns))
            whole.require(f"{name}_blocks", (count, rows, groups, MX_BLOCK // 2), dtypes=(torch.uint8,))
            whole.require(f"{name}_scales", (count, rows, groups), dtypes=(torch.uint8,))
            for index in range(count):
                for projection, shape in known.items():
                    weight = f"{place.module}.{index}.{projection}.weight"
                    nbytes = shape[0] * groups * (MX_BLOCK // 2 + 1)
                    self._enter(weight, Entry(shape, "mxfp4", nbytes, quantized=True))
                    self._linears[weight] = Linear(f"{module}.{name}", shape, stored)

    def read(self, name: str) -> MXFP4Weight | Tensor:
        if name not in self._linears:
            return super().read(name)
        linear = self._linears[name]
        module, index, projection, _ = name.rsplit(".", 3)
        how = replace(form(self._names.experts[module]), transposed=False)  # in the file they are upright
        parameter = linear.module.rpartition(".")[2]
        tensors = {}
        for part in ("blocks", "scales"):
            stack = self._tensor(f"{linear.module}_{part}", int(index))
            tensors[part] = matrix_of(how, projection, parameter, stack.flatten(1))
        return self._layout.decode(linear, tensors)
