"""A stack of weights of one format, `[experts, out, in]`: how the experts of a mixture are stored.

Every tensor of a QuantizedWeight gains a leading dimension, and `select` takes one matrix out again as views, so
that a layer dequantizes one expert at a time. A codebook is shared by the stack and stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qbench.format.weight import QuantizedWeight


def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Stacks weights `[out, in]` of equal format into one `[n, out, in]`, bit for bit.

    Raises ValueError when they differ in shape, bits, group size or stored tensors, or in their codebooks.
    """
    first = weights[0]
    for weight in weights[1:]:
        for what, mine, its in zip(
            ("shape", "bits", "group size", "tensors"), _form(weight), _form(first), strict=True
        ):
            if mine != its:
                raise ValueError(f"weights of one stack must share their {what}, got {its} and {mine}")
    named = [weight.tensors() for weight in weights]
    stacked = {}
    for key, tensor in named[0].items():
        if key == "codebook":
            if any(not torch.equal(tensor, other[key]) for other in named[1:]):
                raise ValueError("weights of one stack must share their codebook")
            stacked[key] = tensor
        else:
            stacked[key] = torch.stack([tensors[key] for tensors in named])
    methods = "+".join(sorted({weight.method for weight in weights}))
    form = replace(first, shape=(len(weights), *first.shape), method=methods, diagnostics={})
    return form.with_tensors(stacked)


def select(weight: QuantizedWeight, index: int) -> QuantizedWeight:
    """Matrix `index` `[out, in]` of a stack that `stack` made; its tensors are views."""
    named = {key: tensor if key == "codebook" else tensor[index] for key, tensor in weight.tensors().items()}
    return replace(weight, shape=weight.shape[1:]).with_tensors(named)


def _form(weight: QuantizedWeight) -> tuple:
    tensors = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in weight.tensors().items()}
    return weight.shape, weight.nbits, weight.group_size, tensors
