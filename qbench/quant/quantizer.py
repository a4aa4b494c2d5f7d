"""Quantizer: what a method implements, and nothing else.

A quantizer is a frozen dataclass whose fields are its configuration. It is pure: weights `[out, in]` in,
weights of some Format out, on the device of the input; it sees no model and keeps no state. The unit of work is
the linear group, the linears that read the same tensor (q/k/v; gate/up): a method that shares something across
them overrides `quantize`, and says `joint = True` if it is shown no text: else the linears may come one by one; one
that treats matrices one by one writes `quantize_one`.

    @dataclass(frozen=True)
    class Mine(Quantizer):
        nbits: int = 4
        group_size: int = 64

        def quantize_one(self, weight, stats=None):
            return round_to_nearest(weight, nbits=self.nbits, group_size=self.columns(weight), method="mine")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from qbench.errors import none_of
from qbench.format.aux import AUX_DTYPES
from qbench.format.format import Format
from qbench.format.mixed import Mixed
from qbench.format.packing import PLANES
from qbench.format.stack import mixes


class Statistic(Enum):
    """What a calibrated method may ask to be told about the tensor that a linear group reads."""

    INPUT_ABSMEAN = "mean |x| per input channel, [in]"
    INPUT_SQUARES = "mean x^2 per input channel, [in]"
    INPUTS = "a sample of input rows, [tokens, in]"
    HESSIAN = "X^T X over all calibration tokens, [in, in]"


@dataclass(frozen=True)
class InputStatistics:
    """Streamed statistics of one linear group's input; a field is None when no method asked for it."""

    tokens: int
    absmean: Tensor | None = None  # [in]
    inputs: Tensor | None = None  # [tokens, in]
    hessian: Tensor | None = None  # [in, in]
    squares: Tensor | None = None  # [in]


@dataclass(frozen=True)
class Quantizer:
    """Base of every method; fields named nbits, group_size and aux_dtype are checked when it is made.

    Raises ValueError for a value outside the format (2, 3, 4 or 8 bits; a positive group or -1; fp16 or int8).
    """

    needs: ClassVar[frozenset[Statistic]] = frozenset()  # empty: calibration-free
    joint: ClassVar[bool] = False  # True: it is handed a linear group as a whole; else linears may come one by one
    stacks: ClassVar[bool] = False  # True: `quantize` takes stacks [experts, out, in], too, matrix by matrix to the bit
    partial: ClassVar[bool] = False  # True: it is asked to leave linears alone, and runtime.min_coverage asks nothing

    def __post_init__(self) -> None:
        nbits = getattr(self, "nbits", 4)
        if type(nbits) is not int or nbits not in PLANES:
            raise none_of("nbits", nbits, PLANES)
        group_size = getattr(self, "group_size", 64)
        if type(group_size) is not int or (group_size < 1 and group_size != -1):
            raise ValueError(f"group_size must be a positive number of input channels, or -1, got {group_size!r}")
        aux_dtype = getattr(self, "aux_dtype", "fp16")
        if aux_dtype not in AUX_DTYPES:
            raise none_of("aux_dtype", aux_dtype, AUX_DTYPES)

    def quantize(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[Format]:
        """Quantizes the weights `[out, in]` of one linear group, in order."""
        return [self.quantize_one(weight, stats) for weight in weights]

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> Format:
        """Quantizes one weight `[out, in]`."""
        raise TypeError(f"{type(self).__name__} must define quantize or quantize_one")

    @property
    def seed_field(self) -> str | None:
        """The field that a random choice of the method starts from: draws differ in it. None where it makes none."""
        return "seed" if hasattr(self, "seed") else None

    # What follows matters to a method that holds what others made (readers/file.py). The rest see weights alone.

    def pinned(self) -> Self:
        """The same method with what may move (a branch) replaced by what it is now (a commit); its files are here."""
        return self

    def files(self) -> list[Path]:
        """Files whose content belongs to the method; their hashes are part of what makes two measurements the same."""
        return []

    def settings(self) -> dict[str, Any]:
        """The fields that can change a number: all, but for places where files lie."""
        return asdict(self)

    def for_model(self, model: Any) -> Quantizer:
        """The method for one model, given as transformers' model without storage, before one of its weights is read.

        Raises ValueError for a model with which it cannot be used.
        """
        return self

    def for_layer(self, name: str) -> Quantizer | None:
        """What quantizes the linear of that name; None leaves it alone, as the original has it."""
        return self

    def quantize_layers(
        self, names: Sequence[str], weights: Sequence[Tensor], stats: InputStatistics | None
    ) -> list[Format]:
        """As `quantize`, told what the linears are called: `model.layers.0.mlp.experts.3.gate_proj`, fused or not."""
        return self.quantize(weights, stats)

    def quantize_stacks(
        self,
        names: Sequence[Sequence[str]],
        weights: Sequence[Tensor],
        stats: Sequence[InputStatistics] | None = None,
    ) -> list[Format]:
        """Quantizes a linear group of every expert: weights[j] `[experts, out, in]`, one stack for each projection j.

        Each matrix is contiguous, the stacks need not be: gate and up may be views of one parameter.

        names[j][e] is what matrix e of projection j is called, stats[e] is what expert e's matrices read. To the bit
        what `quantize_layers` makes of each expert's, and made by it or, if `stacks`, by `quantize`. On a GPU a
        calibrated method may add up in another order, if the output's error stays the same within 1 %.

        A stack's diagnostics are a number for each matrix, a tensor `[experts]` on any device or a sequence, or one
        number for all; where the methods in effect differ, `method` among them holds theirs, one for each matrix.
        """
        if self.stacks:
            return self.quantize(weights, None)
        made = []
        for e in range(len(weights[0])):
            own = [weight[e] for weight in weights]
            found = self.quantize_layers([of[e] for of in names], own, None if stats is None else stats[e])
            if len(found) != len(weights) or not all(isinstance(one, Format) for one in found):
                raise ValueError(f"{type(self).__name__}.quantize must return one Format per weight")
            made.append(found)
        return [stacked(projection) for projection in zip(*made, strict=True)]

    def in_place_of(self, name: str, parameter: Tensor) -> Format | Tensor | None:
        """What the variant has for a parameter that is no weight to quantize: a norm, a bias, a router, an embedding.

        None: the original's. A tensor or format of the parameter's shape otherwise.
        """
        return None

    def columns(self, weight: Tensor) -> int:
        """Input channels per group for this weight: `group_size`, or the whole row for -1."""
        group_size: int = getattr(self, "group_size", -1)
        return weight.shape[-1] if group_size == -1 else group_size


def stacked(weights: Sequence[Format]) -> Format:
    """Weights `[out, in]` as one stack that keeps what each says of itself, as `quantize_stacks` gives it.

    NaN stands for what one of them does not say.
    Raises ValueError where their form differs.
    """
    keys = dict.fromkeys(key for one in weights for key in one.diagnostics)
    told: dict[str, Any] = {key: [float(one.diagnostics.get(key, math.nan)) for one in weights] for key in keys}
    methods = [one.method for one in weights]
    if len(set(methods)) > 1:
        told["method"] = methods
    cls = Mixed if mixes(weights) else type(weights[0])
    return replace(cls.stack(weights), diagnostics=told)
