"""The trade-off plot of a sweep as an image: a number over bits per weight, one plot per model, protocol and number."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from qbench.record.quality import MetricRecord
from qbench.record.result import Result
from qbench.record.titles import SHORT, short, tell_apart
from qbench.track.tracker import without_places

SIZE_INCHES, DOTS_PER_INCH = (7.0, 4.5), 130
Point = tuple[Result, MetricRecord]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (size, loss) that no other beats in one and matches in the other, by size."""
    kept: list[tuple[float, float]] = []
    for size, loss in sorted(set(points)):
        if not kept or loss < kept[-1][1]:
            kept.append((size, loss))
    return kept


def plots(results: Sequence[Result]) -> dict[str, Any]:
    """Title -> PIL image for every model, protocol and number that is finite; needs matplotlib.

    One plot holds what has one original and one text, whatever they are called.
    """
    sections: dict[tuple[str, ...], list[Point]] = {}
    for result in results:
        for protocol, text, number in result.numbers():
            if math.isfinite(number.value) and result.quantization is not None:
                of = result.identity
                key = (protocol, number.called, str(of.weights), str(of.device), str(of.dtype), text)
                sections.setdefault(key, []).append((result, number))
    words = short(weights for _, _, weights, *_ in sections)
    facts = [
        {"weights": words[weights], "device": device, "dtype": dtype, "text": text[:SHORT]}
        for _, _, weights, device, dtype, text in sections
    ]
    names = [
        without_places(f"{section[-1][0].config['model']['name']}, {protocol}, {called}")
        for (protocol, called, *_), section in sections.items()
    ]
    titled = zip(tell_apart(names, facts), sections.values(), strict=True)
    return {title: _plot(title, section) for title, section in titled}


def _plot(title: str, section: Sequence[Point]) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state
    from PIL import Image

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    last = section[-1][1]  # the others are of the same kind
    for method in sorted({_method(result) for result, _ in section}):
        mine = [(_bits(result), number) for result, number in section if _method(result) == method]
        xs, numbers = zip(*mine, strict=True)
        reach = [[_reach(n, n.delta_low, -1) for n in numbers], [_reach(n, n.delta_high, 1) for n in numbers]]
        axes.errorbar(xs, [n.value for n in numbers], yerr=reach, fmt="o", capsize=3, label=method)
    xs, losses = zip(*front([(_bits(result), number.loss) for result, number in section]), strict=True)
    heights = [-loss if last.higher_is_better else loss for loss in losses]
    axes.plot(xs, heights, color="black", linewidth=0.8, zorder=0, label="best trade-offs")
    originals = [number.baseline for _, number in section if number.baseline is not None]
    if originals:
        axes.axhline(originals[-1], color="grey", linestyle="--", linewidth=0.8, label="16 bit")
    axes.set(title=title, xlabel="bits per weight, codes and aux as stored", ylabel=last.called)
    axes.legend(fontsize="small")
    written = io.BytesIO()
    figure.savefig(written, format="png")
    written.seek(0)
    return Image.open(written)


def _method(result: Result) -> str:
    return result.identity.method


def _bits(result: Result) -> float:
    assert result.quantization is not None
    return result.quantization.bits_per_weight


def _reach(number: MetricRecord, bound: float | None, sign: int) -> float:
    """From the number to the bound of its paired 95 % interval; 0 without one."""
    return 0.0 if bound is None or number.delta is None else max(0.0, sign * (bound - number.delta))
