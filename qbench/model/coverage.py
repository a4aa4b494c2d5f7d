"""How much of a model's linear weights can be quantized, said before any time is spent: the shapes alone decide it."""

from __future__ import annotations

from typing import Any

from qbench.config import RuntimeConfig
from qbench.errors import PointError, RequestError
from qbench.model.linears import Linears, Skipped, find_linears, quantized_weights
from qbench.model.readers import mark_read_weights

NAMED = 3  # weights that a sentence names


def check_setting(runtime: RuntimeConfig) -> None:
    """Raises RequestError unless `runtime.min_coverage` is a share."""
    if not 0 <= runtime.min_coverage <= 1:
        raise RequestError(
            f"runtime.min_coverage={runtime.min_coverage:g} is no share of the linear weights; it is from 0 to 1"
        )


def settle_layers(model: Any, min_coverage: float | None, offloaded: bool = False) -> None:
    """Decides, once a model is loaded, which of its linears are quantized; raises PointError when they are too few.

    With None, and of a model that is packed already, nothing is asked.
    """
    mark_read_weights(model, offloaded)
    if min_coverage is None or quantized_weights(model):
        return
    found = find_linears(model)
    if reason := too_few(found, min_coverage):
        raise PointError(reason)


def share(found: Linears) -> float:
    """The part of the counted linear weights of an unquantized model that will be quantized, 0 to 1."""
    return found.quantizable / max(1, found.weights)


def too_few(found: Linears, min_coverage: float) -> str | None:
    """Why a model with these linears cannot be quantized, in one sentence; None if it can be."""
    if not found.quantizable:
        return f"there is nothing to quantize in this model; left out: {left_out(found.skipped)}"
    return shortfall(share(found), min_coverage, found.skipped, "can be")


def planned(found: Linears, min_coverage: float) -> tuple[float, str | None]:
    """The coverage that a plan can promise, 0 to 1, and why the point would be refused, or None."""
    return round(share(found), 4), too_few(found, min_coverage)


def sentences(model: str, found: Linears, refused: str | None) -> list[str]:
    """What a plan says below its rows of a model's weights that stay in 16 bit, counted or not."""
    if refused:
        return [f"model={model}: {refused}"]
    said = []
    if any(s.counted for s in found.skipped):
        said.append(
            f"model={model}: {share(found):.1%} of the linear weights will be quantized; "
            f"left out: {left_out(found.skipped)}"
        )
    for reason in dict.fromkeys(s.reason for s in found.skipped if not s.counted):
        names = [s.name for s in found.skipped if s.reason == reason and not s.counted]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        said.append(f"model={model}: in 16 bit and not counted, since {reason}: {', '.join(names[:NAMED])}{more}")
    return said


def shortfall(covered: float, min_coverage: float, skipped: list[Skipped], verb: str) -> str | None:
    """Says that `covered` of the linear weights are not enough; None if they are."""
    if covered >= min_coverage:
        return None
    return (
        f"only {covered:.1%} of the linear weights {verb} quantized, runtime.min_coverage asks for "
        f"{min_coverage:.0%}; left out: {left_out(skipped)}"
    )


def left_out(skipped: list[Skipped]) -> str:
    """The largest of the weights that count and stay in 16 bit, with the reason, and how many more there are."""
    counted = sorted((s for s in skipped if s.counted), key=lambda s: -s.weights)
    if not counted:
        return "no linear layer was found"
    more = f" and {len(counted) - NAMED} more" if len(counted) > NAMED else ""
    return ", ".join(f"{s.name} ({s.reason})" for s in counted[:NAMED]) + more
