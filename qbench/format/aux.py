"""Scales and zero points as stored: 16-bit floats, or 8-bit integers with a small table of their own.

With `int8`, consecutive values (row-major over `[..., out, groups]`) form blocks of 64 that share a step and
an offset in fp16, as in the double quantization of QLoRA (arXiv 2305.14314): 8.5 bits per value instead
of 16. Integer zero points keep a step of one, so they survive exactly as long as a block spans at most 255.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
AUX_DTYPES = ("fp16", "int8")
FP16_MAX = 65504.0
FP16_TINY = 2.0**-24  # the smallest positive fp16; a scale below it would be stored as zero


@dataclass(frozen=True)
class Aux:
    """Values `[..., out, groups]`; `step` is None when `stored` holds them directly in fp16."""

    stored: Tensor  # fp16, or uint8 codes of the same shape
    step: Tensor | None = None  # fp16 [blocks], or [experts, blocks] when every matrix of a stack has its own
    offset: Tensor | None = None  # the same shape

    @staticmethod
    def compress(values: Tensor, aux_dtype: str) -> Aux:
        """Stores `values` in `aux_dtype`; raises ValueError for another name or a value fp16 cannot hold."""
        if aux_dtype not in AUX_DTYPES:
            raise ValueError(f"aux_dtype must be one of {', '.join(AUX_DTYPES)}, got {aux_dtype!r}")
        if not torch.isfinite(values).all() or values.abs().max() > FP16_MAX:
            raise ValueError(f"a scale or zero point is not a finite number below {FP16_MAX:.0f}")
        if aux_dtype == "fp16":
            return Aux(values.half())
        flat = values.float().flatten()
        padded = torch.cat([flat, flat[-1:].expand(-flat.numel() % BLOCK)]).view(-1, BLOCK)
        low, high = padded.amin(1), padded.amax(1)
        step = (high - low) / 255
        integers = (padded == padded.round()).all(1) & (high - low <= 255) & (low.abs() <= 2048)
        step = torch.where(integers, torch.ones_like(step), step).clamp_min(FP16_TINY).half()
        offset = low.half()
        codes = ((padded - offset.float()[:, None]) / step.float()[:, None]).round().clamp(0, 255)
        stored = codes.to(torch.uint8).flatten()[: flat.numel()].view(values.shape)
        return Aux(stored.clone(), step, offset)  # a view would keep the padding in memory

    def dense(self) -> Tensor:
        """The values in fp32, `[..., out, groups]`."""
        if self.step is None or self.offset is None:
            return self.stored.float()
        values = self.stored.float().reshape(*self.step.shape[:-1], -1)
        step, offset = (
            part.float().repeat_interleave(BLOCK, -1)[..., : values.shape[-1]] for part in (self.step, self.offset)
        )
        return (values * step + offset).view(self.stored.shape)
