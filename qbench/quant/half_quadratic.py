"""The zero point search of HQQ (Badri and Shaji 2023), which SINQ can use in place of min/max rounding.

It minimizes the sum of |W - W_q|^p with p < 1 over the zero points, for scales as min/max gives them. The norm is
not smooth, so the error is split off as `e` and the two are solved in turn, without any data:

    q    = clamp(round(W / scale + zero), 0, 2**nbits - 1)
    e    = shrink(W - (q - zero) * scale)       proximal step: sign(x) max(|x| - |x|**(p - 1) / beta, 0)
    zero = mean over the group of q - (W - e) / scale

W is `[out, in]`, or W / t with an input scale t `[in]`; scale and zero, a real number, are `[out, groups]`; beta
grows by kappa a round. The search ends for the whole weight when the mean |W - (q - zero) * scale| stops falling,
and the best zero wins. That is the official optimize_weights_proximal_v2; the official default omits kappa and
returns the zero two updates past the best. `shrink` leaves nothing of an |x| below beta**(-1 / (2 - p)), 0.17 with
the defaults: the errors of most models are smaller, so that e = 0 and every round is a plain mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from qbench.format.aux import FP16_MAX, FP16_TINY, Aux
from qbench.format.weight import QuantizedWeight, per_group
from qbench.quant import gpu
from qbench.quant.rounding import ZERO_LIMIT, group_extremes

CHUNK_BYTES = 1 << 20  # rows worked on together on a CPU: a chunk stays in cache for all steps of a round


@dataclass(frozen=True)
class Schedule:
    """The norm and the steps of the search, by default the official ones; ValueError where it could not run."""

    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.lp_norm <= 1:
            raise ValueError(f"lp_norm must lie in (0, 1], got {self.lp_norm}")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not self.kappa >= 1:
            raise ValueError(f"kappa must be at least 1, got {self.kappa}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")


def round_half_quadratic(
    weight: Tensor,
    *,
    nbits: int,
    group_size: int,
    aux_dtype: str = "fp16",
    schedule: Schedule,
    input_scale: Tensor | None = None,
    method: str,
    diagnostics: Mapping[str, float] | None = None,
) -> QuantizedWeight:
    """Quantizes `weight / input_scale`, `[out, in]`, on the device it is on, in fp32.

    Each matrix of a stack `[experts, out, in]`, with input_scale `[experts, in]`, has a search of its own.
    """
    fused, top = gpu.fused(weight, group_size), 2**nbits - 1
    if fused:
        from qbench.kernels import hqq, rounding

        low, high = rounding.extremes(weight, group_size, input_scale)
    else:
        values = weight.float().clone() if input_scale is None else weight.float() / input_scale.float().unsqueeze(-2)
        low, high = group_extremes(values, group_size)
    # groups of nearly equal values get a wider range, or their zero would leave fp16 (see rounding.py)
    floor = torch.maximum(high.abs(), low.abs()) / ZERO_LIMIT[aux_dtype]
    exact_scale = ((high - low) / top).maximum(floor).clamp_min(FP16_TINY)
    scale = Aux.compress(exact_scale, aux_dtype)
    # Where storing moves scales and zeros by more than rounding noise, zeros and codes are fitted to what is stored:
    # int8 does, and fp16 where no weight of the group has the other sign. Its zero lies outside of the codes then, at
    # -low / scale, where fp16 has steps of 0.5 from 512 on and of 16 from 16,384 on.
    stored = torch.full_like(low, aux_dtype != "fp16", dtype=torch.bool) | (low > 0) | (high < 0)
    divisor = torch.where(stored, scale.dense().clamp_min(FP16_TINY), exact_scale)
    start = -low / divisor
    if fused:  # one pass for all rounds, one to round
        best, updates = hqq.search(weight, group_size, nbits, divisor, start, astuple(schedule), input_scale)
        updates = updates if weight.ndim == 3 else int(updates)
    else:
        steps = per_group(values, group_size, divisor, torch.Tensor.div_)
        best, updates = _search_each(steps, divisor, start, group_size, nbits, schedule)
    best = best.clamp(-FP16_MAX, FP16_MAX)
    zero = Aux.compress(best, aux_dtype)
    fitted = torch.where(stored, zero.dense(), best)
    diagnostics = {**(diagnostics or {}), "zero_updates": updates}
    if fused:
        return QuantizedWeight(
            tuple(weight.shape),
            nbits,
            group_size,
            rounding.uniform_on(weight, group_size, nbits, divisor, fitted, input_scale),
            scale,
            zero,
            None if input_scale is None else input_scale.half(),
            method=method,
            diagnostics=diagnostics,
        )
    per_group(steps, group_size, fitted, torch.Tensor.add_)
    return QuantizedWeight.build(
        steps.round_().clamp_(0, top).to(torch.uint8),
        scale,
        nbits=nbits,
        group_size=group_size,
        zero=zero,
        input_scale=input_scale,
        method=method,
        diagnostics=diagnostics,
    )


def _search_each(
    steps: Tensor, scale: Tensor, zero: Tensor, width: int, nbits: int, schedule: Schedule
) -> tuple[Tensor, int | list[int]]:
    if steps.ndim == 2:
        return search(steps, scale, zero, width, nbits, schedule)
    found = [search(*one, width, nbits, schedule) for one in zip(steps, scale, zero, strict=True)]
    return torch.stack([best for best, _ in found]), [updates for _, updates in found]


def search(
    steps: Tensor, scale: Tensor, zero: Tensor, width: int, nbits: int, schedule: Schedule
) -> tuple[Tensor, int]:
    """The best zero `[out, groups]` for `steps` = W / scale `[out, in]`, and the number of updates tried."""
    rows = len(steps) if steps.is_cuda else max(1, CHUNK_BYTES // steps[0].nbytes)
    best, best_error, beta = zero, float("inf"), schedule.beta
    for updates in range(schedule.iterations + 1):  # the last update is scored too
        error, fresh = 0.0, []
        for part, s, z in zip(steps.split(rows), scale.split(rows), zero.split(rows), strict=True):
            total, update = one_round(part, s, z, width, nbits, beta, schedule.lp_norm)
            error += total
            fresh.append(update)
        if not error < best_error:
            return best, updates
        best, best_error = zero, error
        zero, beta = torch.cat(fresh), beta * schedule.kappa
    return best, schedule.iterations


def one_round(
    steps: Tensor, scale: Tensor, zero: Tensor, width: int, nbits: int, beta: float, lp_norm: float
) -> tuple[float, Tensor]:
    """One round: the sum of |W - W_q| with the `zero` given, and the next zero `[rows, groups]`."""
    left = per_group(steps.clone(), width, zero, torch.Tensor.add_)
    left -= left.round().clamp_(0, 2**nbits - 1)  # (W - W_q) / scale
    # q - (W - e) / scale = zero - left + e / scale
    update = zero - group_means(left, width)
    magnitude = per_group(left.abs(), width, scale, torch.Tensor.mul_)
    if bool(magnitude.amax() > beta ** (-1 / (2 - lp_norm))):
        kept = (magnitude - magnitude.pow(lp_norm - 1) / beta).clamp_(min=0).copysign_(left)
        update += group_means(kept, width) / scale
    return float(magnitude.sum(dtype=torch.float64)), update


def group_means(values: Tensor, width: int) -> Tensor:
    """Mean of every group, the ragged last one over its own columns: `[rows, in]` -> `[rows, groups]`."""
    full = values.shape[1] // width * width
    means = [values[:, :full].unflatten(1, (-1, width)).mean(2)] if full else []
    if full < values.shape[1]:
        means.append(values[:, full:].mean(1, keepdim=True))
    return torch.cat(means, 1)
