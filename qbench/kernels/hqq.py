"""HQQ's search on the GPU: all rounds for a group in registers, so that the weight is read once.

The groups' zero points do not depend on each other, but the end of the search does: it comes when the mean error of
the whole weight stops falling. So every round of every group is computed, about twenty instructions a weight, and the
zeros of all rounds are kept, 4 bytes per group and round, with the error of each. Which to keep is known afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.kernels.rounding import nearest_integer, pair_tile, quotient

TILE = 2048  # weights that a program holds


@triton.jit
def _rounds(weight, t, divisor_given, zero_given, zeros, errors,
            matrix_stride, row_stride, pairs, columns, groups, rounds, all_pairs, all_programs,
            beta, kappa, lp_norm, NBITS: tl.constexpr, SCALED: tl.constexpr,
            PAIRS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):  # fmt: skip
    values, inside, exists, pair, _, first, channel = pair_tile(
        weight, matrix_stride, row_stride, pairs, columns, groups, PAIRS, WIDTH, PAD
    )
    if SCALED:
        values = quotient(values, tl.load(t + channel, mask=inside, other=1.0))
    scale = tl.load(divisor_given + pair, mask=exists, other=1.0)
    zero = tl.load(zero_given + pair, mask=exists, other=0.0)
    steps = quotient(values, scale[:, None])
    count = tl.minimum(columns - first, WIDTH).to(tl.float32)
    zeros += pair
    errors += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    for _ in range(rounds):
        tl.store(zeros, zero, mask=exists)
        moved = steps + zero[:, None]
        codes = nearest_integer(tl.minimum(tl.maximum(moved, 0.0), (1 << NBITS) - 1))
        left = tl.where(inside, moved - codes, 0.0)  # (W - W_q) / scale
        magnitude = tl.abs(left) * scale[:, None]
        tl.store(errors, tl.sum(tl.sum(magnitude, 1)))
        zero = zero - tl.sum(left, 1) / count
        # below this magnitude the proximal step leaves nothing, which spares most models the powers
        if tl.max(tl.max(magnitude, 1)) > tl.exp2(-tl.log2(beta) / (2 - lp_norm)):
            power = tl.exp2((lp_norm - 1) * tl.log2(magnitude))  # infinite at 0, of which nothing is left
            kept = tl.maximum(magnitude - power / beta, 0.0)
            kept = tl.where(left < 0, -kept, kept)
            zero += tl.sum(kept, 1) / count / scale
        beta = beta * kappa
        zeros += all_pairs
        errors += all_programs


def search(
    weight: Tensor,
    width: int,
    nbits: int,
    divisor: Tensor,
    zero: Tensor,
    schedule: tuple[float, float, float, int],
    input_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """quant.half_quadratic.search for `weight / input_scale` `[out, in]`, its divisor and first zero `[out, groups]`.

    `schedule` is lp_norm, beta, kappa and iterations. Returns the best zero and the number of updates tried, one
    element; of a stack `[experts, out, in]` every matrix has a search of its own, and its number of updates.
    """
    lp_norm, beta, kappa, iterations = schedule
    stack = weight if weight.ndim == 3 else weight.unsqueeze(0)
    matrices, rows, columns = stack.shape
    groups, rounds = -(-columns // width), iterations + 1  # the last update is scored too
    pairs, pad = rows * groups, max(8, triton.next_power_of_2(width))
    per_program = max(1, TILE // pad)
    programs = triton.cdiv(pairs, per_program)
    zeros = torch.empty(rounds, matrices, rows, groups, device=weight.device)
    errors = torch.empty(rounds, matrices, programs, device=weight.device)
    t = weight if input_scale is None else input_scale.contiguous()
    with torch.cuda.device_of(weight):
        _rounds[(programs, matrices)](
            weight, t, divisor.contiguous(), zero.contiguous(), zeros, errors, stack.stride(0), stack.stride(1), pairs,
            columns, groups, rounds, matrices * pairs, matrices * programs, beta, kappa, lp_norm, NBITS=nbits,
            SCALED=input_scale is not None, PAIRS=per_program, WIDTH=width, PAD=pad, num_warps=4 if pad <= 4096 else 8,
        )  # fmt: skip
    error = errors.sum(2, dtype=torch.float64)  # [rounds, matrices]
    before = torch.cat([torch.full_like(error[:1], torch.inf), error[:-1]])
    ended = ~(error < before)  # the first of these ends the search
    updates = torch.where(ended.any(0), ended.int().argmax(0), rounds)
    best = zeros[(updates - 1).clamp_min(0), torch.arange(matrices, device=weight.device)]
    updates = updates.clamp_max(iterations)
    return (best, updates) if weight.ndim == 3 else (best[0], updates[0])
