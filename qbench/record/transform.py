"""What a result says of a transform: what it folded and how far that moved the model, and what it left alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qbench.record.strict import Strict


@dataclass(frozen=True)
class FoldRow(Strict):
    """One fold of one block, as often as it was done."""

    where: str  # in the model: a norm, or producer and consumer
    linears: list[str]  # whose input channels it changed
    moved: float  # ||y' - y|| / ||y|| of the block's output in fp32, the largest
    times: int = 1


@dataclass(frozen=True)
class AloneRow(Strict):
    """What a transform left as it was: a linear, or the residual stream."""

    name: str
    reason: str


@dataclass(frozen=True)
class TransformRecord(Strict):
    name: str
    settings: dict[str, Any]  # in effect: those that were chosen by the calibration text filled in
    coverage: float  # share of the linear weights whose input channels were changed, 0 to 1
    folds: list[FoldRow]
    alone: list[AloneRow]
    residual: bool = False  # whether the residual stream was turned
    moved: float = 0.0  # the largest over all folds
    searched: dict[str, float] = field(default_factory=dict)  # choice -> mean KL in nats on the calibration text
