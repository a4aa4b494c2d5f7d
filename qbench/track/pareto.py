"""The trade-off plot of a sweep as an image: perplexity over bits per weight, one plot per model and protocol."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qbench.record.titles import SHORT, short, tell_apart

SIZE_INCHES, DOTS_PER_INCH = (7.0, 4.5), 130


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (size, loss) that no other beats in one and matches in the other, by size."""
    kept: list[tuple[float, float]] = []
    for size, loss in sorted(set(points)):
        if not kept or loss < kept[-1][1]:
            kept.append((size, loss))
    return kept


def plots(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Title -> PIL image for every model and protocol of the summaries with a finite perplexity; needs matplotlib.

    One plot holds what has one original and one text, whatever they are called.
    """
    sections: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for summary in summaries:
        if math.isfinite(summary.get("ppl") or math.nan) and summary.get("bits_per_weight") is not None:
            key = tuple(summary.get(part) for part in ("protocol", "fingerprint", "device", "dtype", "text_sha256"))
            sections.setdefault(key, []).append(summary)
    words = short(str(key[1]) for key in sections)
    facts = [
        {"weights": words[str(weights)], "device": device, "dtype": dtype, "text": str(text)[:SHORT]}
        for _, weights, device, dtype, text in sections
    ]
    told = tell_apart([f"{each[-1]['model']}, {each[-1]['protocol']}" for each in sections.values()], facts)
    return {title: _plot(title, section) for title, section in zip(told, sections.values(), strict=True)}


def _plot(title: str, section: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state
    from PIL import Image

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    methods = sorted({str(summary["quantizer"]) for summary in section})
    for method in methods:
        mine = [s for s in section if str(s["quantizer"]) == method]
        xs, ys = [s["bits_per_weight"] for s in mine], [s["ppl"] for s in mine]
        low = [_reach(s, s["ppl_delta_low"], -1) for s in mine]
        high = [_reach(s, s["ppl_delta_high"], 1) for s in mine]
        axes.errorbar(xs, ys, yerr=[low, high], fmt="o", capsize=3, label=method)
    best = front([(s["bits_per_weight"], s["ppl"]) for s in section])
    axes.plot(*zip(*best, strict=True), color="black", linewidth=0.8, zorder=0, label="best trade-offs")
    baselines = [s["baseline_ppl"] for s in section if s.get("baseline_ppl") is not None]
    if baselines:
        axes.axhline(baselines[-1], color="grey", linestyle="--", linewidth=0.8, label="16 bit")
    axes.set(title=title, xlabel="bits per weight, codes and aux as stored", ylabel="perplexity")
    axes.legend(fontsize="small")
    written = io.BytesIO()
    figure.savefig(written, format="png")
    written.seek(0)
    return Image.open(written)


def _reach(summary: Mapping[str, Any], bound: float | None, sign: int) -> float:
    """From the perplexity to the bound of its paired 95 % interval; 0 without one."""
    return 0.0 if bound is None else max(0.0, sign * (bound - summary["ppl_delta"]))
