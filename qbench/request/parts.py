"""`quantizer.only=kinds`, `blocks` or `linears` in a sweep: a point for each such part of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from qbench.config import Config
from qbench.errors import RequestError
from qbench.parts.partly import linears_of_experts
from qbench.record.parts import EACH, WHOLE, patterns
from qbench.registry import SOURCE, make
from qbench.request import estimate

KEY = "quantizer.only"
Overrides = tuple[str, ...]


def spelled_out(points: list[Overrides], compose: Callable[[Overrides], Config]) -> list[Overrides]:
    """The points, those of all parts in place of one that asks for them.

    Raises RequestError for a model whose configuration cannot be had, and what `compose` raises.
    """
    known: dict[str, list[str]] = {}
    found = [each for point in points for each in _each(point, compose, partial(_names, known))]
    return list(dict.fromkeys(found))


def _each(
    point: Overrides, compose: Callable[[Overrides], Config], names: Callable[[Config], list[str]]
) -> Iterator[Overrides]:
    at = next((i for i, o in enumerate(point) if o.partition("=")[0] == KEY), None)
    each = point[at].partition("=")[2].strip("'\"") if at is not None else ""
    if at is None or each not in EACH:
        yield point
        return
    whole = (*point[:at], f"{KEY}='{WHOLE}'", *point[at + 1 :])
    for pattern in patterns(names(compose(whole)), each):
        yield (*point[:at], f"{KEY}='{pattern}'", *point[at + 1 :])


def _names(known: dict[str, list[str]], config: Config) -> list[str]:
    """The linears of the model, those inside fused experts included."""
    key = repr(config.model)
    if key not in known:
        source: Any = make(SOURCE, config.model)
        skeleton = estimate.skeleton(source)
        if skeleton is None:
            raise RequestError(
                f"{KEY} needs the configuration of model={source.name} to name its linears, and it is not here; "
                "fetch the model first, or name a pattern"
            )
        known[key] = [*skeleton.found.layers, *linears_of_experts(skeleton.found.experts)]
    return known[key]
