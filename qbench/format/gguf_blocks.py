"""The block types of GGUF, decoded on any device: uint8 blocks `[n, bytes]` to fp32 `[n, weights]`.

Each decoder computes in fp32, in the order of the package gguf's numpy decoder, which is the reference: the numbers are
its own to the bit (tests/format/test_gguf.py). The fixed grids of the IQ types are that package's. A block holds
consecutive input channels of one row: codes, one or two fp16 scales, and in the wide types scales for parts of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

K = 256  # weights in a block of the wide types
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1, doubled
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class BlockType(NamedTuple):
    number: int  # in a file
    weights: int  # in a block, consecutive input channels
    nbytes: int  # of a block
    decode: Callable[[Tensor], Tensor]
    halves: tuple[int, ...]  # where fp16 scales lie in it; a value that is not finite marks a damaged file


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of each block, fp32 `[n, 1]`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _fields(part: Tensor, width: int, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Bit fields of bytes `[n, m]`, uint8 `[n, m * fields]`: of `width` bytes the first field each, then the next."""
    shift = torch.tensor(shifts, dtype=torch.uint8, device=part.device).view(1, 1, -1, 1)
    return ((part.unflatten(1, (-1, width)).unsqueeze(2) >> shift) & mask).flatten(1)


def _nibbles(part: Tensor, width: int) -> Tensor:
    return _fields(part, width, (0, 4), 15)


def _bits(part: Tensor) -> Tensor:
    """Single bits, the lowest first: uint8 `[n, 8 m]`."""
    return _fields(part, 1, tuple(range(8)), 1)


def _words(part: Tensor, size: int) -> Tensor:
    """Little-endian unsigned integers of `size` bytes, int64 `[n, m / size]`."""
    shift = torch.arange(0, 8 * size, 8, device=part.device)
    return (part.unflatten(1, (-1, size)).long() << shift).sum(2)


def _signs(bits: Tensor) -> Tensor:
    return 1 - 2 * bits.float()


def _table(values: tuple[int, ...], index: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=index.device)[index.long()]


@functools.lru_cache(maxsize=32)
def _grid(name: str, device: torch.device) -> Tensor:
    """The points of an IQ type, fp32 `[points, 4 or 8]`."""
    from gguf import quants

    cls = getattr(quants, name)
    cls.init_grid()
    return torch.from_numpy(cls.grid.reshape(cls.grid_shape).copy()).to(device)


@functools.lru_cache(maxsize=4)
def _parity_signs(device: torch.device) -> Tensor:
    """The signs of 8 weights that 7 bits stand for, the eighth making their product positive: fp32 `[128, 8]`."""
    from gguf import quants

    return _signs(_bits(torch.tensor(list(quants.IQ2_XXS.ksigns), dtype=torch.uint8).view(-1, 1))).to(device)


def _scaled(scale: Tensor, values: Tensor) -> Tensor:
    """Values `[n, ...]` times a scale for each of equal parts of a block, `[n, parts]`: `[n, weights]`."""
    return (scale.unsqueeze(2) * values.reshape(*scale.shape, -1)).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:], 16).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _nibbles(b[:, 4:], 16).float() + _half(b, 2)


def _q5(codes: Tensor, high: Tensor) -> Tensor:
    return (codes | (_bits(high) << 4)).float()


def _q5_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_q5(_nibbles(b[:, 6:], 16), b[:, 2:6]) - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _q5(_nibbles(b[:, 8:], 16), b[:, 4:8]) + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return _half(b, 0) * b[:, 2:].view(torch.int8).float()


def _q2_k(b: Tensor) -> Tensor:
    scale, minimum = _half(b, 80) * (b[:, :16] & 15).float(), _half(b, 82) * (b[:, :16] >> 4).float()
    codes = _fields(b[:, 16:80], 32, (0, 2, 4, 6), 3).float()
    return _scaled(scale, codes) - minimum.repeat_interleave(16, 1)


def _q3_k(b: Tensor) -> Tensor:
    low, high = _nibbles(b[:, 96:104], 8), _fields(b[:, 104:108], 4, (0, 2, 4, 6), 3)
    scale = _half(b, 108) * ((low | (high << 4)).float() - 32)
    codes = _fields(b[:, 32:96], 32, (0, 2, 4, 6), 3).float()
    absent = _fields(b[:, :32], 32, tuple(range(8)), 1) ^ 1  # the third bit, inverted
    return _scaled(scale, codes - 4 * absent.float())


def _k_scales(part: Tensor) -> tuple[Tensor, Tensor]:
    """8 scales and 8 minima of 6 bits out of 12 bytes, fp32 `[n, 8]` each."""
    d, m, both = part[:, :4], part[:, 4:8], part[:, 8:]
    scale = torch.cat([d & 63, (both & 15) | ((d >> 2) & 48)], 1)
    minimum = torch.cat([m & 63, (both >> 4) | ((m >> 2) & 48)], 1)
    return scale.float(), minimum.float()


def _q45_k(b: Tensor, codes: Tensor) -> Tensor:
    scale, minimum = _k_scales(b[:, 4:16])
    return _scaled(_half(b, 0) * scale, codes) - (_half(b, 2) * minimum).repeat_interleave(32, 1)


def _q4_k(b: Tensor) -> Tensor:
    return _q45_k(b, _nibbles(b[:, 16:], 32).float())


def _q5_k(b: Tensor) -> Tensor:
    high = _fields(b[:, 16:48], 32, tuple(range(8)), 1)
    return _q45_k(b, (_nibbles(b[:, 48:], 32) | (high << 4)).float())


def _q6_k(b: Tensor) -> Tensor:
    codes = _nibbles(b[:, :128], 64) | (_fields(b[:, 128:192], 32, (0, 2, 4, 6), 3) << 4)
    return _scaled(_half(b, 208) * b[:, 192:208].contiguous().view(torch.int8).float(), codes.float() - 32)


def _tq1_0(b: Tensor) -> Tensor:
    """Five ternary digits a byte, read off the top after a multiplication by a power of 3."""
    parts = []
    for part, width, digits in ((b[:, :32], 32, 5), (b[:, 32:48], 16, 5), (b[:, 48:52], 4, 4)):
        power = torch.tensor([3**i for i in range(digits)], dtype=torch.uint8, device=b.device).view(1, 1, -1, 1)
        parts.append((part.unflatten(1, (-1, width)).unsqueeze(2) * power).flatten(1))
    digits = (torch.cat(parts, 1).int() * 3) >> 8
    return _half(b, 52) * (digits.float() - 1)


def _tq2_0(b: Tensor) -> Tensor:
    return _half(b, 64) * (_fields(b[:, :64], 32, (0, 2, 4, 6), 3).float() - 1)


def _mxfp4(b: Tensor) -> Tensor:
    exponent = b[:, :1].int()  # e8m0, halved; below 2 the half is no normal number
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1).clamp(min=0) << 23)
    return bits.view(torch.float32) * _table(FP4, _nibbles(b[:, 1:], 16))


def _nvfp4(b: Tensor) -> Tensor:
    x = b[:, :4]  # e4m3 without a sign, one for 16 weights
    exponent, mantissa = ((x >> 3) & 15).float(), (x & 7).float()
    raw = torch.where(exponent == 0, mantissa * 2**-9, (1 + mantissa / 8) * torch.exp2(exponent - 7))
    scale = torch.where((x == 0) | (x == 127), 0.0, raw * 0.5)
    return _scaled(scale, _table(FP4, _nibbles(b[:, 4:], 8)))


def _quarters(b: Tensor, part: Tensor) -> Tensor:
    """The scales of 16 weights each from nibbles, as IQ2_XS and IQ2_S have them."""
    return _half(b, 0) * (0.5 + _nibbles(part, 1).float()) * 0.25


def _iq2_xxs(b: Tensor) -> Tensor:
    pairs = b[:, 2:].reshape(-1, 8)  # four points and a word of four signs and a scale, for 32 weights
    word = _words(pairs[:, 4:].contiguous(), 4)
    scale = _half(b, 0) * (0.5 + (word >> 28).float().view(len(b), -1)) * 0.25
    return _scaled(scale, _grid("IQ2_XXS", b.device)[pairs[:, :4].long()].flatten(1)) * _word_signs(word, len(b))


def _word_signs(word: Tensor, blocks: int) -> Tensor:
    """Four times 7 bits of a 32-bit word as the signs of 32 weights: `[blocks, weights]`."""
    index = (word.view(-1, 1) >> torch.tensor((0, 7, 14, 21), device=word.device)) & 127
    return _parity_signs(word.device)[index].reshape(blocks, -1)


def _iq2_xs(b: Tensor) -> Tensor:
    word = _words(b[:, 2:66], 2)
    values = _grid("IQ2_XS", b.device)[word & 511].flatten(1)
    return _scaled(_quarters(b, b[:, 66:]), values) * _parity_signs(b.device)[word >> 9].flatten(1)


def _iq2_s(b: Tensor) -> Tensor:
    index = b[:, 2:34].int() | (_fields(b[:, 66:74], 1, (0, 2, 4, 6), 3).int() << 8)
    values = _grid("IQ2_S", b.device)[index].flatten(1)
    return _scaled(_quarters(b, b[:, 74:]), values) * _signs(_bits(b[:, 34:66]))


def _iq3_xxs(b: Tensor) -> Tensor:
    word = _words(b[:, 66:], 4)
    scale = _half(b, 0) * (0.5 + (word >> 28).float()) * 0.5
    return _scaled(scale, _grid("IQ3_XXS", b.device)[b[:, 2:66].long()].flatten(1)) * _word_signs(word, len(b))


def _iq3_s(b: Tensor) -> Tensor:
    index = b[:, 2:66].int() | (_bits(b[:, 66:74]).int() << 8)
    scale = _half(b, 0) * (1 + 2 * _nibbles(b[:, 106:], 1)).float()
    return _scaled(scale, _grid("IQ3_S", b.device)[index].flatten(1)) * _signs(_bits(b[:, 74:106]))


def _iq1_s(b: Tensor) -> Tensor:
    word = _words(b[:, 34:], 2)  # a sign, a scale of 3 bits and four times 3 high bits of an index, for 32 weights
    scale = _half(b, 0) * (2 * ((word >> 12) & 7) + 1).float()
    delta = torch.where((word & 0x8000) == 0, 0.125, -0.125)
    high = (word.unsqueeze(2) >> torch.tensor((0, 3, 6, 9), device=b.device)) & 7
    values = _grid("IQ1_S", b.device)[b[:, 2:34].long() | (high << 8).flatten(1)].flatten(1)
    return _scaled(scale, values + delta.repeat_interleave(32, 1))


def _iq1_m(b: Tensor) -> Tensor:
    """The one type whose fp16 scale lies in parts: the top nibbles of its four scale words."""
    word = _words(b[:, 48:], 2)
    parts = (word & 0xF000) >> torch.tensor((12, 8, 4, 0), device=b.device)
    d = parts.sum(1, keepdim=True)
    d = torch.where(d < 0x8000, d, d - 0x10000).to(torch.int16).view(torch.float16).float()
    scale = d * (2 * ((word.unsqueeze(2) >> torch.tensor((0, 3, 6, 9), device=b.device)) & 7).flatten(1) + 1).float()
    high = _nibbles(b[:, 32:48], 1)
    delta = torch.where((high & 8) == 0, 0.125, -0.125)
    values = _grid("IQ1_M", b.device)[b[:, :32].int() | ((high & 7).int() << 8)].flatten(1)
    return _scaled(scale, values + delta.repeat_interleave(8, 1))


def _iq4_nl(b: Tensor) -> Tensor:
    return _half(b, 0) * _table(IQ4, _nibbles(b[:, 2:], 16))


def _iq4_xs(b: Tensor) -> Tensor:
    high = (_words(b[:, 2:4], 2) >> torch.arange(0, 16, 2, device=b.device)) & 3
    scale = (_nibbles(b[:, 4:8], 1).int() | (high.int() << 4)).float() - 32
    return _scaled(_half(b, 0) * scale, _table(IQ4, _nibbles(b[:, 8:], 16)))


FLOATS = ("F32", "F16", "BF16")  # single numbers, for what is not quantized
TYPES: dict[str, BlockType] = {
    "F32": BlockType(0, 1, 4, lambda b: b.contiguous().view(torch.float32), ()),
    "F16": BlockType(1, 1, 2, lambda b: _half(b, 0), (0,)),
    "BF16": BlockType(30, 1, 2, lambda b: b.contiguous().view(torch.bfloat16).float(), ()),
    "Q4_0": BlockType(2, 32, 18, _q4_0, (0,)),
    "Q4_1": BlockType(3, 32, 20, _q4_1, (0, 2)),
    "Q5_0": BlockType(6, 32, 22, _q5_0, (0,)),
    "Q5_1": BlockType(7, 32, 24, _q5_1, (0, 2)),
    "Q8_0": BlockType(8, 32, 34, _q8_0, (0,)),
    "Q2_K": BlockType(10, K, 84, _q2_k, (80, 82)),
    "Q3_K": BlockType(11, K, 110, _q3_k, (108,)),
    "Q4_K": BlockType(12, K, 144, _q4_k, (0, 2)),
    "Q5_K": BlockType(13, K, 176, _q5_k, (0, 2)),
    "Q6_K": BlockType(14, K, 210, _q6_k, (208,)),
    "IQ2_XXS": BlockType(16, K, 66, _iq2_xxs, (0,)),
    "IQ2_XS": BlockType(17, K, 74, _iq2_xs, (0,)),
    "IQ3_XXS": BlockType(18, K, 98, _iq3_xxs, (0,)),
    "IQ1_S": BlockType(19, K, 50, _iq1_s, (0,)),
    "IQ4_NL": BlockType(20, 32, 18, _iq4_nl, (0,)),
    "IQ3_S": BlockType(21, K, 110, _iq3_s, (0,)),
    "IQ2_S": BlockType(22, K, 82, _iq2_s, (0,)),
    "IQ4_XS": BlockType(23, K, 136, _iq4_xs, (0,)),
    "IQ1_M": BlockType(29, K, 56, _iq1_m, ()),
    "TQ1_0": BlockType(34, K, 54, _tq1_0, (52,)),
    "TQ2_0": BlockType(35, K, 66, _tq2_0, (64,)),
    "MXFP4": BlockType(39, 32, 17, _mxfp4, ()),
    "NVFP4": BlockType(40, 64, 36, _nvfp4, ()),
}
