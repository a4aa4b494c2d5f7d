"""The two ways a point can end badly, and the sentence that lists the legal choices.

The sentence is for a person. What a program or a test asks for is beside it: `key`, the setting that is wrong as the
command line calls it (`quantizer.nbits`), and `choices`, what it could be. The key is the first setting that the
sentence names, unless the error says another; whoever lists the choices gives them as well (`unknown`, `none_of`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

_NODES = "model|quantizer|transform|task|calibration|runtime|speed|tracker|export|hydra"
_SETTING = re.compile(
    rf"(?<![\w./-])(?:(?:{_NODES})(?!\.safetensors)(?:\.[a-z_]\w*)+(?!\w|[./]\w)"  # task.window; no path, no module
    rf"|(?:{_NODES}|outputs|experiment|hydra/\w+)(?==))"  # outputs=DIR, speed=none
)


def first_setting(sentence: str) -> str | None:
    """`task.window must be at least 2` -> task.window; `speed=x: ...` -> speed."""
    found = _SETTING.search(sentence)
    return found and found.group()


class _OneSentenceError(Exception):
    """One sentence, with the setting that it is about and the legal values, where there are such."""

    def __init__(self, message: str, *, key: str | None = None, choices: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.key = key or first_setting(message)
        self.choices = tuple(choices)


class RequestError(_OneSentenceError, ValueError):
    """What was asked for cannot be done: one sentence that says what is wrong and what would be right. Exit 2."""


class PlanError(RequestError):
    """Points of a sweep that cannot be served: a line for the sweep, and an indented one for each of them. Exit 2.

    Its key is that of all its `errors`, if they have one.
    """

    def __init__(self, message: str, errors: Iterable[RequestError]) -> None:
        super().__init__(message)
        keys = {error.key for error in errors}
        self.key = keys.pop() if len(keys) == 1 else None


class SweepFailed(RuntimeError):  # noqa: N818
    """Points of a sweep failed, and all of it has been said. Exit 1."""


class PointError(_OneSentenceError, RuntimeError):
    """The point was a fair request and failed while running; its result records this sentence. Exit 1."""


class WriteError(PointError):
    """What a point measured, or its checkpoint, could not be written; exit 1.

    `result` is what is known of the point, a record.result.Result.
    """

    def __init__(self, result: Any, message: str | None = None) -> None:
        super().__init__(message or result.error or "")
        self.result = result


def inside(place: Any, error: RequestError) -> RequestError:
    """The refusal of what stands in a file, or below a key."""
    return RequestError(f"{place}: {error}", key=error.key, choices=error.choices)


class ChoiceError(ValueError):
    """A member's own refusal of a setting that has few values, `choices`; registry.make says whose setting it is."""

    def __init__(self, message: str, choices: Iterable[str]) -> None:
        super().__init__(message)
        self.choices = tuple(choices)


def none_of(field: str, given: Any, choices: Iterable[Any]) -> ChoiceError:
    """`none_of("nbits", 5, [2, 3, 4, 8])` -> nbits must be one of 2, 3, 4, 8, got 5"""
    choices = [str(choice) for choice in choices]
    return ChoiceError(f"{field} must be one of {', '.join(choices)}, got {given!r}", choices)


def unknown(kind: str, given: str, choices: Iterable[str]) -> RequestError:
    """`unknown("quantizer", "sink", ["rtn", "sinq"])` -> unknown quantizer 'sink'; did you mean 'sinq'? ...

    The error's key is the kind, or what was given where a key itself is unknown (`kind` starts with the word key).
    """
    choices = sorted(choices)
    close = difflib.get_close_matches(given, choices, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    message = f"unknown {kind} '{given}'{hint} choose from: {', '.join(choices)}"
    return RequestError(message, key=given if kind.split()[0] == "key" else kind, choices=choices)
