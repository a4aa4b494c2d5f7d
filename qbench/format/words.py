"""Codes as one little-endian bit stream in 32-bit words: how AutoGPTQ, AutoAWQ and compressed-tensors store integers.

With 3, 5, 6 or 7 bits some codes straddle two words, so that 32 codes fill exactly `nbits` words.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def pack_words(values: Tensor, nbits: int) -> Tensor:
    """Packs integers of `nbits` bits `[n, m]` along `n` into int32 `[ceil(n * nbits / 32), m]`; what is over is 0."""
    count = -(-len(values) * nbits // WORD)
    values = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % WORD)).unflatten(0, (-1, WORD))
    words = torch.zeros(len(values), nbits, values.shape[2], dtype=torch.int64, device=values.device)
    for i in range(WORD):
        word, shift = divmod(i * nbits, WORD)
        value = values[:, i].long() << shift
        words[:, word] |= value
        if shift + nbits > WORD:
            words[:, word + 1] |= value >> WORD
    words = words & 0xFFFFFFFF
    return torch.where(words < 2**31, words, words - 2**32).int().flatten(0, 1)[:count]


def unpack_words(words: Tensor, nbits: int, count: int) -> Tensor:
    """Undoes `pack_words`: uint8 `[count, m]` out of int32 `[ceil(count * nbits / 32), m]`."""
    words = torch.nn.functional.pad(words, (0, 0, 0, -len(words) % nbits)).unflatten(0, (-1, nbits))
    values = torch.empty(len(words), WORD, words.shape[2], dtype=torch.uint8, device=words.device)
    for i in range(WORD):
        word, shift = divmod(i * nbits, WORD)
        value = words[:, word] >> shift
        if shift + nbits > WORD:
            low = (1 << (WORD - shift)) - 1
            value = (value & low) | (words[:, word + 1] << (WORD - shift))
        values[:, i] = (value & (2**nbits - 1)).to(torch.uint8)
    return values.flatten(0, 1)[:count]
