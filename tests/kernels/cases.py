"""Random weights in the packed format, and the reference that every kernel is held to."""

from __future__ import annotations

import torch

from qbench.format.aux import Aux
from qbench.format.weight import QuantizedWeight

FORMATS = [(2, False), (3, False), (4, False), (8, False), (4, True)]


def random_weight(
    shape, nbits, group_size, generator, *, codebook=False, zero=True, t=True, permuted=False, aux_dtype="fp16"
) -> QuantizedWeight:
    """Codes, scales, zero points and t drawn from `generator`, `[..., out, in]`, on the CPU."""
    *lead, _, columns = shape
    groups = -(-columns // group_size)
    uniform = lambda *size: torch.rand(size, generator=generator)  # noqa: E731
    order = torch.stack([torch.randperm(columns, generator=generator) for _ in range(lead[0] if lead else 1)])
    return QuantizedWeight.build(
        torch.randint(0, 2**nbits, shape, generator=generator),
        Aux.compress(uniform(*shape[:-1], groups) + 0.1, aux_dtype),
        nbits=nbits,
        group_size=group_size,
        zero=Aux.compress(uniform(*shape[:-1], groups) * 2**nbits, aux_dtype) if zero and not codebook else None,
        input_scale=(uniform(*lead, columns) * 4 - 2).exp() if t else None,
        codebook=torch.randn(16, generator=generator) if codebook else None,
        permutation=(order if lead else order[0]) if permuted else None,
    )


def relative_error(y, x, weight, bias=None) -> float:
    """||y - reference|| / ||reference|| with the reference in fp64; inf when y holds NaN or Inf."""
    expected = x.double() @ weight.dequantize().double().T
    if bias is not None:
        expected = expected + bias.double()
    error = float((y.double() - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def different(y, again) -> str:
    """Where two results that are to be the same to the bit are not; empty if they are."""
    if torch.equal(y, again):
        return ""
    at = (y != again).nonzero().tolist()
    values = [float(of[tuple(at[0])]) for of in (y, again)]
    return f"{len(at)} of {y.numel()} elements, from {at[0]} to {at[-1]}; first {values[0]}, then {values[1]}"
