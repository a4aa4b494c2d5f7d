"""QuantizedWeight: the format `dual-scale`, integers of 2, 3, 4 or 8 bits with a scale per group and one per channel.

    W[o, i] ~= (codes[o, i] - zero[o, g(i)]) * scale[o, g(i)] * t[i]
    W[o, i] ~=  codebook[codes[o, i]]        * scale[o, g(i)] * t[i]      with a codebook
    W[o, i] ~=  codebook[codes[o, j], i - p j] * scale[o, g(i)] * t[i]    with one of vectors of p, j = i // p

A code of a vector has p x nbits bits. `g(i) = i // group_size`; the last group of a row may be ragged. Without
a stored zero point the grid is centred: zero = 2**(nbits - 1). `t` is the input scale (SINQ's second axis,
AWQ's channel scale). With a permutation the columns were quantized in another order (GPTQ's act-order): column
`i` of the stored codes is column `permutation[i]` of the weight. With a rotation R (rotation.py) all this is W
R, and `dequantize` goes back to W. A stack of experts has one more leading dimension everywhere, but for what
`ONCE` names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.format import stack
from qbench.format.aux import Aux, dense_input_scale
from qbench.format.format import Format
from qbench.format.packing import WIDTHS, pack, unpack
from qbench.format.rotation import Rotation

ONCE = ("codebook", "signs")  # which all matrices of a stack share


@dataclass(frozen=True)
class QuantizedWeight(Format):
    """Weights `[..., out, in]` as packed codes and aux; build one with `QuantizedWeight.build`."""

    name: ClassVar[str] = "dual-scale"

    shape: tuple[int, ...]
    nbits: int
    group_size: int
    planes: tuple[Tensor, ...]  # uint8 [..., out, bytes], see packing.py
    scale: Aux  # [..., out, groups]
    zero: Aux | None = None  # [..., out, groups]
    input_scale: Tensor | None = None  # t [..., in], stored as aux.INPUT_SCALE_DTYPES says
    codebook: Tensor | None = None  # fp32 [2**nbits], or fp16 [2**(p nbits), p]
    permutation: Tensor | None = None  # int32 [..., in]
    method: str = ""  # the method in effect, which for one layer may differ from the one asked for
    diagnostics: Mapping[str, float] = field(default_factory=dict)  # for its row in the result
    rotation: Rotation | None = None  # of the input channels

    @staticmethod
    def build(
        codes: Tensor,
        scale: Aux,
        *,
        nbits: int,
        group_size: int,
        zero: Aux | None = None,
        input_scale: Tensor | None = None,
        codebook: Tensor | None = None,
        permutation: Tensor | None = None,
        method: str = "",
        diagnostics: Mapping[str, float] | None = None,
        rotation: Rotation | None = None,
        columns: int | None = None,
    ) -> QuantizedWeight:
        """Packs `codes` `[..., out, in]`; raises ValueError when a part does not fit the codes' shape.

        With a codebook of vectors of p numbers `codes` are `[..., out, ceil(in / p)]` and `columns` says what `in` is.
        """
        p = vector_size(codebook)
        columns = codes.shape[-1] if columns is None else columns
        if codes.shape[-1] != -(-columns // p):
            raise ValueError(f"{columns} input channels in vectors of {p} are not {codes.shape[-1]} codes")
        lead = codes.shape[:-2]
        groups = -(-columns // group_size)
        expected = {"scale": (scale.stored, (*codes.shape[:-1], groups))}
        if zero is not None:
            expected["zero"] = (zero.stored, (*codes.shape[:-1], groups))
        if input_scale is not None:
            expected["input scale"] = (input_scale, (*lead, columns))
        if permutation is not None:
            expected["permutation"] = (permutation, (*lead, columns))
        if codebook is not None:
            expected["codebook"] = (codebook, (2**nbits,) if codebook.ndim == 1 else (2 ** (p * nbits), p))
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        return QuantizedWeight(
            (*codes.shape[:-1], columns),
            nbits,
            group_size,
            pack(codes, p * nbits),
            scale,
            zero,
            None if input_scale is None else input_scale.half(),
            None if codebook is None else codebook.float() if codebook.ndim == 1 else codebook.half(),
            None if permutation is None else permutation.int(),
            method,
            dict(diagnostics or {}),
            rotation,
        )

    def codes(self) -> Tensor:
        """The unpacked codes, uint8 `[..., out, in]`, in stored column order; of vectors `[..., out, ceil(in / p)]`."""
        p = vector_size(self.codebook)
        return unpack(self.planes, p * self.nbits, -(-self.shape[-1] // p))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights `[..., out, in]` in their own basis, computed in fp32 as said above, then cast to `dtype`."""
        codes = self.codes()
        if self.codebook is None:
            values = codes.float()
        else:  # by 32-bit indices, which indexing with [] would widen to 64
            found = self.codebook.float().index_select(0, codes.flatten().int())
            values = found.view(*codes.shape[:-1], -1)[..., : self.shape[-1]]
        if self.codebook is None:
            if self.zero is None:
                values -= 2.0 ** (self.nbits - 1)
            else:
                per_group(values, self.group_size, self.zero.dense(), torch.Tensor.sub_)
        per_group(values, self.group_size, self.scale.dense(), torch.Tensor.mul_)
        if self.permutation is not None:
            order = self.permutation.long().unsqueeze(-2).expand(self.shape)
            values = torch.empty_like(values).scatter_(-1, order, values)
        if self.input_scale is not None:
            values *= dense_input_scale(self.input_scale).unsqueeze(-2)
        if self.rotation is not None:
            values = self.rotation.undo(values)
        return values.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Every stored buffer by name: what is counted, moved and saved."""
        named = {f"codes_{i}": plane for i, plane in enumerate(self.planes)}
        for name, aux in (("scale", self.scale), ("zero", self.zero)):
            if aux is not None:
                named[name] = aux.stored
                if aux.step is not None and aux.offset is not None:
                    named[f"{name}_step"], named[f"{name}_offset"] = aux.step, aux.offset
        for name in ("input_scale", "codebook", "permutation"):
            if (tensor := getattr(self, name)) is not None:
                named[name] = tensor
        if self.rotation is not None and self.rotation.signs is not None:
            named["signs"] = self.rotation.signs
        return named

    def with_tensors(self, named: Mapping[str, Tensor]) -> QuantizedWeight:
        """The same weight over other buffers of the same names, for example on another device."""

        def aux(name: str) -> Aux:
            return Aux(named[name], named.get(f"{name}_step"), named.get(f"{name}_offset"))

        return replace(
            self,
            planes=tuple(named[f"codes_{i}"] for i in range(len(self.planes))),
            scale=aux("scale"),
            zero=aux("zero") if "zero" in named else None,
            rotation=None if self.rotation is None else replace(self.rotation, signs=named.get("signs")),
            **{name: named.get(name) for name in ("input_scale", "codebook", "permutation")},
        )

    def describe(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "nbits": self.nbits,
            "group_size": self.group_size,
            "method": self.method,
            "diagnostics": {key: float(value) for key, value in self.diagnostics.items()},
            **({} if self.rotation is None else {"rotation_block": self.rotation.block}),
        }

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        nbits, nothing = description["nbits"], torch.empty(0)
        empty = QuantizedWeight(
            tuple(description["shape"]),
            nbits,
            description["group_size"],
            (nothing,) * len(WIDTHS[nbits * vector_size(tensors.get("codebook"))]),
            Aux(nothing),
            method=description["method"],
            diagnostics=description["diagnostics"],
            rotation=Rotation(description["rotation_block"]) if "rotation_block" in description else None,
        )
        if empty.rotation is not None and description["shape"][-1] % empty.rotation.block:
            raise ValueError(
                f"no rotation in blocks of {empty.rotation.block} fits {description['shape'][-1]} channels"
            )
        return empty.with_tensors(tensors)

    @classmethod
    def stack(cls, weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
        return stack.stack(weights, ONCE)

    def select(self, index: int) -> QuantizedWeight:
        return stack.select(self, index, ONCE)

    def stored_bytes(self) -> dict[str, int]:
        """Bytes by component: codes, scale, zero, input_scale, codebook, permutation, signs: those that are stored."""
        counted: dict[str, int] = {}
        for name, tensor in self.tensors().items():
            part = "codes" if name.startswith("codes_") else name.removesuffix("_step").removesuffix("_offset")
            counted[part] = counted.get(part, 0) + tensor.numel() * tensor.element_size()
        return counted


def vector_size(codebook: Tensor | None) -> int:
    """Weights that a code stands for: p of a codebook of vectors `[n, p]`, else 1."""
    return 1 if codebook is None or codebook.ndim == 1 else codebook.shape[1]


def per_group(values: Tensor, group_size: int, factors: Tensor, operation) -> Tensor:
    """Applies an in-place operation between `values` `[..., in]` and per-group `factors` `[..., groups]`."""
    full = values.shape[-1] // group_size * group_size
    if full:
        blocks = values[..., :full].unflatten(-1, (-1, group_size))
        operation(blocks, factors[..., : full // group_size].unsqueeze(-1))
    if full < values.shape[-1]:
        operation(values[..., full:], factors[..., -1:])
    return values
