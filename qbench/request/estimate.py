"""What a sweep would do, and how large each quantized model would be, without loading or quantizing one.

The model is built from its configuration without storage (torch's meta device), which gives every shape. What a
quantizer stores for a weight `[out, in]` is a * out * in + b * in + c * out + d bytes (codes and group scales, input
scales, row scales, codebook); the four are solved from four small random matrices that it really quantizes. That
knows nothing of any method, so it serves third parties' too. One that refuses those matrices may still suit the
model's, so its points stay in the plan, without a size.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qbench.errors import PointError
from qbench.layers.expert_form import expert_weights
from qbench.model import coverage
from qbench.model.linears import Linears, find_linears, matrix
from qbench.model.readers import mark_read_weights, mark_without_storage
from qbench.quant.original import BITS_PER_WEIGHT, Original
from qbench.quant.quantizer import InputStatistics, Quantizer
from qbench.sources.source import Source

if TYPE_CHECKING:
    from qbench.sweep.plan import Planned


def show_plan(plan: Sequence[Planned]) -> dict[str, Any]:
    """Prints one row per point to stderr; returns the same as what JSON holds. A size that is not known is None.

    Below the rows is a sentence for what stays in 16 bit of each model, and for each quantizer that failed on the
    random matrices.
    """
    skeletons: dict[str, Skeleton | None] = {}
    failures: dict[str, None] = {}  # sentences; a set that keeps its order
    table = Table(box=None, pad_edge=False)
    for name in ("point", "run", "state", "bits/weight", "model, MB", "coverage"):
        table.add_column(name, justify="left" if name in ("point", "run", "state") else "right")
    rows = []
    for planned in plan:
        point, source = planned.point, planned.point.model
        if (key := repr(source)) not in skeletons:
            skeletons[key] = _skeleton(source)
        skeleton = skeletons[key]
        covered, refused = None, None
        if skeleton and point.quantizer and not isinstance(point.quantizer, Original):
            covered, refused = coverage.planned(skeleton.found, point.config.runtime.min_coverage)
            failures |= dict.fromkeys(coverage.sentences(source.name, skeleton.found, refused))
        try:
            size = skeleton and skeleton.shapes and point.quantizer
            size = size and model_bytes(point.quantizer, skeleton.parameters, skeleton.shapes)
        except PointError as error:
            size = None
            failures[f"quantizer={point.config.quantizer['name']}: {error}"] = None
        state = "recorded" if planned.recorded else "will fail" if refused else "to run"
        bits, packed = size or (None, None)
        rows.append(
            {"point": planned.label, "run_id": point.run_id, "state": state, "estimated_model_bytes": packed}
            | {"estimated_bits_per_weight": bits and round(bits, 4), "coverage": covered, "refused": refused}
        )
        cells = (f"{bits:.3f}", f"{packed / 1e6:.1f}") if size else ("?", "?")
        table.add_row(Text(planned.label), point.run_id, state, *cells, "?" if covered is None else f"{covered:.1%}")
    Console(file=sys.stderr, highlight=False, width=None if sys.stderr.isatty() else 160).print(table)
    for sentence in failures:
        print(sentence, file=sys.stderr)
    recorded = sum(planned.recorded is not None for planned in plan)
    print(
        f"{len(plan)} points, {recorded} recorded already, {len(plan) - recorded} to run; nothing was run",
        file=sys.stderr,
    )
    return {"points": len(plan), "recorded": recorded, "to_run": len(plan) - recorded, "plan": rows}


def model_bytes(quantizer: Quantizer, parameters: int, shapes: Counter[tuple[int, int]]) -> tuple[float, int]:
    """Estimated bits per weight of the linears, and bytes of the whole model with everything else at 16 bit.

    `shapes` counts the linears of each `[out, in]`. Raises PointError when the quantizer fails on a random matrix.
    """
    if isinstance(quantizer, Original):
        return BITS_PER_WEIGHT, 2 * parameters
    a, b, c, d = _coefficients(quantizer)
    weights = sum(rows * columns * count for (rows, columns), count in shapes.items())
    packed = sum((a * o * i + b * i + c * o + d) * count for (o, i), count in shapes.items())
    return 8 * packed / weights, round(packed + 2 * (parameters - weights))


def _coefficients(quantizer: Quantizer) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    group_size = getattr(quantizer, "group_size", 64)
    width = 64 if group_size == -1 else group_size
    terms, sizes = [], []
    for rows in (64, 128):
        for columns in (2 * width, 4 * width):
            weight = torch.randn(rows, columns, generator=generator)
            x = torch.randn(4 * width, columns, generator=generator)
            statistics = InputStatistics(len(x), absmean=x.abs().mean(0), inputs=x, hessian=x.T @ x)
            try:
                (packed,) = quantizer.quantize([weight], statistics)
                sizes.append(packed.nbytes)
            except Exception as error:  # anything at all: it is a third party's code
                raise PointError(
                    f"its size is not known, since {type(quantizer).__name__} fails on a random matrix "
                    f"[{rows}, {columns}] with {type(error).__name__}: {' '.join(str(error).split())}"
                ) from error
            terms.append([rows * columns, columns, rows, 1])
    return np.linalg.solve(np.array(terms, dtype=float), np.array(sizes, dtype=float))


@dataclass(frozen=True)
class Skeleton:
    """What a model's configuration says of its weights."""

    parameters: int  # tied ones once
    shapes: Counter[tuple[int, int]]  # how often a quantizable weight `[out, in]` occurs
    found: Linears


def _skeleton(source: Source) -> Skeleton | None:
    """What will be quantized of a model; None if its configuration is not here."""
    model = source.skeleton()
    if model is None:
        return None
    if next(model.parameters()).is_meta:
        mark_without_storage(model)
    else:
        mark_read_weights(model)
    found = find_linears(model)
    shapes = Counter(tuple(matrix(layer).shape) for layer in found.layers.values())
    for module in found.experts.values():
        for weight in expert_weights(module, 0):
            shapes[tuple(weight.shape)] += module.num_experts
    return Skeleton(sum(p.numel() for p in model.parameters()), shapes, found)
