"""The two ways a point can end badly, and the sentence that lists the legal choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qbench.record.result import Result


class RequestError(ValueError):
    """What was asked for cannot be done: one sentence that says what is wrong and what would be right. Exit 2."""


class PlanError(RequestError):
    """Points of a sweep that cannot be served: a line for the sweep, and an indented one for each of them. Exit 2."""


class SweepFailed(RuntimeError):  # noqa: N818
    """Points of a sweep failed, and all of it has been said. Exit 1."""


class PointError(RuntimeError):
    """The point was a fair request and failed while running; its result records this sentence. Exit 1."""


class WriteError(PointError):
    """What a point measured, or its checkpoint, could not be written; `result` is what is known of it. Exit 1."""

    def __init__(self, result: Result, message: str | None = None) -> None:
        super().__init__(message or result.error or "")
        self.result = result


def unknown(kind: str, given: str, choices: Iterable[str]) -> RequestError:
    """`unknown("quantizer", "sink", ["rtn", "sinq"])` -> unknown quantizer 'sink'; did you mean 'sinq'? ..."""
    choices = sorted(choices)
    close = difflib.get_close_matches(given, choices, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return RequestError(f"unknown {kind} '{given}'{hint} choose from: {', '.join(choices)}")
