"""Attention over a static cache as serving engines have it, registered with transformers under NAME.

One new token per sequence: transformers hands a compiled step's cache to torch's attention with a mask, and with a
copy of keys and values for every query head that shares them. Here it is two launches on a GPU, and plain torch on a
CPU (kernels/attend.py). A prompt that fills the cache needs no mask, which transformers does not see while a CUDA graph
is captured. All else is transformers' "sdpa".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qbench.kernels.attend import attend_one, attend_plainly

NAME = "qbench_static"


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query `[batch, heads, 1, width]`, key and value `[batch, shared heads, length, width]` -> `[batch, 1, heads, .]`.

    The mask is `[batch or 1, 1, 1, length]`, true where the token may look.
    """
    special = any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if special or query.shape[2] != 1 or attention_mask is None or attention_mask.dtype != torch.bool:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaling = options.get("scaling")
    one = attend_one if query.is_cuda else attend_plainly
    return one(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def mask(q_length: int, kv_length: int, **options: Any) -> Tensor | None:
    """None, which is causal, for a prompt that fills the cache; else transformers' mask."""
    from transformers.masking_utils import sdpa_mask

    given = options.get("attention_mask") is not None or options.get("local_size") is not None
    if q_length == kv_length and q_length > 1 and not given and options.get("allow_is_causal_skip", True):
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, **options)


@contextmanager
def static(model: Any) -> Iterator[None]:
    """While it lasts, `model` attends through `attend` and `mask`, if it attended through transformers' "sdpa"."""
    before = getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None)
    if before != "sdpa":
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
