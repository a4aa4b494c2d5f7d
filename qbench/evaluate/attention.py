"""Attention over a static cache as serving engines have it, registered with transformers under NAME.

One new token per sequence: transformers hands a compiled step's cache to torch's attention with a mask, and with a
copy of keys and values for every query head that shares them. Here it is two launches on a GPU, and plain torch on a
CPU (kernels/attend.py); where the cache holds latents, as DeepSeek's does, no keys and values are made of them. A
prompt that fills the cache needs no mask, which transformers does not see while a CUDA graph is captured. All else is
transformers' "sdpa", and all of it where a model's own code asks for that name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getsource, signature
from typing import Any

import torch
from torch import Tensor, nn

from qbench.kernels.attend import attend_latent, attend_one, attend_plainly, dual_attend_latent
from qbench.kernels.tiles import Tiles
from qbench.layers.linear import QuantLinear

NAME = "qbench_static"
ASKS_FOR_SDPA = re.compile(r"_attn_implementation (==|in) .*[\"']sdpa[\"']")


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query `[batch, heads, 1, width]`, key and value `[batch, shared heads, length, width]` -> `[batch, 1, heads, .]`.

    The mask is `[batch or 1, 1, 1, length]`, true where the token may look.
    """
    special = any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    latent = query.shape[-1] != key.shape[-1]  # what `_as_cached` hands on
    if special or query.shape[2] != 1 or attention_mask is None or attention_mask.dtype != torch.bool:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if latent:
            key, value = type(module).expand_kv(module, value, key)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    given = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if given is None else given
    if latent:
        return _over_latents(query, value, key, module.kv_b_proj, attention_mask, scale), None
    return (attend_one if query.is_cuda else attend_plainly)(query, key, value, attention_mask, scale), None


def _as_cached(kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of a module's expand_kv, which makes keys and values of latents."""
    return k_rot, kv_nope


def _keeps_latents(module: nn.Module) -> bool:
    """Whether its expand_kv makes what `attend_latent` computes with, of a weight that it can be given."""
    linear = getattr(module, "kv_b_proj", None)
    if not callable(getattr(type(module), "expand_kv", None)) or getattr(linear, "bias", None) is not None:
        return False
    if tuple(signature(type(module).expand_kv).parameters) != ("self", "kv_nope", "k_rot"):
        return False
    if isinstance(linear, QuantLinear):
        return linear.kernel is None or isinstance(linear.layout, Tiles)
    return type(linear) is nn.Linear and "forward" not in vars(linear)  # an offloaded weight comes when it is called


def _over_latents(query, latent, rotary, linear: nn.Module, mask: Tensor, scale: float) -> Tensor:
    if isinstance(linear, QuantLinear) and linear.kernel is not None:
        return dual_attend_latent(query, latent, rotary, *linear.layout.flat(), mask, scale)
    weight = linear.quantized.dequantize(query.dtype) if isinstance(linear, QuantLinear) else linear.weight
    return attend_latent(query, latent, rotary, weight, mask, scale)


def mask(q_length: int, kv_length: int, **options: Any) -> Tensor | None:
    """None, which is causal, for a prompt that fills the cache; else transformers' mask."""
    from transformers.masking_utils import sdpa_mask

    given = options.get("attention_mask") is not None or options.get("local_size") is not None
    if q_length == kv_length and q_length > 1 and not given and options.get("allow_is_causal_skip", True):
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, **options)


def _asks_for_sdpa(model: nn.Module) -> bool:
    """Whether a model computes something else under another name: DeepSeek-V3.2's masks what its indexer left out only
    where its attention is called "sdpa"."""
    for name in {type(module).__module__ for module in model.modules()}:
        if not name.startswith("torch."):
            try:
                if ASKS_FOR_SDPA.search(getsource(sys.modules[name])):
                    return True
            except (OSError, TypeError, KeyError):  # no source to be read
                continue
    return False


@contextmanager
def static(model: Any) -> Iterator[None]:
    """While it lasts, `model` attends through `attend` and `mask`, if it attended through transformers' "sdpa"."""
    before = getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None)
    if before != "sdpa" or _asks_for_sdpa(model):
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    latents = [module for module in model.modules() if _keeps_latents(module)]
    try:
        model.set_attn_implementation(NAME)
        for module in latents:
            module.expand_kv = _as_cached
        yield
    finally:
        for module in latents:
            vars(module).pop("expand_kv", None)
        model.set_attn_implementation(before)
