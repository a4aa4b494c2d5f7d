"""Parts of a model, by the names of its linears: all of it, a kind of linear, a block, a single linear.

A linear `model.layers.3.mlp.down_proj` lies in block 3 and is of the kind `mlp.down_proj`; the experts of one block are
of one kind, `mlp.experts.*.gate_proj`. A part is written as a pattern of names, in which `*` stands for anything:

    *                                all linears            Part(None, None)
    *.mlp.down_proj                  a kind                 Part("mlp.down_proj", None)
    model.layers.3.*                 a block                Part(None, 3)
    model.layers.3.mlp.down_proj     a single linear        Part("mlp.down_proj", 3)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

WHOLE = "*"
EACH = ("kinds", "blocks", "linears")  # what `patterns` divides a model into


class Part(NamedTuple):
    kind: str | None  # None: of every kind
    block: int | None  # None: in every block

    @property
    def level(self) -> str:
        """whole, kind, block or linear."""
        if self.block is None:
            return "whole" if self.kind is None else "kind"
        return "block" if self.kind is None else "linear"


def place(name: str) -> Part:
    """The kind and the block of a linear; the block is None for one that lies in no numbered block."""
    merged = re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
    found = re.match(r"(?:.*?\.)?(\d{1,6})\.(.*)", merged, re.DOTALL)
    return Part(found[2], int(found[1])) if found else Part(merged, None)


def part_of(pattern: str) -> Part | None:
    """The part that a pattern names; None for a pattern of another form."""
    if pattern == WHOLE:
        return Part(None, None)
    found = re.fullmatch(r"(?:[\w.*]*?\.)?(\d{1,6})\.([\w.*]+)", pattern)
    if found is not None:
        kind = found[2]
        return Part(None, int(found[1])) if kind == "*" else Part(kind, int(found[1])) if _is_kind(kind) else None
    kind = pattern.removeprefix("*.")
    return Part(kind, None) if kind != pattern and _is_kind(kind) else None


def cells(measured: Mapping[Part, float], wanted: Collection[Part]) -> tuple[dict[Part, float], bool] | None:
    """What each linear of `wanted` adds, of what parts were `measured` to add, and whether it was measured itself.

    Where single linears were not, the margins are put together as if kinds and blocks were independent: kind k in block
    b adds what k adds times what b adds, over the sum. None where neither all linears nor all margins are known.
    """
    if all(part in measured for part in wanted):
        return {part: max(0.0, measured[part]) for part in wanted}, True
    kinds = {part.kind: measured.get(Part(part.kind, None)) for part in wanted}
    blocks = {part.block: measured.get(Part(None, part.block)) for part in wanted}
    if None in kinds.values() or None in blocks.values():
        return None
    of = {key: max(0.0, value) for key, value in (kinds | blocks).items() if value is not None}
    total = (sum(of[kind] for kind in kinds) + sum(of[block] for block in blocks)) / 2
    return {part: of[part.kind] * of[part.block] / total if total else 0.0 for part in wanted}, False


def _is_kind(text: str) -> bool:
    return re.fullmatch(r"\w+(\.(\w+|\*(?=\.)))*", text) is not None


def patterns(names: Iterable[str], each: str) -> list[str]:
    """The patterns of the kinds, the blocks or the single linears among `names`, in the order of the model."""
    found: dict[str, None] = {}
    for name in names:
        kind, block = place(name)
        if each == "linears":
            found[re.sub(r"\.experts\.\d+\.", ".experts.*.", name)] = None
        elif block is not None:
            prefix = re.match(r"(?:.*?\.)?\d+\.", name)
            found[f"*.{kind}" if each == "kinds" else f"{prefix[0]}*"] = None  # type: ignore[index]
    return list(found)
