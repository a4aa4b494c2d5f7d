"""`quantizer=partly`: a method on the linears that a pattern names, the rest as it was: what a part of a model costs.

    quantizer=partly quantizer.method=rtn quantizer.nbits=3 'quantizer.only=*.mlp.down_proj'
    -m quantizer=partly quantizer.only=kinds,blocks              a point for every kind of linear and for every block

A sweep of it is an anatomy (experiment=anatomy): the KL of each part alone, and their sum beside the KL of the whole,
says what makes the difference on a model. Patterns are those of record/parts.py, or any others.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from qbench.model.linears import find_linears
from qbench.parts.composed import Composed
from qbench.quant.quantizer import Quantizer
from qbench.record.parts import EACH, WHOLE, place


@dataclass(frozen=True)
class Partly(Composed):
    """`nbits` and `group_size` are the method's; null for a method without that setting."""

    nbits: int | None = 4
    only: str = WHOLE

    partial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.only in EACH:
            raise ValueError(f"quantizer.only={self.only} stands for a point each, which is a sweep: add -m")
        super().__post_init__()

    def settings(self) -> dict[str, Any]:
        return {"method": self.method, "only": self.only} | self.inner.settings()

    def for_layer(self, name: str) -> Quantizer | None:
        return self.inner if fnmatchcase(name, self.only) else None

    def for_model(self, model: Any) -> Quantizer:
        """Raises ValueError for a pattern that names no linear of the model."""
        found = find_linears(model)
        names = [*found.layers, *linears_of_experts(found.experts)]
        if not any(self.for_layer(name) for name in names):
            kinds = ", ".join(dict.fromkeys(f"*.{place(name).kind}" for name in names))
            raise ValueError(
                f"quantizer.only={self.only} names no linear of this model; its kinds of linears are {kinds}, "
                f"and a single one is called {names[0]}"
            )
        return self


def linears_of_experts(experts: dict[str, Any]) -> list[str]:
    """The names of the matrices of fused experts: `model.layers.0.mlp.experts.3.gate_proj`."""
    from qbench.layers.expert_form import form

    return [
        f"{name}.{index}.{projection}"
        for name, module in experts.items()
        for index in range(module.num_experts)
        for projection in form(module).projections
    ]
