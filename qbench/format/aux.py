"""Aux as stored. Scales and zero points: 16-bit floats, or 8-bit integers with a small table of their own.

With `int8`, consecutive values of a matrix (row-major over `[out, groups]`) form blocks of 64 that share a step and
an offset in fp16, as in the double quantization of QLoRA (arXiv 2305.14314): 8.5 bits per value instead
of 16. Integer zero points keep a step of one, so they survive exactly as long as a block spans at most 255.

An input scale t is one number a channel, in fp16, or in 8 bits without any table: e4m3, held as the bytes that it is
(uint8), or integers in units of 1/128, held less 128 (int8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
AUX_DTYPES = ("fp16", "int8")
INPUT_SCALE_DTYPES = {"fp16": torch.float16, "fp8": torch.uint8, "int8": torch.int8}
UNITS = 128  # in one, of t in int8
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
        """Stores `values` `[..., out, groups]`; ValueError for another `aux_dtype` or a value that fp16 cannot hold."""
        if aux_dtype not in AUX_DTYPES:
            raise ValueError(f"aux_dtype must be one of {', '.join(AUX_DTYPES)}, got {aux_dtype!r}")
        if not values.abs().amax() <= FP16_MAX:  # NaN is not, either
            raise ValueError(f"a scale or zero point is not a finite number below {FP16_MAX:.0f}")
        if aux_dtype == "fp16":
            return Aux(values.half())
        flat = values.float().flatten(-2) if values.ndim > 1 else values.float()
        count = flat.shape[-1]
        padding = flat[..., -1:].expand(*flat.shape[:-1], -count % BLOCK)
        padded = torch.cat([flat, padding], -1).unflatten(-1, (-1, BLOCK))
        low, high = padded.amin(-1), padded.amax(-1)
        step = (high - low) / 255
        integers = (padded == padded.round()).all(-1) & (high - low <= 255) & (low.abs() <= 2048)
        step = torch.where(integers, torch.ones_like(step), step).clamp_min(FP16_TINY).half()
        offset = low.half()
        codes = ((padded - offset.float().unsqueeze(-1)) / step.float().unsqueeze(-1)).round().clamp(0, 255)
        stored = codes.to(torch.uint8).flatten(-2)[..., :count].reshape(values.shape)
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


def store_input_scale(t: Tensor, t_dtype: str) -> Tensor:
    """t `[..., in]`, positive, as it is stored; `dense_input_scale` gives what it then stands for.

    In 8 bits t is to be used relative to the other channels, since group scales make up for any common factor: fp8
    holds t over its median, int8 t over half its largest. Raises ValueError for another name.
    """
    if t_dtype not in INPUT_SCALE_DTYPES:
        raise ValueError(f"t_dtype must be one of {', '.join(INPUT_SCALE_DTYPES)}, got {t_dtype!r}")
    if t_dtype == "fp8":
        middle = t / t.median(-1, keepdim=True).values
        # from the least positive number to the largest
        return middle.clamp(2.0**-9, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    if t_dtype == "int8":
        return ((t / t.amax(-1, keepdim=True) * 255).round().clamp(1, 255) - UNITS).to(torch.int8)
    return t.half()


def dense_input_scale(stored: Tensor) -> Tensor:
    """t in fp32; what is stored in 8 bits is exact in fp16 too."""
    if stored.dtype == torch.int8:
        return (stored.float() + UNITS) / UNITS
    return (stored.view(torch.float8_e4m3fn) if stored.dtype == torch.uint8 else stored).float()
