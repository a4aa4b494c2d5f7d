"""`quantizer=mixed`: one method with bits of its own for each linear, chosen by what an anatomy measured.

    -m experiment=anatomy quantizer.method=rtn quantizer.nbits=2,3,4        what each part costs at each number of bits
    quantizer=mixed quantizer.method=rtn quantizer.budget_bits=3.5          the best that fits (allocate.py)

What is chosen is the point: `assignment` holds it, `budget_bits` led to it. An assignment says, for each kind of
linear, the bits in block 0, 1, 2, ..., one digit a block and `-` where a block has none of the kind:

    quantizer.assignment='self_attn.q_proj=3343 mlp.down_proj=4344'

The experts of one block have one kind and one number of bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qbench.format.packing import PLANES
from qbench.model.linears import find_linears
from qbench.parts.composed import Composed
from qbench.parts.partly import linears_of_experts
from qbench.quant.quantizer import Quantizer
from qbench.record.parts import Part, place

NONE = "-"


@dataclass(frozen=True)
class Mixed(Composed):
    """`budget_bits` is what the linears may take on average, as stored, scales included; null with an `assignment`."""

    budget_bits: float | None = 4.0
    assignment: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.assignment is None and not (self.budget_bits and self.budget_bits > 0):
            raise ValueError(f"budget_bits must be positive bits per weight, got {self.budget_bits}")
        if self.assignment is not None:
            for nbits in sorted(set(self.bits.values())):
                self.made(nbits)

    def settings(self) -> dict[str, Any]:
        """The assignment is the content; the budget that led to it is not, nor one number of bits."""
        own = {k: v for k, v in self.inner.settings().items() if k != "nbits"}
        return {"method": self.method, "assignment": self.assignment} | own

    @cached_property
    def bits(self) -> dict[Part, int]:
        """By kind and block; raises ValueError for an assignment of another form."""
        found: dict[Part, int] = {}
        for word in (self.assignment or "").split():
            kind, equals, digits = word.partition("=")
            if not kind or not equals or not re.fullmatch(f"[{''.join(map(str, PLANES))}{NONE}]+", digits):
                raise ValueError(
                    f"assignment must say KIND=DIGITS for each kind, a digit of {', '.join(map(str, PLANES))} or "
                    f"{NONE} for each block, got '{word}'"
                )
            found |= {Part(kind, block): int(digit) for block, digit in enumerate(digits) if digit != NONE}
        return found

    @cached_property
    def _made(self) -> dict[int, Quantizer]:
        return {nbits: self.made(nbits) for nbits in set(self.bits.values())}

    def for_layer(self, name: str) -> Quantizer:
        """Raises ValueError for a linear of which the assignment says nothing."""
        nbits = self.bits.get(place(name))
        if nbits is None:
            raise ValueError(f"quantizer.assignment says nothing of {name}")
        return self._made[nbits]

    def for_model(self, model: Any) -> Quantizer:
        """Raises ValueError for a model that has other linears than the assignment names."""
        found = find_linears(model)
        names = [*found.layers, *linears_of_experts(found.experts)]
        for name in names:
            self.for_layer(name)
        if unused := self.bits.keys() - {place(name) for name in names}:
            kind, block = min(unused)
            raise ValueError(f"quantizer.assignment names {kind} in block {block}, which this model does not have")
        return self


def written(bits: Mapping[Part, int]) -> str:
    """An assignment as a setting; kinds in the order in which they first appear."""
    blocks = 1 + max(block for _, block in bits if block is not None)
    kinds = dict.fromkeys(kind for kind, _ in bits)
    return " ".join(f"{k}={''.join(str(bits.get(Part(k, b), NONE)) for b in range(blocks))}" for k in kinds)
