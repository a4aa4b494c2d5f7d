"""Writes tables: for the terminal, Markdown, CSV, JSON and LaTeX (booktabs).

Every string comes from a result file that anyone may have written, so it is made harmless here, once per format:
control characters are replaced, long texts shortened where people read, and each format's own syntax escaped.
"""

from __future__ import annotations

import csv
import io
import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len

LONGEST = 60  # characters of a cell that people read


@dataclass(frozen=True)
class Table:
    """A titled table: cells as read by people, values as read by programs, under the same keys."""

    title: str
    facts: dict[str, Any]  # what is true of every row: model, protocol, baseline
    notes: list[str]
    keys: list[str]  # of the values
    values: list[list[Any]]
    titles: list[str]  # of the cells, which may be fewer than the values
    numeric: list[bool]
    cells: list[list[str]]


def write(tables: Sequence[Table], style: str, width: int | None = None) -> str:
    """The tables as one text in a style: table, md, csv, json or tex."""
    return {"table": _columns, "md": _markdown, "csv": _csv, "json": _json, "tex": _latex}[style](tables, width)


def plain(text: str, longest: int | None = LONGEST) -> str:
    """One line without control characters (a terminal would obey them), direction marks or surrogates."""
    kept = text
    if not text.isprintable():
        kept = "".join(
            "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c)[0] == "C" and c != "\u200d" else c for c in text
        )
    return kept if longest is None or len(kept) <= longest else kept[: longest - 1] + "…"


def _columns(tables: Sequence[Table], width: int | None) -> str:
    """As wide as the table, or as many columns from the left as fit into `width` characters."""
    parts = []
    for table in tables:
        shown, body = _aligned(table, width or 10_000)
        notes = list(table.notes)
        if left_out := table.titles[shown:]:
            notes.insert(0, f"No room for: {'; '.join(left_out)}. A wider terminal or another --format shows them.")
        parts.append("\n".join([plain(table.title, 200), "", *body, "", *(plain(note, 500) for note in notes)]))
    return "\n\n".join(parts) + "\n"


def _aligned(table: Table, room: int) -> tuple[int, list[str]]:
    """How many columns fit into `room` characters, and the lines of these: the titles, a rule, the rows."""
    blocks = []
    columns = list(zip(*table.cells, strict=True)) if table.cells else [()] * len(table.titles)
    for title, numeric, cells in zip(table.titles, table.numeric, columns, strict=True):
        texts = [plain(text) for text in (title, *cells)]
        lengths = [cell_len(text) for text in texts]  # in a terminal, where a character may take no place, or two
        widest = max(lengths)
        room -= widest + 2
        if room < 0:
            break
        gaps = [" " * (widest - length) for length in lengths]
        pairs = zip(gaps, texts, strict=True) if numeric else zip(texts, gaps, strict=True)
        blocks.append(["".join(pair) for pair in pairs])
    head, *rows = [f" {'  '.join(line)}" for line in zip(*blocks, strict=True)] or [""]
    return len(blocks), [line.rstrip() for line in (head, " " + "─" * (cell_len(head) - 1), *rows)]


def _markdown(tables: Sequence[Table], _: int | None) -> str:
    parts = []
    for table in tables:
        lines = [f"### {markdown_text(table.title, 200)}", "", *_md_rows(table)]
        lines += [line for note in table.notes for line in ("", markdown_text(note, 500))]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _md_rows(table: Table) -> list[str]:
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    rows = [
        [markdown_text(title) for title in table.titles],
        rule,
        *([markdown_text(cell) for cell in row] for row in table.cells),
    ]
    return ["| " + " | ".join(row) + " |" for row in rows]


def markdown_text(text: str, longest: int = LONGEST) -> str:
    """Markdown without markup: HTML as entities, punctuation that means something behind a backslash."""
    escaped = plain(text, longest).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\|`*[]_#~" else c for c in escaped)


def _csv(tables: Sequence[Table], _: int | None) -> str:
    keys = list(dict.fromkeys(key for table in tables for key in [*table.facts, *table.keys]))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, keys, lineterminator="\n")
    writer.writerow({key: _csv_cell(key) for key in keys})  # a task may have named its metric anything
    for table in tables:
        for row in table.values:
            merged = table.facts | dict(zip(table.keys, row, strict=True))
            writer.writerow({key: _csv_cell(value) for key, value in merged.items()})
    return buffer.getvalue()


def _csv_cell(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = plain(value, None)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _json(tables: Sequence[Table], _: int | None) -> str:
    document = [
        table.facts | {"notes": table.notes, "rows": [dict(zip(table.keys, row, strict=True)) for row in table.values]}
        for table in tables
    ]
    return json.dumps(finite(document), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def _latex(tables: Sequence[Table], _: int | None) -> str:
    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables:
        layout = "".join("r" if numeric else "l" for numeric in table.numeric)
        rows = [" & ".join(map(_tex, row)) + r" \\" for row in table.cells]
        parts += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(table.title, 200)}. {' '.join(_tex(note, 500) for note in table.notes)}}}",
            rf"\begin{{tabular}}{{{layout}}}",
            r"\toprule",
            " & ".join(map(_tex, table.titles)) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    return "\n".join(parts) + "\n"


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "●": r"$\bullet$",
    "○": r"$\circ$",
    "…": r"\ldots{}",
} | {c: f"\\{c}" for c in "&%$#_{}"}


def _tex(text: str, longest: int = LONGEST) -> str:
    """LaTeX that any engine reads: characters outside Latin-1 are named by their number."""
    return "".join(_TEX.get(c) or (c if ord(c) < 256 else f"[U+{ord(c):04X}]") for c in plain(text, longest))
