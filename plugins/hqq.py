"""HQQ: half-quadratic quantization (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog).

Min/max rounding puts the zero point where the two most extreme weights of a group want it. HQQ moves it to
where most weights want it, by minimizing the sum of |W - W_q|^p with p < 1, a norm that forgives a few large
errors. It is not smooth, so the error is split off as `e` and the two are solved in turn, without any data:

    q    = clamp(round(W / scale + zero), 0, 2**nbits - 1)
    e    = shrink(W - (q - zero) * scale)       proximal step: sign(x) max(|x| - |x|**(p - 1) / beta, 0)
    zero = mean over the group of q - (W - e) / scale

`scale` stays as min/max gives it, `zero` `[out, groups]` becomes a real number, beta grows by kappa a round.
The search ends for the whole weight `[out, in]` when the mean |W - (q - zero) * scale| stops falling, and the
best zero wins. That is the official optimize_weights_proximal_v2; the official default omits kappa and returns
the zero two updates past the best. `shrink` leaves nothing of an |x| below beta**(-1 / (2 - p)), 0.17 with the
defaults: the errors of most models are smaller, so that e = 0 and every round is a plain mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.quant.aux import FP16_MAX, FP16_TINY, Aux
from qbench.quant.quantizer import InputStatistics, Quantizer
from qbench.quant.rounding import ZERO_LIMIT, group_extremes
from qbench.quant.weight import QuantizedWeight, per_group

CHUNK_BYTES = 1 << 20  # rows worked on together on a CPU: a chunk stays in cache for all steps of a round


@dataclass(frozen=True)
class HQQ(Quantizer):
    nbits: int = 4
    group_size: int = 64
    aux_dtype: str = "fp16"
    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lp_norm <= 1:
            raise ValueError(f"lp_norm must lie in (0, 1], got {self.lp_norm}")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not self.kappa >= 1:
            raise ValueError(f"kappa must be at least 1, got {self.kappa}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> QuantizedWeight:
        values, width, top = weight.float(), self.columns(weight), 2**self.nbits - 1
        low, high = group_extremes(values, width)
        # groups of nearly equal values get a wider range, or their zero would leave fp16 (see rounding.py)
        floor = torch.maximum(high.abs(), low.abs()) / ZERO_LIMIT[self.aux_dtype]
        exact_scale = ((high - low) / top).maximum(floor).clamp_min(FP16_TINY)
        scale = Aux.compress(exact_scale, self.aux_dtype)
        # int8 moves scales and zeros by more than rounding noise: fit zeros and codes to what is stored
        stored = self.aux_dtype != "fp16"
        divisor = scale.dense().clamp_min(FP16_TINY) if stored else exact_scale
        steps = per_group(values.clone(), width, divisor, torch.Tensor.div_)
        best, updates = self.search(steps, divisor, -low / divisor, width)
        best = best.clamp(-FP16_MAX, FP16_MAX)
        zero = Aux.compress(best, self.aux_dtype)
        per_group(steps, width, zero.dense() if stored else best, torch.Tensor.add_)
        return QuantizedWeight.build(
            steps.round_().clamp_(0, top).to(torch.uint8),
            scale,
            nbits=self.nbits,
            group_size=width,
            zero=zero,
            method="hqq",
            diagnostics={"zero_updates": updates},
        )

    def search(self, steps: Tensor, scale: Tensor, zero: Tensor, width: int) -> tuple[Tensor, int]:
        """The best zero `[out, groups]` for `steps` = W / scale `[out, in]`, and the number of updates tried."""
        rows = len(steps) if steps.is_cuda else max(1, CHUNK_BYTES // steps[0].nbytes)
        best, best_error, beta = zero, float("inf"), self.beta
        for updates in range(self.iterations + 1):  # the last update is scored too
            error, fresh = 0.0, []
            for part, s, z in zip(steps.split(rows), scale.split(rows), zero.split(rows), strict=True):
                total, update = self.one_round(part, s, z, width, beta)
                error += total
                fresh.append(update)
            if not error < best_error:
                return best, updates
            best, best_error = zero, error
            zero, beta = torch.cat(fresh), beta * self.kappa
        return best, self.iterations

    def one_round(self, steps: Tensor, scale: Tensor, zero: Tensor, width: int, beta: float) -> tuple[float, Tensor]:
        """One round: the sum of |W - W_q| with the `zero` given, and the next zero `[rows, groups]`."""
        left = per_group(steps.clone(), width, zero, torch.Tensor.add_)
        left -= left.round().clamp_(0, 2**self.nbits - 1)  # (W - W_q) / scale
        # q - (W - e) / scale = zero - left + e / scale
        update = zero - group_means(left, width)
        magnitude = per_group(left.abs(), width, scale, torch.Tensor.mul_)
        if bool(magnitude.amax() > beta ** (-1 / (2 - self.lp_norm))):
            kept = (magnitude - magnitude.pow(self.lp_norm - 1) / beta).clamp_(min=0).copysign_(left)
            update += group_means(kept, width) / scale
        return float(magnitude.sum(dtype=torch.float64)), update


def group_means(values: Tensor, width: int) -> Tensor:
    """Mean of every group, the ragged last one over its own columns: `[rows, in]` -> `[rows, groups]`."""
    full = values.shape[1] // width * width
    means = [values[:, :full].unflatten(1, (-1, width)).mean(2)] if full else []
    if full < values.shape[1]:
        means.append(values[:, full:].mean(1, keepdim=True))
    return torch.cat(means, 1)
