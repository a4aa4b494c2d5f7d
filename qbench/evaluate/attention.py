"""Attention of one new token per sequence over a static cache, registered with transformers under NAME.

transformers hands a compiled step's cache to torch's attention with a mask, and a copy of keys and values for every
query head that shares them. There the heads that share a key are rows of one matrix product instead, as serving
engines have it, in plain torch that a compiler fuses; softmax is in fp32. All else goes to transformers' "sdpa".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

NAME = "qbench_decode"


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query `[batch, heads, 1, width]`, key and value `[batch, shared heads, length, width]` -> `[batch, 1, heads, .]`.

    The mask is `[batch or 1, 1, 1, length]`, true where the token may look.
    """
    batch, heads, tokens, width = query.shape
    special = any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if special or tokens != 1 or attention_mask is None or attention_mask.dtype != torch.bool:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaling = options.get("scaling")
    query = query.reshape(batch, key.shape[1], -1, width) * (width**-0.5 if scaling is None else scaling)
    scores = (query @ key.transpose(-1, -2)).float().masked_fill(~attention_mask, -torch.inf)
    return (scores.softmax(-1).to(value.dtype) @ value).reshape(batch, 1, heads, value.shape[-1]), None


@contextmanager
def grouped(model: Any) -> Iterator[bool]:
    """While it lasts, `model` attends through `attend`, if it attended through transformers' "sdpa"; says whether."""
    before = getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None)
    if before != "sdpa":
        yield False
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        model.set_attn_implementation(NAME)
        yield True
    finally:
        model.set_attn_implementation(before)
