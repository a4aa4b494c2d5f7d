"""Composed: a quantizer that hands each linear to another one, by the linear's name, or leaves it alone.

What is left alone is the original's: it has no row in the result and costs 16 bit. Inside a stack of fused experts,
which is held and counted as one, it is a Plain weight, in 16 bit where it was so before it was loaded in 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qbench.format.format import Format
from qbench.format.plain import Plain
from qbench.quant.original import Original
from qbench.quant.quantizer import InputStatistics, Quantizer, Statistic
from qbench.registry import make_quantizer


@dataclass(frozen=True)
class Composed(Quantizer):
    """Base of both; ValueError for a `method` that quantizes no single weight, or that refuses its settings.

    `options` are the method's other settings, such as {aux_dtype: int8}; a setting that is null is left to the method.
    """

    method: str = "rtn"
    group_size: int | None = 64
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inner = self.inner
        if isinstance(inner, Composed | Original) or inner.files() or not inner.settings():
            raise ValueError(f"quantizer.method={self.method} has no weights of its own to quantize; take a method")

    def made(self, nbits: int | None) -> Quantizer:
        """The method with so many bits; raises ValueError for settings that it refuses."""
        given = {"nbits": nbits, "group_size": self.group_size}
        if both := sorted(given.keys() & self.options):
            raise ValueError(f"say quantizer.{both[0]}, and leave it out of quantizer.options")
        return make_quantizer({"name": self.method} | {k: v for k, v in given.items() if v is not None} | self.options)

    @cached_property
    def inner(self) -> Quantizer:
        """The method as it is where bits do not matter."""
        return self.made(getattr(self, "nbits", None))

    @property
    def needs(self) -> frozenset[Statistic]:  # type: ignore[override]
        return self.inner.needs

    @property
    def joint(self) -> bool:  # type: ignore[override]
        return self.inner.joint

    def quantize(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[Format]:
        """As the method does where it is not told which linears these are."""
        return self.inner.quantize(weights, stats)

    def quantize_stacks(
        self,
        names: Sequence[Sequence[str]],
        weights: Sequence[Tensor],
        stats: Sequence[InputStatistics] | None = None,
    ) -> list[Format]:
        """Stacks go to a quantizer as stacks if all their experts go to the same one; else expert by expert."""
        chosen = [{id(one): one for one in map(self.for_layer, of)} for of in names]
        if any(len(ones) > 1 for ones in chosen):
            return super().quantize_stacks(names, weights, stats)
        own = [next(iter(ones.values())) for ones in chosen]
        # of its own: a view would keep both gate and up in memory
        left = {
            j: in_16_bit(weights[j]).clone(memory_format=torch.contiguous_format) for j, q in enumerate(own) if not q
        }
        found: dict[int, Format] = {j: Plain.of(numbers) for j, numbers in left.items()}
        for quantizer in {id(one): one for one in own if one is not None}.values():
            places = [j for j, one in enumerate(own) if one is quantizer]
            made = quantizer.quantize_stacks([names[j] for j in places], [weights[j] for j in places], stats)
            found |= dict(zip(places, made, strict=True))
        return [found[j] for j in range(len(names))]

    def quantize_layers(
        self, names: Sequence[str], weights: Sequence[Tensor], stats: InputStatistics | None
    ) -> list[Format]:
        """Linears of one group that go to the same quantizer go together, so that it may share what it shares."""
        chosen = [self.for_layer(name) for name in names]
        found: dict[int, Format] = {i: Plain.of(in_16_bit(weights[i])) for i, one in enumerate(chosen) if one is None}
        for quantizer in {id(one): one for one in chosen if one is not None}.values():
            places = [i for i, one in enumerate(chosen) if one is quantizer]
            made = quantizer.quantize_layers([names[i] for i in places], [weights[i] for i in places], stats)
            found |= dict(zip(places, made, strict=True))
        return [found[i] for i in range(len(names))]


def in_16_bit(weight: Tensor) -> Tensor:
    """The same numbers in bf16 or fp16 where either holds all of them, as of a 16-bit model that runs in fp32."""
    if weight.dtype.itemsize == 2:
        return weight
    narrow = (weight.to(dtype) for dtype in (torch.bfloat16, torch.float16))
    return next((one for one in narrow if torch.equal(one.to(weight.dtype), weight)), weight)
