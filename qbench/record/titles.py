"""Titles of sections, histories and plots: names, and what tells those apart that carry the same names.

Names may be equal where what they stand for is not, so a title that is there twice also says what is different.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SHORT = 8  # characters of a hash
OF_ITSELF = ("weights", "dtype", "device")  # facts that need no key before their value


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
