"""Whether a setting's value is of the type that its dataclass declares, said in one sentence that names the setting.

The types are those that YAML and a command line can say: int, float, str, bool, None, list, tuple, dict and Literal,
alone or joined by `|`. A field of another type is left to its class.
"""

from __future__ import annotations

import math
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from qbench.errors import RequestError

WORDS = {int: "whole number", float: "number", str: "text", bool: "truth value", dict: "mapping"}
MANY = {int: "whole numbers", float: "numbers", str: "texts", bool: "truth values", dict: "mappings"}


def typed(key: str, value: Any, wanted: Any) -> Any:
    """`value` as a value of the type `wanted`: 2 is a number, and 2024 as a folder's name is the text "2024".

    Raises RequestError, naming `key`, for a value that is not of the type: `model.seed: 'abc' is no whole number`.
    """
    fits, found = _convert(value, wanted)
    if not fits:
        whole = isinstance(value, float) and value.is_integer()  # where an int is asked, or it would fit
        sentence = f"{key}: {value!r} is {_none_of(wanted)}{f'; write {int(value)}' if whole else ''}"
        raise RequestError(sentence, key=key, choices=_choices(wanted))
    return found


def _convert(value: Any, wanted: Any) -> tuple[bool, Any]:
    """Whether the value is of the type, and the value as one."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        exact = [_convert(value, kind) for kind in inner if get_origin(kind) is None and type(value) is kind]
        return next(
            (found for found in (*exact, *(_convert(value, kind) for kind in inner)) if found[0]), (False, None)
        )
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner), value
    if (origin or wanted) in (list, tuple):
        if not isinstance(value, list | tuple):
            return False, None
        if not inner:
            return True, value
        elementwise = len(inner) == 1 or inner[-1] is Ellipsis
        if not elementwise and len(inner) != len(value):
            return False, None
        kinds = [inner[0]] * len(value) if elementwise else inner
        found = [_convert(element, kind) for element, kind in zip(value, kinds, strict=True)]
        return all(fits for fits, _ in found), (origin or wanted)(element for _, element in found)
    if (origin or wanted) is dict:
        return isinstance(value, dict), value
    if wanted in (None, NoneType):
        return value is None, None
    if wanted is bool:
        return isinstance(value, bool), value
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value), value
    if wanted is str:
        if isinstance(value, int | float) and not isinstance(value, bool):  # what YAML takes for a number
            return True, str(value)
        return isinstance(value, str), value
    return True, value


def _choices(wanted: Any) -> list[str]:
    """What a value of the type could be, as YAML writes it, where that is a list."""
    if get_origin(wanted) is Literal:
        return [str(choice) for choice in get_args(wanted)]
    return ["true", "false"] if wanted is bool else []


def _none_of(wanted: Any) -> str:
    """What a value that is not of the type is: `no whole number`, `no number, and not null`."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        others = [kind for kind in inner if kind is not NoneType]
        parts = [_none_of(kind) for kind in others] + (["not null"] if NoneType in inner else [])
        return " and ".join(parts)
    if origin is Literal:
        return f"none of {', '.join(map(repr, inner))}"
    if (origin or wanted) in (list, tuple):
        of = MANY.get(inner[0]) if inner else None
        length = f" {len(inner)}" if origin is tuple and inner and inner[-1] is not Ellipsis else ""
        return f"no list of{length} {of}" if of else "no list"
    return "neither true nor false" if wanted is bool else f"no {WORDS.get(origin or wanted, 'value of its type')}"


def is_pattern(path: str) -> bool:
    """Whether a path has `*` or `?`; brackets make none, since names of files have them."""
    return not {"*", "?"}.isdisjoint(path)
