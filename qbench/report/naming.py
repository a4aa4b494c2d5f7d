"""What people read of an identity: the words of `--where`, the settings in which rows differ, titles told apart.

Nothing here decides what is the same measurement: that is qbench/record/identity.py. Names may be equal where the
identities are not, so whatever carries a name also says what else is different.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qbench.record.result import Result

SHORT = 8  # characters of a hash
FOR_PEOPLE = ("model", "task", "calibration")  # groups of the configuration whose other keys may be asked for as well
OF_ITSELF = ("weights", "dtype", "device")  # facts that need no key before their value


def words(result: Result) -> dict[str, Any]:
    """What `--where` may ask for, flat: the identity, and what the configuration says of model and texts besides.

    Paths are no words, since a file that is moved is the same file, nor is the calibration of a method without any.
    """
    groups = [name for name in FOR_PEOPLE if name != "calibration" or result.identity.calibration is not None]
    config = {name: result.config.get(name) for name in groups}
    named = {key: value for key, value in _flatten(config) if not key.endswith("path")}
    if result.model is not None:
        named["model.name"] = result.model.name
    return named | result.identity.flat()


def described(result: Result) -> dict[str, Any]:
    """The identity, flat, with texts called by the name of their file and the start of their hash."""
    flat = result.identity.flat()
    calibration = result.quantization.calibration if result.quantization is not None else None
    sources = {"task": {record.text_source for record in (*result.evaluation, *result.tasks)}}
    sources["calibration"] = {calibration.text_source} if calibration is not None else set()
    for group, names in sources.items():
        if (sha256 := flat.pop(f"{group}.text_sha256", None)) is not None:
            flat[f"{group}.text"] = f"{'+'.join(sorted(names))}@{str(sha256)[:SHORT]}"
    return flat


def short(fingerprints: Iterable[str]) -> dict[str, str]:
    """Each fingerprint of a model with a word for it; the whole of it where two words would be equal."""
    found = {fingerprint: _short(fingerprint) for fingerprint in fingerprints}
    taken = Counter(found.values())
    return {fingerprint: word if taken[word] == 1 else fingerprint for fingerprint, word in found.items()}


def _short(fingerprint: str) -> str:
    """`seed1` of `random:1:dense:seed1`, `ORG/NAME@604d5664` of a Hub repository's commit, `9f86d081` of a hash."""
    last = fingerprint.rpartition(":")[2]
    name, at, commit = last.rpartition("@")
    if re.fullmatch(r"[0-9a-f]{16,}", commit):
        return f"{name}{at}{commit[:SHORT]}"
    return last


def tell_apart(titles: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The titles in their order; equal ones followed by the facts in which they differ, in parentheses."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for title, mine in zip(titles, facts, strict=True):
        groups.setdefault(title, []).append(mine)
    told = []
    for title, mine in zip(titles, facts, strict=True):
        same = groups[title]
        keys = [key for key in mine if any(repr(other.get(key)) != repr(mine[key]) for other in same)]
        differ = [str(mine[k]) if k in OF_ITSELF else f"{k}={mine[k]}" for k in keys if mine[k] is not None]
        told.append(f"{title} ({', '.join(differ)})" if differ else title)
    return told


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flatten(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
