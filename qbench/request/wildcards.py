"""`files=DIR/*` and `quantizer.path=DIR/*.gguf` in a sweep: a value for every file and folder that matches."""

from __future__ import annotations

import glob
from collections.abc import Iterable

from hydra.core.override_parser.types import Quote, QuotedString

from qbench.config import Config
from qbench.errors import RequestError
from qbench.request.overrides import parse
from qbench.values import is_pattern

KEYS = ("files", "quantizer.path")


def spelled_out(argument: str) -> str:
    """The argument with the paths that its patterns match, in the order of the alphabet.

    Raises RequestError for a pattern that matches nothing.
    """
    key, equals, _ = argument.partition("=")
    if key.lstrip("+") not in KEYS or not equals or not is_pattern(argument):
        return argument
    override = parse(argument)
    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    found: list[str] = []
    for value in map(str, values):
        matching = sorted(glob.glob(value.replace("[", "[[]"))) if is_pattern(value) else [value]
        if not matching:
            raise RequestError(f"{key}={value} matches no file", key=key)
        if odd := [path for path in matching if not path.isprintable()]:
            raise RequestError(f"{key}={value} matches {odd[0]!r}, a name that no command line has: rename it", key=key)
        found += matching
    words = [QuotedString(path, Quote.double).with_quotes() for path in found]
    return f"{key}=choice({','.join(words)})"


def check_read(configs: Iterable[Config]) -> None:
    """Raises RequestError where `files` is set for points of which none reads a file."""
    asked = list(configs)
    named = next((config.files for config in asked if config.files is not None), None)
    if named is not None and not any(config.quantizer.get("name") == "file" for config in asked):
        raise RequestError(
            f"files={named} is what quantizer=file reads, which is not asked for; add quantizer=file, or sweep over "
            "many files beside our own methods with -m experiment=files",
            key="files",
        )
