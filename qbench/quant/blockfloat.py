"""Rounds weights `[out, in]` to small floats that share a scale per block: the arithmetic behind fp8, mxfp4 and nvfp4.

Stacks `[experts, out, in]` as well. Everything is computed in fp32, whatever the weight's type. Elements round to
nearest, ties to the even code, and saturate. Scales come from the largest magnitude (`absmax`) of a block, as
compressed-tensors computes them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qbench.format.blockfloat import (
    E2M1,
    E2M1_MAX,
    E4M3_MAX,
    EXPONENT_BIAS,
    MX_BLOCK,
    NV_BLOCK,
    FP8Weight,
    MXFP4Weight,
    NVFP4Weight,
    power_of_two,
)  # fmt: skip
from qbench.format.packing import pack
from qbench.format.weight import per_group

LEAST_SCALE = torch.finfo(torch.float32).eps  # in place of 0, the scale of a block of zeros
LEAST_E4M3 = 0.125  # the same for a scale in e4m3
EXPONENTS = ("floor", "even", "ceil")


def round_to_fp8(weight: Tensor, block: tuple[int, int], method: str = "fp8") -> FP8Weight:
    """e4m3 codes under fp32 scales absmax / 448, one for every `block` of rows and input channels."""
    scale = block_absmax(weight, *block) / E4M3_MAX
    scale = torch.where(scale == 0, LEAST_SCALE, scale)
    divisor = scale.repeat_interleave(block[0], -2)[..., : weight.shape[-2], :]
    codes = e4m3(per_group(weight.to(torch.float32, copy=True), block[1], divisor, torch.Tensor.div_))
    return FP8Weight(tuple(weight.shape), codes, scale, method, block=block)


def round_to_mxfp8(weight: Tensor, exponent: str, method: str = "mxfp8") -> FP8Weight:
    """e4m3 codes under a power of two for every 32 input channels of a row."""
    scaled, stored = _by_shared_exponent(weight, exponent, E4M3_MAX, mantissa_bits=3)
    return FP8Weight(tuple(weight.shape), e4m3(scaled), stored, method, block=(1, MX_BLOCK))


def round_to_mxfp4(weight: Tensor, exponent: str, method: str = "mxfp4") -> MXFP4Weight:
    """e2m1 codes under a power of two for every 32 input channels of a row."""
    scaled, stored = _by_shared_exponent(weight, exponent, E2M1_MAX, mantissa_bits=1)
    return MXFP4Weight(tuple(weight.shape), *pack(e2m1(scaled), 4), stored, method)


def round_to_nvfp4(weight: Tensor, absmax: float | Tensor, method: str = "nvfp4") -> NVFP4Weight:
    """e2m1 codes under an e4m3 scale for every 16 input channels of a row, and one scale for all.

    The latter maps `absmax`, the largest magnitude of all weights that share it, `[...]`, to the largest product of a
    scale and a code, 448 * 6.
    """
    largest = torch.as_tensor(absmax, dtype=torch.float32, device=weight.device)[..., None, None]
    overall = E4M3_MAX * E2M1_MAX / largest.clamp_min(torch.finfo(torch.float32).tiny)
    overall = overall.nan_to_num(posinf=1.0)  # of weights that are all zero
    scale = (overall * (block_absmax(weight, 1, NV_BLOCK) / E2M1_MAX)).clamp_max(E4M3_MAX)
    dense = scale.to(torch.float8_e4m3fn).float()
    dense = torch.where(dense == 0, LEAST_E4M3, dense)
    codes = e2m1(per_group(weight.to(torch.float32, copy=True), NV_BLOCK, dense / overall, torch.Tensor.div_))
    return NVFP4Weight(tuple(weight.shape), *pack(codes, 4), e4m3(dense), method, global_scale=overall)


def block_absmax(weight: Tensor, rows: int, columns: int) -> Tensor:
    """Largest magnitude, fp32 `[..., blocks of rows, blocks of columns]`; ValueError where one is not finite."""
    sizes = F.pad(weight.float().abs(), (0, -weight.shape[-1] % columns, 0, -weight.shape[-2] % rows))
    largest = sizes.unflatten(-2, (-1, rows)).unflatten(-1, (-1, columns)).amax((-3, -1))
    if not torch.isfinite(largest).all():
        raise ValueError("the weight holds NaN or Inf")
    return largest


def shared_exponent(absmax: Tensor, rule: str, largest: float, mantissa_bits: int) -> Tensor:
    """The exponent, int32, that a block shares whose largest magnitude is `absmax`, for elements up to `largest`.

    floor  floor(log2 absmax) - floor(log2 largest): the OCP's Microscaling Formats v1.0, section 6.3. Magnitudes that
           lie between `largest` and the next power of two are cut off.
    even   the same of absmax rounded to the elements' mantissa: compressed-tensors' for 4 bits, torchao's EVEN
    ceil   ceil(log2(absmax / largest)), which cuts nothing off: NVIDIA's recipe for MXFP8, arXiv 2506.08027
    """
    highest = torch.frexp(torch.tensor(largest)).exponent - 1
    if rule == "ceil":
        mantissa, exponent = torch.frexp(absmax / largest)
        return exponent - (mantissa == 0.5).int()
    mantissa, exponent = torch.frexp(absmax)  # absmax = mantissa * 2**exponent, mantissa in [0.5, 1)
    exponent = exponent - 1 - highest
    return exponent + (mantissa >= 1 - 2.0 ** -(mantissa_bits + 2)).int() if rule == "even" else exponent


def _by_shared_exponent(weight: Tensor, rule: str, largest: float, mantissa_bits: int) -> tuple[Tensor, Tensor]:
    """The weight over its blocks' scales, fp32 `[out, in]`, and the scales as e8m0, uint8 `[out, blocks]`."""
    absmax = block_absmax(weight, 1, MX_BLOCK)
    exponent = shared_exponent(absmax, rule, largest, mantissa_bits) + EXPONENT_BIAS
    stored = torch.where(absmax == 0, 0, exponent.clamp(0, 2 * EXPONENT_BIAS)).to(torch.uint8)
    values = weight.to(torch.float32, copy=True)
    return per_group(values, MX_BLOCK, power_of_two(stored), torch.Tensor.div_), stored


def e4m3(values: Tensor) -> Tensor:
    """The bytes, uint8, of the nearest e4m3 numbers."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def e2m1(values: Tensor) -> Tensor:
    """The codes, uint8 0 to 15, of the nearest e2m1 numbers."""
    sizes, codes = values.abs(), (values < 0).to(torch.uint8) << 3
    for code, (below, above) in enumerate(pairwise(E2M1[:8])):  # seven comparisons are faster than a search
        middle = (below + above) / 2
        codes += sizes >= middle if code % 2 else sizes > middle  # a tie goes to the even one of the two
    return codes
