"""`model=ORG/NAME` names any repository of the Hub, without a YAML of its own: model=hub model.id=ORG/NAME."""

from __future__ import annotations

import re
from collections.abc import Sequence

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """The arguments of one point with each `model=ORG/NAME` in two words, as Hydra can read it.

    A value of another form, such as a list of models that a sweep goes through, is left alone; so is an option of the
    group `model` that lies in a folder. What the command line says of `model.id` itself comes later and wins.
    """
    kept = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        value = value.strip("'\"")
        if key == "model" and REPOSITORY.fullmatch(value) and not _is_option(value):
            kept += ["model=hub", f"model.id={value}"]
        else:
            kept.append(argument)
    return kept


def _is_option(value: str) -> bool:
    from qbench.request.options import options

    return value in options("model")
