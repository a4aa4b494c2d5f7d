"""`files=DIR/*` and `quantizer.path=DIR/*.gguf` in a sweep: a value for every file and folder that matches."""

from __future__ import annotations

import glob

from hydra.core.override_parser.types import Quote, QuotedString

from qbench.errors import RequestError
from qbench.request.overrides import parse

KEYS = ("files", "quantizer.path")
MAGIC = {"*", "?"}  # and no brackets, which names of files have


def spelled_out(argument: str) -> str:
    """The argument with the paths that its patterns match, in the order of the alphabet.

    Raises RequestError for a pattern that matches nothing.
    """
    key, equals, _ = argument.partition("=")
    if key.lstrip("+") not in KEYS or not equals or not MAGIC & set(argument):
        return argument
    override = parse(argument)
    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    found: list[str] = []
    for value in map(str, values):
        matching = sorted(glob.glob(value.replace("[", "[[]"))) if MAGIC & set(value) else [value]
        if not matching:
            raise RequestError(f"{key}={value} matches no file", key=key)
        found += matching
    words = [QuotedString(path, Quote.double).with_quotes() for path in found]
    return f"{key}=choice({','.join(words)})"
