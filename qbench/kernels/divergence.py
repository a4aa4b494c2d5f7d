"""What a window's logits tell, on the GPU: each token's NLL and its divergence from the original, two reads in all.

A program takes one token. It goes through the vocabulary twice: for the denominators of both softmaxes and their most
probable tokens, and for the sums of the two divergences. Torch needs some twenty passes over fp32 copies for the same
(evaluate/divergence.py, whose formulas these are, summand by summand). Equal logits give exactly zero: both sides are
computed by the same operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # logits that a program holds of each model
FOUND = 6  # nll, KL(P || Q), KL(Q || P), whether both find the same token most probable, squared change, confidence


@triton.jit
def _grown(top, total, where, x, at):
    """A lane's maximum, its sum of exponentials relative to that, and the maximum's place, with one more value."""
    higher = x > top
    new = tl.where(higher, x, top)
    shrink = tl.where(top == new, 1.0, tl.exp(top - new))
    add = tl.where(x == float("-inf"), 0.0, tl.exp(x - new))
    return new, total * shrink + add, tl.where(higher, at, where)


@triton.jit
def _whole(top, total, where, columns):
    """The lanes together: maximum, logarithm of the sum of exponentials relative to it, first place of the maximum."""
    most = tl.max(top, 0)
    place = tl.min(tl.where(top == most, where, columns), 0)
    total = tl.sum(tl.where(top == float("-inf"), total * 0.0, total * tl.exp(top - most)), 0)
    return most, tl.log(total), place


@triton.jit
def _tokens(q, p, targets, found, rows, columns, q_stride, p_stride, COMPARES: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, TILE)
    q += row.to(tl.int64) * q_stride
    p += row.to(tl.int64) * p_stride
    lowest = tl.full([TILE], float("-inf"), tl.float32)
    q_top, q_total, q_where = lowest, tl.zeros([TILE], tl.float32), lanes
    p_top, p_total, p_where = lowest, tl.zeros([TILE], tl.float32), lanes
    for start in range(0, columns, TILE):
        at = start + lanes
        x = tl.load(q + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        q_top, q_total, q_where = _grown(q_top, q_total, q_where, x, at)
        if COMPARES:
            x = tl.load(p + at, mask=at < columns, other=float("-inf")).to(tl.float32)
            p_top, p_total, p_where = _grown(p_top, p_total, p_where, x, at)
    q_most, q_log, q_place = _whole(q_top, q_total, q_where, columns)
    target = tl.load(targets + row)
    q_true = tl.load(q + target).to(tl.float32) - q_most - q_log
    found += row
    tl.store(found, -q_true)
    if COMPARES:
        p_most, p_log, p_place = _whole(p_top, p_total, p_where, columns)
        forward, reverse = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        for start in range(0, columns, TILE):
            at = start + lanes
            inside = at < columns
            log_q = tl.load(q + at, mask=inside, other=float("-inf")).to(tl.float32) - q_most - q_log
            log_p = tl.load(p + at, mask=inside, other=float("-inf")).to(tl.float32) - p_most - p_log
            one, other = tl.exp(log_p), tl.exp(log_q)
            ratio = log_p - log_q
            forward += other - one + tl.where(one > 0, one * ratio, 0.0)
            reverse += one - other - tl.where(other > 0, other * ratio, 0.0)
        p_true = tl.load(p + target).to(tl.float32) - p_most - p_log
        change = tl.exp(q_true) - tl.exp(p_true)
        tl.store(found + rows, tl.maximum(tl.sum(forward, 0), 0.0))
        tl.store(found + 2 * rows, tl.maximum(tl.sum(reverse, 0), 0.0))
        tl.store(found + 3 * rows, (q_place == p_place).to(tl.float32))
        tl.store(found + 4 * rows, change * change)
        tl.store(found + 5 * rows, tl.exp(-p_log))


def tokens(logits: Tensor, targets: Tensor, original: Tensor | None) -> Tensor:
    """What FOUND names, or the NLLs alone without an `original`: fp32 `[6 or 1, tokens]`, in nats.

    `logits` and `original` are `[tokens, vocabulary]` in bf16, fp16 or fp32, `targets` int64 `[tokens]`. NaN in the
    logits gives NaN. A token of no probability (-inf) adds nothing: 0 ln 0 = 0.
    """
    rows, columns = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if original is not None and original.stride(1) != 1:
        original = original.contiguous()
    found = torch.empty(1 if original is None else FOUND, rows, dtype=torch.float32, device=logits.device)
    p = logits if original is None else original
    _tokens[(rows,)](
        *(logits, p, targets, found, rows, columns, logits.stride(0), p.stride(0)),
        COMPARES=original is not None,
        TILE=min(TILE, triton.next_power_of_2(columns)),
        num_warps=8,
    )
    return found
