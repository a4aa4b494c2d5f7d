"""Quantizes the fused experts of one block: in stacks, as many experts at a time as fit into a stated memory.

An expert's matrices are named as if they were linears: `model.layers.0.mlp.experts.3.gate_proj`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qbench.errors import PointError
from qbench.format.format import Format
from qbench.format.stack import concat
from qbench.layers.dense import write
from qbench.layers.expert_form import Activation, expert_slice, form, stacks_of
from qbench.layers.experts import QuantExperts
from qbench.passes.collect import INPUT_ROWS, ExpertInputs
from qbench.passes.rows import Pending, settle, timed
from qbench.passes.stream import Fetch
from qbench.quant.quantizer import InputStatistics, Quantizer, Statistic
from qbench.record.quantization import LayerRow

ALL_TOKENS = "all tokens"  # in the method of an expert that was calibrated on them, not on its own
# A chunk of experts is quantized at a time: its matrices in fp32, and what a calibrated method is told of each. On a
# GPU a chunk fills it; a CPU works best on what stays in its cache, which is one expert of all but toy models.
CHUNK_BYTES = {"cuda": 4 << 30, "cpu": 4 << 20}


def quantize_experts(
    name: str, module: Any, quantizer: Quantizer, inputs: ExpertInputs | None = None, fetch: Fetch = iter
) -> tuple[QuantExperts, list[LayerRow]]:
    """Quantizes fused experts, a chunk of them at a time; gate and up (or up alone) are a linear group, down another.

    `fetch` brings a chunk's weights to where they are quantized (stream.py); by default they are there.

    `inputs` is for calibrated methods. What down reads is computed with gate and up as quantized: they are at hand,
    and it is what down will be handed; or with gate and up as they were, if the inputs are to be the original model's.
    An expert that too few tokens are routed to is calibrated on all tokens of the block instead: the method stays the
    one asked for, other experts' tokens come from the same distribution far more nearly than white noise does, and a
    handful of tokens would fit the weights to those alone. Its rows say so.

    The stacks are put together at the end, projection by projection, so one projection's codes exist twice then.
    """
    packed: list[list[Format]] = [[] for _ in form(module).projections]
    rows: list[list[Pending]] = []  # chunk by chunk, a stack of each projection
    activation = Activation(module)
    on_gpu = fetch is not iter or module.down_proj.is_cuda
    parts = chunks(module, quantizer, "cuda" if on_gpu else "cpu")
    arrivals = fetch(expert_slice(module, slice(part.start, part.stop)) for part in parts)
    for experts, held in zip(parts, arrivals, strict=True):
        weights = stacks_of(module, held)
        del held
        names = [list(of) for of in zip(*(expert_names(name, module, index) for index in experts), strict=True)]
        stats = [inputs.of_first(index) for index in experts] if inputs else None
        made, new = _quantize_stacks(name, names[:-1], weights[:-1], quantizer, stats)
        if inputs:
            before = weights[:-1] if inputs.original else [_dense(stack, inputs.x.dtype) for stack in made]
            stats = [
                inputs.of_down(index, partial(_before_down, activation, [weight[at] for weight in before], index))
                for at, index in enumerate(experts)
            ]
            del before
        down, of_down = _quantize_stacks(name, names[-1:], weights[-1:], quantizer, stats)
        made, new = [*made, *down], [*new, *of_down]
        if inputs:
            made = [_say_what_calibrated(stack, one, inputs, experts) for stack, one in zip(made, new, strict=True)]
        rows.append(new)
        for projection, stack in zip(packed, made, strict=True):
            projection.append(replace(stack, diagnostics={}))
        del weights, made, down, stats
    stacks = []
    for projection in packed:
        try:
            stacks.append(concat(projection))
        except ValueError as error:
            raise PointError(f"layer {name}: {error}") from error
        projection.clear()
    settled = iter(settle([one for chunk in rows for one in chunk]))
    ordered = [row for chunk in rows for expert in zip(*(next(settled) for _ in chunk), strict=True) for row in expert]
    ordered = [row for row in ordered if quantizer.for_layer(row.name) is not None]  # the rest is as it was
    # biases of an offloaded model have waited in host memory
    return QuantExperts(stacks, module).to(stacks[0].device), ordered


def expert_names(name: str, module: Any, index: int) -> list[str]:
    return [f"{name}.{index}.{projection}" for projection in form(module).projections]


def chunks(module: Any, quantizer: Quantizer, kind: str) -> list[range]:
    """The experts that are quantized at a time, on a device of this kind."""
    matrices = stacks_of(module, expert_slice(module, slice(0, 1)))
    numbers = sum(matrix.numel() for matrix in matrices)
    for columns in {matrix.shape[-1] for matrix in matrices}:  # what gate and up read, and what down reads
        numbers += columns**2 if Statistic.HESSIAN in quantizer.needs else 0
        numbers += INPUT_ROWS * columns if Statistic.INPUTS in quantizer.needs else 0
    count = -(-module.num_experts // max(1, CHUNK_BYTES[kind] // (4 * numbers)))  # of chunks, as even as they can be
    size = -(-module.num_experts // count)
    return [range(at, min(at + size, module.num_experts)) for at in range(0, module.num_experts, size)]


def _quantize_stacks(
    block: str,
    names: Sequence[Sequence[str]],
    weights: Sequence[Tensor],
    quantizer: Quantizer,
    stats: Sequence[InputStatistics] | None,
) -> tuple[list[Format], list[Pending]]:
    """A linear group of a chunk, and its rows; where it fails, the expert is looked for that is to blame."""
    try:
        return timed(names, weights, quantizer, lambda: quantizer.quantize_stacks(names, weights, stats))
    except PointError as error:
        count = len(names[0])
        if count == 1:
            raise
        for e in range(count):
            own = [[of[e]] for of in names], [weight[e : e + 1] for weight in weights]
            _quantize_stacks(block, *own, quantizer, None if stats is None else stats[e : e + 1])
        raise PointError(f"layer {block}: {error.__cause__ or error}") from error


def _dense(stack: Format, dtype: torch.dtype) -> Tensor:
    dense = torch.empty(stack.shape, dtype=dtype, device=stack.device)
    write(stack, dense)
    return dense


def _before_down(activation: Activation, weights: list[Tensor], index: int, x: Tensor) -> Tensor:
    """What an expert's down reads, `[tokens, intermediate]`, if gate and up (or up alone) are these, `[out, in]`."""
    return activation([F.linear(x, weight) for weight in weights], index)


def _say_what_calibrated(stack: Format, rows: Pending, inputs: ExpertInputs, experts: range) -> Format:
    """Adds the number of tokens routed to each expert, and names the fallback to all tokens where it was taken."""
    methods = list(stack.diagnostics.get("method", [stack.method] * len(experts)))
    for at, index in enumerate(experts):
        routed = len(inputs.routed(index))
        rows.told[at]["routed_tokens"] = float(routed)
        if inputs.starved(index):
            rows.methods[at] += f" ({ALL_TOKENS}: {routed} routed)"
            methods[at] += f" ({ALL_TOKENS})"
    return replace(stack, method="+".join(sorted(set(methods))))
