"""GPTQ: rounds column by column and lets the columns that are left make up for the error (arXiv 2210.17323).

What counts is not the error of the weights but that of the layer's output, ||X W^T - X Q^T||, which depends
on the inputs only through H = X^T X `[in, in]`. Once column j is rounded, the best correction of the columns
after it is -(w_j - q_j) * U[j, j+1:] / U[j, j], where U is the upper Cholesky factor of H^-1 = U^T U. Only
the ratios matter, so U is kept with a unit diagonal, and the scale of H drops out. With H = I nothing is
corrected and the result is RTN's.

All rows of a linear group `[out, in]` read the same input, hence share H and U: they are stacked and go
through one loop. Corrections reach the columns of the current block at once and the rest as one matrix
product per block, which changes the cost and not the result. A group of columns takes its grid when the loop
reaches it, from columns corrected so far, or with `static_groups` from the original weights. `act_order`
visits the channels with the most energy first, while there are still many left to absorb their error; groups
then follow that order and the permutation is stored, unless they are static.

Both are on by default. Small language models have channels with massive activations, and the order of the storage
visits some of them last, when they have gathered everybody's corrections and nobody is left to make up for their own
rounding: on the reference model that is worse than RTN (docs/methods.md). Static groups then cost no permutation, and
did better still on the validation text.

Two differences to the original code, in which a group that starts inside a block takes its grid from columns
that still lack the block's corrections: here the block size is only a matter of speed, and the error that is
passed on is that of the scales as stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.format.aux import Aux
from qbench.format.weight import QuantizedWeight
from qbench.quant import gpu
from qbench.quant.quantizer import InputStatistics, Statistic
from qbench.quant.rotating import RotatingQuantizer
from qbench.quant.rounding import grid, group_extremes

DAMPING_TRIES = 4
LEAST_RETRY = 1e-3  # damping of the first retry at least: ten times zero would change nothing

Stored = tuple[Aux, Aux | None]  # scale and zero of one weight, [out, groups]
# divisor, zero, scale; fp32 [groups, rows], so that a group is contiguous
Grids = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class GPTQ(RotatingQuantizer):
    nbits: int = 4
    group_size: int = 64
    symmetric: bool = False
    aux_dtype: str = "fp16"
    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    block_size: int = 128
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.HESSIAN})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping >= 0:
            raise ValueError(f"damping must not be negative, got {self.damping}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")

    def quantize_basis(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[QuantizedWeight]:
        """Quantizes the weights `[out, in]` of a linear group; ValueError without a usable Hessian."""
        hessian = _hessian(weights, stats)
        width = self.columns(weights[0])
        rows = [len(weight) for weight in weights]
        joined = torch.cat([weight.float() for weight in weights]).T.contiguous()  # [in, rows]

        # A channel that was always zero has no say in the output: its weights are free, and 0 costs nothing.
        energy = hessian.diagonal().clone()  # a view would keep the unscaled Hessian alive
        dead = energy <= 0
        hessian = hessian / energy[~dead].mean()
        hessian.diagonal()[dead] = 1
        joined[dead] = 0

        order = hessian.diagonal().argsort(descending=True, stable=True) if self.act_order else None
        values = joined
        if order is not None:
            values, hessian = joined[order], hessian[order][:, order]
        unit, damping = unit_factor(hessian, self.damping)

        channel = torch.arange(len(values), device=values.device)
        if self.static_groups:
            members = ((channel if order is None else order) // width).tolist()
            stored, fixed = self._grids(*group_extremes(joined.T, width), rows, self.aux_dtype)
            codes, _ = self._sweep(values, unit, width, members, fixed)
        else:
            members = (channel // width).tolist()
            codes, extremes = self._sweep(values, unit, width, members)
            low, high = (torch.cat(parts, 1) for parts in zip(*extremes, strict=True))
            stored, fixed = self._grids(low, high, rows, self.aux_dtype)
            if self.aux_dtype != "fp16":
                # An int8 grid depends on its neighbours, known only now: run again on what is stored.
                codes, _ = self._sweep(values, unit, width, members, fixed)
        if order is not None and self.static_groups:
            codes[order] = codes.clone()  # back to the weight's own order
            order = None
        return [
            QuantizedWeight.build(
                part.contiguous(),
                scale,
                nbits=self.nbits,
                group_size=width,
                zero=zero,
                permutation=order,
                method="gptq",
                diagnostics={"damping": damping},
            )
            for part, (scale, zero) in zip(codes.T.split(rows), stored, strict=True)
        ]

    def _grids(self, low: Tensor, high: Tensor, rows: list[int], aux_dtype: str) -> tuple[list[Stored], Grids]:
        """From the extremes `[rows, groups]` of the stacked weights: what each stores, and it all dense."""
        stored: list[Stored] = []
        dense = []
        for lows, highs in zip(low.split(rows), high.split(rows), strict=True):
            scale, zero, divisor = grid(lows, highs, self.nbits, self.symmetric, aux_dtype)
            stored.append((scale, zero))
            middle = torch.full_like(divisor, 2.0 ** (self.nbits - 1)) if zero is None else zero.dense()
            dense.append((divisor, middle, scale.dense()))
        divisors, zeros, scales = (torch.cat(parts).T.contiguous() for parts in zip(*dense, strict=True))
        return stored, (divisors, zeros, scales)

    def _sweep(
        self, values: Tensor, unit: Tensor, width: int, members: list[int], fixed: Grids | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The column loop over fp32 `[in, rows]`; `members` says which group each column belongs to.

        Without `fixed` grids each group takes its own on arrival. Returns the codes, uint8 `[in, rows]`, and
        then the extremes `[rows, 1]` of every group too.
        """
        if gpu.enabled(values):
            return self._sweep_fused(values, unit, width, members, fixed)
        values = values.clone()
        codes = torch.empty_like(values, dtype=torch.uint8)
        top = 2**self.nbits - 1
        extremes: list[tuple[Tensor, Tensor]] = []
        for start, stop in blocks(len(values), width, self.block_size):
            errors = torch.empty_like(values[start:stop])
            for j in range(start, stop):
                if fixed is not None:
                    divisor, zero, scale = (part[members[j]] for part in fixed)
                elif j % width == 0:
                    extremes.append(group_extremes(values[j : j + width].T, width))
                    _, taken = self._grids(*extremes[-1], [values.shape[1]], "fp16")
                    divisor, zero, scale = (part[0] for part in taken)
                rounded = (values[j] / divisor).add_(zero).round_().clamp_(0, top)
                codes[j] = rounded
                error = torch.sub(values[j], rounded.sub_(zero).mul_(scale), out=errors[j - start])
                values[j + 1 : stop].addr_(unit[j, j + 1 : stop], error, alpha=-1)
            values[stop:].addmm_(unit[start:stop, stop:].T, errors, alpha=-1)
        return codes, extremes

    def _sweep_fused(
        self, values: Tensor, unit: Tensor, width: int, members: list[int], fixed: Grids | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The same with one kernel per block in place of a loop over its columns."""
        from qbench.kernels import gptq as kernels

        values, unit = values.clone(), unit.contiguous()
        columns, rows = values.shape
        codes = torch.empty_like(values, dtype=torch.uint8)
        lows, highs = (values.new_empty(-(-columns // width), rows) for _ in range(2))
        size = min(self.block_size, kernels.LARGEST_BLOCK)
        errors = values.new_empty(size, rows)
        group_of = torch.tensor(members, dtype=torch.int32, device=values.device)
        for start, stop in blocks(columns, width, size):
            if fixed is None and width > size and start % width == 0:
                # a group of several blocks: its grid comes from columns that this block does not hold
                low, high = group_extremes(values[start : start + width].T, width)
                lows[start // width], highs[start // width] = low[:, 0], high[:, 0]
                _, taken = self._grids(low, high, [rows], "fp16")
            grids = fixed
            if fixed is None and width > size:
                grids = taken
                group_of = torch.zeros_like(group_of)
            kernels.sweep_block(
                values, unit, codes, errors, start, stop, width, self.nbits, self.symmetric, (lows, highs),
                None if grids is None else (grids, group_of),
            )  # fmt: skip
            values[stop:].addmm_(unit[start:stop, stop:].T, errors[: stop - start], alpha=-1)
        return codes, [(lows.T, highs.T)]


def _hessian(weights: Sequence[Tensor], stats: InputStatistics | None) -> Tensor:
    """X^T X of the group's input, fp64 on a CPU and fp32 elsewhere; raises ValueError if it is of no use."""
    if stats is None or stats.hessian is None:
        raise ValueError("gptq needs the Hessian X^T X of the layer's input: run it with calibration data")
    columns = {weight.shape[-1] for weight in weights}
    if columns != {stats.hessian.shape[-1]}:
        raise ValueError(f"the weights have {sorted(columns)} input channels, the Hessian {list(stats.hessian.shape)}")
    if not torch.isfinite(stats.hessian).all():
        raise ValueError("the Hessian of the layer's input holds NaN or Inf")
    if not (stats.hessian.diagonal() > 0).any():
        raise ValueError("the Hessian is zero: no calibration token reached this layer")
    device = weights[0].device
    return stats.hessian.to(device, torch.float64 if device.type == "cpu" else torch.float32)


def unit_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """U / diag(U), fp32 `[in, in]`, for (H + damping * I)^-1 = U^T U, H scaled to a mean diagonal of 1.

    U is the inverse of the upper R in H = R R^T, which is the Cholesky factor of H read backwards; this way
    H^-1 is never formed. Returns the damping that worked too; each failure multiplies it by ten, and the last
    raises ValueError.
    """
    share = damping
    for _ in range(DAMPING_TRIES):
        damped = hessian.flip(0, 1)  # a copy
        damped.diagonal().add_(share)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            # cheaper than scaling afterwards: R with its columns divided by its diagonal has a unit inverse
            upper = lower.flip(0, 1)
            del lower  # these are the largest things a layer needs: no more of them at once than must be
            upper /= upper.diagonal().clone()
            unit = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            torch.linalg.solve_triangular(upper, unit, upper=True, unitriangular=True, out=unit)
            return unit.float(), share
        tried, share = share, max(10 * share, LEAST_RETRY)
    raise ValueError(f"the Hessian is not positive definite, not even damped by {tried:g} of its mean diagonal")


def blocks(columns: int, width: int, size: int) -> Iterator[tuple[int, int]]:
    """Cuts the columns into blocks of at most `size`, each of whole groups of `width` or within one group.

    So no group reaches from the middle of a block into columns that still lack that block's corrections.
    """
    span = max(size // width, 1) * width
    for begin in range(0, columns, span):
        end = min(begin + span, columns)
        for start in range(begin, end, size):
            yield start, min(start + size, end)
