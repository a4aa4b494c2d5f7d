"""The HTML page: one file that works offline, with everything it needs inside.

The tables are written here, by a template that escapes every string; DataTables makes them sortable and filterable, and
Observable Plot draws from a JSON block. The page's own Content-Security-Policy allows the inlined scripts by their
hashes and nothing else: no network, and no script that a result file might smuggle in.

Per-layer errors of a thousand results are the bulk of the data, so a layer takes two bytes: the logarithm of its
relative error in steps of 0.06 %.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from qbench import __version__
from qbench.record.quality import histogram_edges
from qbench.record.quantization import LayerRow
from qbench.record.result import Result
from qbench.report import anatomy
from qbench.report.anatomy import Anatomy
from qbench.report.board import Row, Section
from qbench.report.columns import LEGEND, MARKS, Column, columns, command, text
from qbench.report.published import Published
from qbench.report.table import finite, plain

SCRIPTS = (
    "vendor/jquery.slim.min.js",
    "vendor/dataTables.min.js",
    "vendor/d3.min.js",
    "vendor/plot.umd.min.js",
    "page.js",
)
SMALLEST, STEPS = 1e-6, 4000  # an error e is stored as round(1 + STEPS * log10(e / SMALLEST)); 0 is an exact layer


def page(
    sections: Sequence[Section],
    failed: Sequence[Result],
    problems: Sequence[str],
    published: Sequence[Published] = (),
    anatomies: Sequence[Anatomy] = (),
) -> str:
    """The whole page as one string."""
    files = resources.files("qbench.report")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["plain"] = plain
    template = environment.from_string(files.joinpath("page.html.j2").read_text(encoding="utf-8"))
    scripts = [_inline(files.joinpath(name).read_text(encoding="utf-8")) for name in SCRIPTS]
    layouts = Layouts()
    data = [_data(section, layouts) for section in sections]
    return template.render(
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        sections=[_table(section, published) for section in sections],
        anatomies=[anatomy.table(one) for one in anatomies],
        failed=[{"command": " ".join(["python -m qbench", *r.command]), "error": r.error or ""} for r in failed],
        problems=list(problems),
        legend=LEGEND,
        style=Markup(files.joinpath("page.css").read_text(encoding="utf-8")),
        scripts=scripts,
        hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
        data=_json(
            {
                "sections": data,
                "layouts": layouts.listed,
                "anatomies": [anatomy.drawn(one) for one in anatomies],
                "smallest": SMALLEST,
                "steps": STEPS,
                "edges": np.log10(histogram_edges()[1:-1]).round(6).tolist(),
            }
        ),
    )


def _inline(script: str) -> Markup:
    """A script of this package; it must not hold what would end its element."""
    script = f"\n{script.strip()}\n".replace("\r\n", "\n")
    if re.search(r"</script|<!--", script, re.IGNORECASE):
        raise ValueError("a script that is to be inlined holds </script or <!--")
    return Markup(script)


def _json(value: Any) -> Markup:
    """JSON that is safe inside a script element: no character in it can end the element or start a comment."""
    dumped = json.dumps(finite(value), separators=(",", ":"), allow_nan=False)  # ASCII only
    return Markup(dumped.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _table(section: Section, published: Sequence[Published]) -> dict[str, Any]:
    shown = [c for c in columns(section, published) if c.people and any(text(c, row) for row in section.rows)]
    return {
        "title": section.title,
        "note": section.note,
        "baseline": section.baseline,
        "sentences": section.sentences,
        "columns": [{"key": c.key, "title": c.title, "numeric": c.digits is not None} for c in shown],
        "rows": [
            {"cells": [_cell(column, row) for column in shown], "command": command(row), "front": row.front}
            for row in section.rows
        ],
        "methods": sorted({row.entry.quantizer for row in section.rows}),
        "bits": sorted({str(row.entry.bits) for row in section.rows}),
    }


def _cell(column: Column, row: Row) -> dict[str, Any]:
    value = column.value(row)
    if column.key == "front":
        value = list(MARKS).index(row.front) if row.front in MARKS else len(MARKS)
    elif column.key == "interval":
        value = row.score.number.delta_low
    elif isinstance(value, str):
        value = plain(value)
    return {"text": plain(text(column, row)), "order": value if value is not None else ""}


def _data(section: Section, layouts: Layouts) -> dict[str, Any]:
    """What the plots draw: one list per row, in the order of the table's rows."""
    rows = []
    for row in section.rows:
        quantization = row.entry.result.quantization
        assert quantization is not None
        layout, errors = layouts.add(quantization.layers)
        rows.append(
            {
                "label": _label(row),
                "method": plain(row.entry.quantizer),
                "bits": plain(str(row.entry.bits)),
                "front": row.front,
                "rank": row.rank,
                "quality": row.score.value,
                "loss": row.score.loss,
                "low": _beside_baseline(row.score.number.baseline, row.score.number.delta_low),
                "high": _beside_baseline(row.score.number.baseline, row.score.number.delta_high),
                "bpw": quantization.bits_per_weight,
                "megabytes": quantization.model_bytes / 1e6,
                "seconds": quantization.quant_seconds,
                "layout": layout,
                "errors": errors,
                "floor": row.floor,
                "kl": _histogram(row),
                "confidence": _parts(row, "by_confidence"),
                "position": _parts(row, "by_position"),
            }
        )
    metric = plain(section.number.called)
    return {"metric": metric, "baseline": section.baseline, "floor": section.floor, "rows": rows}


def _histogram(row: Row) -> list[float] | None:
    """Shares of the positions by KL, in the bins of `histogram_edges`; None where there is none, or only zeros."""
    counts = [] if row.score.divergence is None else row.score.divergence.kl_histogram
    return [round(count / sum(counts), 6) for count in counts] if sum(counts[1:]) else None


def _parts(row: Row, name: str) -> list[list[float | None]]:
    """`[[middle, KL, share of changed top tokens], ...]` of the buckets of confidence, or parts of the window."""
    parts = [] if row.score.divergence is None else getattr(row.score.divergence, name)
    return [[(part.low + part.high) / 2, part.kl, part.top1_changed] for part in parts]


def _beside_baseline(baseline: float | None, bound: float | None) -> float | None:
    """Where a bound of the difference lies on the axis of the quality itself."""
    return None if baseline is None or bound is None else baseline + bound


def _label(row: Row) -> str:
    group = row.entry.settings.get("quantizer.group_size")
    parts = [row.entry.quantizer, f"{row.entry.bits} bit", *([f"g{group}"] if group else [])]
    return plain(" ".join([*parts, *(f"{key}={value}" for key, value in row.options.items())]), 80)


class Layouts:
    """The layer names that results share, each list stored once: `[[kinds], [kind of a layer], [depth of a layer]]`."""

    def __init__(self) -> None:
        self.listed: list[list[Any]] = []
        self._known: dict[tuple[str, ...], tuple[int, np.ndarray]] = {}

    def add(self, layers: Sequence[LayerRow]) -> tuple[int | None, str]:
        """The number of the layers' layout and their errors, in its order, as base64 of little-endian uint16.

        The experts of one block are drawn as one: the root of their mean squared error.
        """
        if not layers:
            return None, ""
        names = tuple(row.name for row in layers)
        if names not in self._known:
            self._known[names] = self._new(names)
        number, place = self._known[names]
        count = len(self.listed[number][1])
        with np.errstate(all="ignore"):
            squares = np.bincount(place, np.square([row.relative_error for row in layers]), minlength=count)
            errors = np.sqrt(squares / np.bincount(place, minlength=count))
            codes = np.where(errors < SMALLEST, 0, 1 + np.rint(STEPS * np.log10(errors / SMALLEST)))
        codes = np.clip(np.nan_to_num(codes, nan=65535, posinf=65535), 0, 65535).astype("<u2")
        return number, base64.b64encode(codes.tobytes()).decode()

    def _new(self, names: tuple[str, ...]) -> tuple[int, np.ndarray]:
        merged = [re.sub(r"\.experts\.\d+\.", ".experts.*.", name) for name in names]
        distinct = list(dict.fromkeys(merged))
        split = [re.match(r"(?:.*?\.)?(\d+)\.(.*)", name, re.DOTALL) for name in distinct]
        kinds = [plain(found[2] if found else name) for found, name in zip(split, distinct, strict=True)]
        depths = [min(int(found[1][:6]), 10**6) if found else 0 for found in split]
        listed = list(dict.fromkeys(kinds))
        self.listed.append([listed, [listed.index(kind) for kind in kinds], depths])
        index = {name: i for i, name in enumerate(distinct)}
        return len(self.listed) - 1, np.array([index[name] for name in merged])
