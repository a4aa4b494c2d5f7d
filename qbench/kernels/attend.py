"""Attention of one new token over a static cache: an op of torch.library, in two launches on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.kernels.routes import has_triton


@torch.library.custom_op("qbench::attend_one", mutates_args=())
def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query `[batch, heads, 1, width]`, key and value `[batch, shared heads, length, width]` -> `[batch, 1, heads, .]`.

    The mask is bool `[batch or 1, 1, 1, length]`, true where the token may look; heads that share a key are rows of one
    product. Softmax is in fp32.
    """
    return attend_plainly(query, key, value, mask, scale)


@attend_one.register_fake
def _(query, key, value, mask, scale):
    return query.new_empty(len(query), 1, query.shape[1], value.shape[-1])


@attend_one.register_kernel("cuda")
def _(query, key, value, mask, scale):
    if not has_triton():
        return attend_plainly(query, key, value, mask, scale)
    from qbench.kernels import triton_attend

    return triton_attend.attend(query, key, value, mask, scale)


def attend_plainly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same in plain torch, which a compiler fuses."""
    batch, heads, _, width = query.shape
    query = query.reshape(batch, key.shape[1], -1, width) * scale
    scores = (query @ key.transpose(-1, -2)).float().masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).to(value.dtype) @ value).reshape(batch, 1, heads, value.shape[-1])
