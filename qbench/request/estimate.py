"""How large things will be, without loading or quantizing a model: what a plan shows and divides passes by.

The model is built from its configuration without storage (torch's meta device), which gives every shape; those of the
commonest architectures are known without that (plain.py). What a quantizer stores for a weight `[out, in]` is
a * out * in + b * in + c * out + d bytes (codes and group scales, input scales, row scales, codebook); the four are
solved from four small random matrices that it really quantizes. That knows nothing of any method, so it serves third
parties' too; one whose sizes are not of that form says them itself, with a method `stored_bytes(out, in)`. One that
refuses those matrices may still suit the model's, so its points stay in the plan, without a size.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from qbench.errors import PointError
from qbench.layers.expert_form import expert_weights, stacked_parameters
from qbench.model import coverage
from qbench.model.blocks import block_of
from qbench.model.linears import block_list, find_linears, matrix
from qbench.model.readers import mark_read_weights, mark_without_storage
from qbench.parts.composed import Composed
from qbench.parts.partly import linears_of_experts
from qbench.quant.original import BITS_PER_WEIGHT, Original
from qbench.quant.quantizer import InputStatistics, Quantizer
from qbench.request import plain
from qbench.request.plain import Skeleton
from qbench.request.prepare import Prepared
from qbench.sources import pretrained
from qbench.sources.shapes import SHAPES, configuration
from qbench.sources.source import Source

BYTES_PER_TOKEN = 4  # of text, as tokenizers of large vocabularies cut English; of a small vocabulary, 1
SMALL_VOCABULARY = 1000


def model_bytes(
    quantizer: Quantizer,
    parameters: int,
    shapes: Counter[tuple[int, int]],
    solve: Callable[[Quantizer], np.ndarray] | None = None,
) -> tuple[float, int]:
    """Estimated bits per weight of the linears, and bytes of the whole model with everything else at 16 bit.

    `shapes` counts the linears of each `[out, in]`; `solve` gives `coefficients`, which it raises the errors of.
    """
    if isinstance(quantizer, Original):
        return BITS_PER_WEIGHT, 2 * parameters
    weights = sum(rows * columns * count for (rows, columns), count in shapes.items())
    if (said := getattr(quantizer, "stored_bytes", None)) is not None:
        packed = sum(said(o, i) * count for (o, i), count in shapes.items())
    else:
        a, b, c, d = (solve or coefficients)(quantizer)
        packed = sum((a * o * i + b * i + c * o + d) * count for (o, i), count in shapes.items())
    return 8 * packed / weights, round(packed + 2 * (parameters - weights))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Over small matrices several threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def coefficients(quantizer: Quantizer) -> np.ndarray:
    """The four of a method, whatever the model. Raises PointError when it fails on a random matrix."""
    generator = torch.Generator().manual_seed(0)
    group_size = getattr(quantizer, "group_size", 64)
    width = 64 if group_size == -1 else group_size
    terms, sizes = [], []
    for rows in (64, 128):
        for columns in (width, 2 * width):
            weight = torch.randn(rows, columns, generator=generator)
            statistics = None
            if quantizer.needs:
                x = torch.randn(2 * width, columns, generator=generator)
                statistics = InputStatistics(
                    len(x), absmean=x.abs().mean(0), inputs=x, hessian=x.T @ x, squares=x.square().mean(0)
                )
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


def skeleton(source: Source) -> Skeleton | None:
    """What will be quantized of a model; None if its configuration is not here.

    Of a plain dense decoder that takes no import of transformers, which is longer than the rest of a plan.
    """
    about = described(source)
    published = None if about or source.name not in SHAPES else configuration(source.name)
    if published is not None:  # its configuration is not here, and its shape is known
        about = published.to_dict()
    if (known := plain.sizes(about)) is not None:
        return known
    model = source.skeleton() if published is None else pretrained.without_storage(lambda: published, False)
    if model is None:
        return None
    if next(model.parameters()).is_meta:
        mark_without_storage(model)
    else:
        mark_read_weights(model)
    found = find_linears(model)
    counted = Counter(tuple(matrix(layer).shape) for layer in found.layers.values())
    for module in found.experts.values():
        for weight in expert_weights(module, 0):
            counted[tuple(weight.shape)] += module.num_experts
    blocks: Counter[int | None] = Counter()
    prefix = block_list(model) or "no list of blocks"
    for name, parameter in model.named_parameters():
        blocks[block_of(name, prefix)] += parameter.numel()
    outside, parameters = blocks.pop(None, 0), sum(p.numel() for p in model.parameters())
    text = model.config.get_text_config(decoder=True)
    largest, sent_to = max(blocks.values(), default=0), getattr(text, "num_experts_per_tok", None) or 0
    return Skeleton(parameters, counted, found, largest, outside, text.hidden_size, text.vocab_size, sent_to)


def expert_parameters(module: Any) -> int:
    """The weights of a module of fused experts."""
    return sum(stack.numel() for stack in stacked_parameters(module).values())


def covered(point: Prepared, known: Skeleton | None) -> tuple[float | None, str | None, list[str]]:
    """The share of the linear weights that will be quantized, why the point will be refused, and what to say of it."""
    if not known or not point.quantizer or isinstance(point.quantizer, Original) or point.quantizer.files():
        return None, None, []  # of a file it is known when it is opened for the model
    share, refused = coverage.planned(known.found, point.config.runtime.min_coverage)
    if point.quantizer.partial:
        share = round(sum(o * i for _, (o, i) in _each_linear(point.quantizer, known)) / known.found.weights, 4)
    return share, refused, coverage.sentences(point.model.name, known.found, refused)


def quantized(
    point: Prepared, known: Skeleton | None, solve: Callable[[Quantizer], np.ndarray]
) -> tuple[float, int] | None:
    """`model_bytes` of the point; None where they are not known."""
    if not known or not known.shapes or not point.quantizer or point.quantizer.files():
        return None
    if not isinstance(point.quantizer, Composed):
        return model_bytes(point.quantizer, known.parameters, known.shapes, solve)
    packed, weights = 0.0, 0
    for quantizer, (rows, columns) in _each_linear(point.quantizer, known):
        a, b, c, d = solve(quantizer)
        packed, weights = packed + (a * rows + b) * columns + c * rows + d, weights + rows * columns
    return (8 * packed / weights, round(packed + 2 * (known.parameters - weights))) if weights else None


def _each_linear(composed: Quantizer, known: Skeleton) -> Iterator[tuple[Quantizer, tuple[int, ...]]]:
    """The linears that are quantized, each as what quantizes it and its shape `[out, in]`."""
    named = {name: tuple(matrix(layer).shape) for name, layer in known.found.layers.items()}
    for module_name, module in known.found.experts.items():
        shapes = [tuple(weight.shape) for weight in expert_weights(module, 0)]
        names = linears_of_experts({module_name: module})
        named |= {name: shapes[i % len(shapes)] for i, name in enumerate(names)}
    for name, shape in named.items():
        if (quantizer := composed.for_layer(name)) is not None:
            yield quantizer, shape


def tokens(point: Prepared, vocabulary: int | None = None) -> int | None:
    """About how many tokens the point is scored on: counted where windows are, else by the bytes of the text.

    None where documents are made as they are scored, as lm-eval's are.
    """
    of_parts = getattr(point.protocol, "scored_tokens", lambda _: None)(point.source)
    if of_parts is not None:
        return of_parts
    if (windows := getattr(point.protocol, "max_windows", None)) is not None:
        return windows * point.protocol.window
    content = getattr(point.source, "content", None)
    if not isinstance(content, str | list):
        return None
    texts = [content] if isinstance(content, str) else content
    each = 1 if vocabulary is not None and vocabulary < SMALL_VOCABULARY else BYTES_PER_TOKEN
    return sum(len(text.encode()) for text in texts) // each


def state_bytes(point: Prepared) -> int | None:
    """What one variant's hidden states `[tokens, hidden]` take; None where the model or the text does not say yet."""
    about = described(point.model)
    text = about.get("text_config") or about
    hidden, vocabulary = text.get("hidden_size"), text.get("vocab_size")
    if not isinstance(hidden, int) or (count := tokens(point, vocabulary)) is None:
        return None
    return count * hidden * point.dtype.itemsize


def described(source: Source) -> dict[str, Any]:
    """The model's config.json as far as it can be had at once; empty where it cannot."""
    with contextlib.suppress(Exception):  # no network, no such model: the point itself will say what is wrong
        return source.config_json() or {}  # type: ignore[attr-defined]
    return {}
