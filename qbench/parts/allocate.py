"""Bits for each linear from the anatomies that are recorded: which KL each choice would add, and which choices fit.

An anatomy of a model at one number of bits is the KL of each kind of linear and of each block alone, or of each single
linear, and the whole, whose rows say what every linear takes in bytes (quantizer=partly, experiment=anatomy). It serves
a request for the same method and settings, model and text, under any protocol; of several the one under the request's
own, else the one scored on most tokens. What was not measured linear by linear is put together from the margins
(record/parts.py); of kinds alone, or of blocks alone, each of their linears has an equal share. The KL of several parts
is taken as their sum; how far that holds is what an anatomy's table says (report/anatomy.py).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from qbench.errors import RequestError
from qbench.parts.knapsack import choose
from qbench.parts.mixed import Mixed, written
from qbench.record.parts import Part, cells, part_of, place
from qbench.record.result import Result, ResultError

Cells = dict[Part, float]  # by kind and block
FINENESS = ("linears", "kinds", "blocks")  # what a KL by kind and block may be made of


@dataclass
class Anatomy:
    """What one method with one number of bits did to each part of a model, by the KL in nats."""

    tokens: int = 0
    kl: dict[Part, float] = field(default_factory=dict)
    bytes: dict[Part, int] = field(default_factory=dict)  # stored, by kind and block; of the whole's rows
    weights: int = 0

    def cells(self, by: str) -> Cells | None:
        """The KL by kind and block, from `linears` (or both margins), `kinds` or `blocks` alone; None: not measured."""
        if not self.bytes:
            return None
        if by == "linears":
            found = cells(self.kl, self.bytes)
            return None if found is None else found[0]
        margin = [Part(kind, None) if by == "kinds" else Part(None, block) for kind, block in self.bytes]
        if not all(part in self.kl for part in margin):
            return None
        return {p: max(0.0, self.kl[m]) / margin.count(m) for p, m in zip(self.bytes, margin, strict=True)}


def by_bits(found: Mapping[int, Anatomy]) -> dict[int, Cells]:
    """The KL by kind and block for each number of bits, all from parts of one fineness: the finest that most have."""
    usable = [
        {nbits: got for nbits, each in sorted(found.items()) if (got := each.cells(by)) is not None} for by in FINENESS
    ]
    return max(usable, key=len)


def resolved(
    mixed: Mixed,
    results: Path,
    weights: str,
    text_sha256: str,
    protocol: Mapping[str, Any],
    transform: Mapping[str, Any] | None = None,
) -> Mixed:
    """The quantizer with the assignment that its budget buys, by the anatomies below `results`.

    `weights` is the model's fingerprint, `protocol` the request's settings of it, `transform` likewise, None for none.
    Raises RequestError when no anatomy of the model and the text at two numbers of bits is recorded, or when the budget
    is below the fewest of them.
    """
    found = _chosen(mixed, results, weights, text_sha256, protocol, transform)
    usable = by_bits(found)
    if len(usable) < 2:
        which = f"that of {' and '.join(map(str, usable))} bits alone" if usable else "none"
        raise RequestError(
            f"quantizer=mixed chooses by anatomies of the method, the model and the text at two or more numbers of "
            f"bits, and {which} is recorded in {results.parent}; measure them: python -m qbench -m experiment=anatomy "
            f"quantizer.method={mixed.method} quantizer.nbits=2,3,4 with the same model and task, or say "
            "quantizer.assignment"
        )
    widths = list(usable)
    parts = list(usable[widths[0]])
    costs = [[found[nbits].bytes[part] for nbits in widths] for part in parts]
    total = found[widths[0]].weights
    assert mixed.budget_bits is not None
    try:
        chosen = choose(
            [[usable[nbits][part] for nbits in widths] for part in parts], costs, int(mixed.budget_bits * total / 8)
        )
    except ValueError:
        least = 8 * sum(min(each) for each in costs) / total
        raise RequestError(
            f"quantizer.budget_bits={mixed.budget_bits:g} is less than the {least:.3g} bits per weight that all "
            f"linears at {widths[0]} bits take, scales included; ask for more"
        ) from None
    bits = {part: widths[j] for part, j in zip(parts, chosen, strict=True)}
    return replace(mixed, assignment=written(bits))


def _chosen(
    mixed: Mixed,
    results: Path,
    weights: str,
    text_sha256: str,
    protocol: Mapping[str, Any],
    transform: Mapping[str, Any] | None,
) -> dict[int, Anatomy]:
    """Number of bits -> its anatomy, all from one protocol, precision and device."""
    wanted = {k: v for k, v in mixed.settings().items() if k != "assignment"}
    groups: dict[str, dict[int, Anatomy]] = defaultdict(lambda: defaultdict(Anatomy))
    same: set[str] = set()
    for result in _of_parts(results):
        identity, settings = result.identity, dict(result.identity.quantizer)
        part, nbits = part_of(str(settings.pop("only"))), settings.pop("nbits", None)
        settings.pop("name")
        if part is None or nbits is None or settings != wanted:
            continue
        if (identity.weights, identity.text_sha256, identity.transform) != (weights, text_sha256, transform):
            continue
        records = [record for record in result.evaluation if record.divergence is not None]
        if not records or result.quantization is None:
            continue
        key = json.dumps(
            [identity.protocol, identity.dtype, identity.device, identity.runtime, identity.calibration], sort_keys=True
        )
        if identity.protocol == dict(protocol):
            same.add(key)
        anatomy = groups[key][int(nbits)]
        anatomy.kl[part] = records[0].divergence.kl.value
        anatomy.tokens = records[0].scored_tokens
        if part.level == "whole":
            anatomy.weights = sum(prod(row.shape) for row in result.quantization.layers)
            anatomy.bytes = {}
            for row in result.quantization.layers:
                anatomy.bytes[place(row.name)] = anatomy.bytes.get(place(row.name), 0) + row.packed_bytes

    def rank(key: str) -> tuple[bool, bool, int]:
        complete = by_bits(groups[key])
        return len(complete) > 1, key in same, max((groups[key][nbits].tokens for nbits in complete), default=0)

    return dict(groups[max(groups, key=rank)]) if groups else {}


def _of_parts(results: Path) -> Iterator[Result]:
    """The recorded points of quantizer=partly that can be read."""
    for path in sorted(results.glob("*/result.json")):
        try:
            content = path.read_bytes()
            if b'"partly"' not in content:
                continue
            result = Result.from_json(content, str(path))
        except (OSError, ResultError):
            continue
        if result.status == "ok" and result.identity is not None and result.identity.quantizer.get("name") == "partly":
            yield result
