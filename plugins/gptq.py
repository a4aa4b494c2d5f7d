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
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qbench.format.aux import Aux
from qbench.format.format import Format
from qbench.format.weight import QuantizedWeight
from qbench.quant import gpu
from qbench.quant.cholesky import unit_factor, unit_factors
from qbench.quant.quantizer import InputStatistics, Statistic
from qbench.quant.rotating import RotatingQuantizer
from qbench.quant.rounding import grid, group_extremes

NOT_FINITE = "the Hessian of the layer's input holds NaN or Inf"
ALL_ZERO = "the Hessian is zero: no calibration token reached this layer"

Stored = tuple[Aux, Aux | None]  # scale and zero of one weight, [out, groups]
# divisor, zero, scale; fp32 [..., groups, rows], so that a group is contiguous
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
        if gpu.enabled(weights[0]):
            made = self._quantize_batch([weight[None] for weight in weights], _hessians(weights, [stats]))
            return [
                replace(one.select(0), diagnostics={name: each[0] for name, each in one.diagnostics.items()})
                for one in made
            ]
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
        """From the extremes `[..., rows, groups]` of the joined weights: what each stores, and it all dense."""
        stored: list[Stored] = []
        dense = []
        for lows, highs in zip(low.split(rows, -2), high.split(rows, -2), strict=True):
            scale, zero, divisor = grid(lows, highs, self.nbits, self.symmetric, aux_dtype)
            stored.append((scale, zero))
            middle = torch.full_like(divisor, 2.0 ** (self.nbits - 1)) if zero is None else zero.dense()
            dense.append((divisor, middle, scale.dense()))
        divisors, zeros, scales = (torch.cat(parts, -2).mT.contiguous() for parts in zip(*dense, strict=True))
        return stored, (divisors, zeros, scales)

    def _sweep(
        self, values: Tensor, unit: Tensor, width: int, members: list[int], fixed: Grids | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The column loop over fp32 `[in, rows]`; `members` says which group each column belongs to.

        Without `fixed` grids each group takes its own on arrival. Returns the codes, uint8 `[in, rows]`, and
        then the extremes `[rows, 1]` of every group too.
        """
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

    def quantize_stacks(
        self,
        names: Sequence[Sequence[str]],
        weights: Sequence[Tensor],
        stats: Sequence[InputStatistics] | None = None,
    ) -> list[Format]:
        """On a GPU all experts at once; rotated weights, and those on a CPU, expert by expert."""
        if stats is None or self.rotation is not None or not gpu.enabled(weights[0]):
            return super().quantize_stacks(names, weights, stats)
        return self._quantize_batch(weights, _hessians(weights, stats))

    def _quantize_batch(self, weights: Sequence[Tensor], hessians: Tensor) -> list[QuantizedWeight]:
        """On a GPU, of as many linear groups at once as there are Hessians, fp32 `[n, in, in]`: stacks `[n, out, in]`.

        On static groups columns are corrected by the errors of the weights as they were (quant/cholesky.py), which
        needs no inverse. A group that takes its grid on arrival must see the columns after it as the CPU's loop does.
        """
        width, rows = self.columns(weights[0]), [weight.shape[1] for weight in weights]
        values = torch.cat([weight.float() for weight in weights], 1).mT.contiguous()  # [n, in, rows]
        energy = hessians.diagonal(dim1=1, dim2=2)
        dead = energy <= 0
        mean = energy.masked_fill(dead, 0).sum(1, keepdim=True) / (~dead).sum(1, keepdim=True)
        energy = (energy / mean).masked_fill_(dead, 1)
        values.masked_fill_(dead[..., None], 0)
        order = channel = torch.arange(energy.shape[1], device=energy.device).expand(energy.shape).contiguous()
        fixed = None
        if self.static_groups:
            stored, fixed = self._grids(*group_extremes(values.mT, width), rows, self.aux_dtype)
        if self.act_order:
            order = energy.argsort(dim=1, descending=True, stable=True)
            values = values.gather(1, order[..., None].expand_as(values))

        last = order.flip(1)
        numbers = torch.arange(len(order), device=order.device)[:, None, None]
        backwards = hessians[numbers, last[:, :, None], last[:, None]]
        backwards /= mean[..., None]
        backwards.diagonal(dim1=1, dim2=2).copy_(energy.gather(1, last))
        unit, damping = unit_factors(backwards, self.damping, inverse=not self.static_groups)
        del backwards

        groups = ((order if self.static_groups else channel) // width).int()
        codes, extremes = self._sweep_batch(values, unit, width, groups, fixed)
        if fixed is None:
            stored, fixed = self._grids(*extremes, rows, self.aux_dtype)
            if self.aux_dtype != "fp16":
                codes, _ = self._sweep_batch(values, unit, width, groups, fixed)
        permuted = self.act_order and not self.static_groups
        if self.act_order and not permuted:
            codes = torch.empty_like(codes).scatter_(1, order[..., None].expand_as(codes), codes)
        return [
            QuantizedWeight.build(
                part.contiguous(),
                scale,
                nbits=self.nbits,
                group_size=width,
                zero=zero,
                permutation=order if permuted else None,
                method="gptq",
                diagnostics={"damping": damping},
            )
            for part, (scale, zero) in zip(codes.mT.split(rows, 1), stored, strict=True)
        ]

    def _sweep_batch(
        self, original: Tensor, unit: Tensor, width: int, group_of: Tensor, fixed: Grids | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The column loop over fp32 `[n, in, rows]`, with one kernel a block; `group_of`, int32 `[n, in]`, of a column.

        Returns the codes, uint8 `[n, in, rows]`, and the extremes `[n, rows, groups]`, which mean something without
        `fixed` grids.
        """
        from qbench.kernels import gptq as kernels

        values, given = original.clone(), original if self.static_groups else None
        n, columns, rows = values.shape
        codes = torch.empty_like(values, dtype=torch.uint8)
        lows, highs = (values.new_empty(n, -(-columns // width), rows) for _ in range(2))
        size = min(self.block_size, kernels.LARGEST_BLOCK)
        errors = values.new_empty(n, size, rows)
        alone = fixed is None and width > size  # a group of several blocks: no block holds all it takes its grid from
        for start, stop in blocks(columns, width, size):
            if alone and start % width == 0:
                low, high = group_extremes(values[:, start : start + width].mT, width)
                lows[:, start // width], highs[:, start // width] = low[..., 0], high[..., 0]
                _, taken = self._grids(low, high, [rows], "fp16")
            grids = (taken, torch.zeros_like(group_of)) if alone else None if fixed is None else (fixed, group_of)
            kernels.sweep_block(
                values, given, unit, codes, errors, start, stop, width, self.nbits, self.symmetric, (lows, highs),
                grids,
            )  # fmt: skip
            if stop < columns:
                values[:, stop:].baddbmm_(unit[:, start:stop, stop:].mT, errors[:, : stop - start])
        return codes, (lows.mT, highs.mT)


def _hessian(weights: Sequence[Tensor], stats: InputStatistics | None) -> Tensor:
    """X^T X of the group's input, fp64 on a CPU and fp32 elsewhere; raises ValueError if it is of no use."""
    hessian = _given(weights, stats)
    if not torch.isfinite(hessian).all():
        raise ValueError(NOT_FINITE)
    if not (hessian.diagonal() > 0).any():
        raise ValueError(ALL_ZERO)
    device = weights[0].device
    return hessian.to(device, torch.float64 if device.type == "cpu" else torch.float32)


def _hessians(weights: Sequence[Tensor], stats: Sequence[InputStatistics | None]) -> Tensor:
    """Those of a batch, fp32 `[n, in, in]`; raises ValueError if one is of no use, and asks the device once."""
    given = [_given(weights, one).to(weights[0].device, torch.float32) for one in stats]
    hessians = given[0][None] if len(given) == 1 else torch.stack(given)
    finite, active = torch.isfinite(hessians).all(), (hessians.diagonal(dim1=1, dim2=2) > 0).any(1).all()
    finite, active = torch.stack([finite, active]).tolist()
    if not finite:
        raise ValueError(NOT_FINITE)
    if not active:
        raise ValueError(ALL_ZERO)
    return hessians


def _given(weights: Sequence[Tensor], stats: InputStatistics | None) -> Tensor:
    if stats is None or stats.hessian is None:
        raise ValueError("gptq needs the Hessian X^T X of the layer's input: run it with calibration data")
    columns = {weight.shape[-1] for weight in weights}
    if columns != {stats.hessian.shape[-1]}:
        raise ValueError(f"the weights have {sorted(columns)} input channels, the Hessian {list(stats.hessian.shape)}")
    return stats.hessian


def blocks(columns: int, width: int, size: int) -> Iterator[tuple[int, int]]:
    """Cuts the columns into blocks of at most `size`, each of whole groups of `width` or within one group.

    So no group reaches from the middle of a block into columns that still lack that block's corrections.
    """
    span = max(size // width, 1) * width
    for begin in range(0, columns, span):
        end = min(begin + span, columns)
        for start in range(begin, end, size):
            yield start, min(start + size, end)
