"""Attention of one new token over a static cache: ops of torch.library, two launches on a GPU, or four over latents.

    attend_one(query, key, value, mask)                     heads that share a key are rows of one product
    attend_latent(query, latent, rotary, weight, mask)      keys and values are products of one latent with `weight`

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) keeps one latent of a position, of which `weight` makes
every head's key and value. For one token it is less work to take `weight` to the query and to what was attended to, as
its section 2.1.2 says and serving engines do, than to make keys and values of all positions in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qbench.kernels import blocks, cuda, cuda_rotate, ops
from qbench.kernels import tiles as layout
from qbench.kernels.routes import has_triton
from qbench.kernels.tiles import Tiles


@torch.library.custom_op("qbench::attend_one", mutates_args=())
def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query `[batch, heads, 1, width]`, key and value `[batch, shared heads, length, width]` -> `[batch, 1, heads, .]`.

    The mask is bool `[batch or 1, 1, 1, length]`, true where the token may look. Softmax is in fp32.
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


@torch.library.custom_op("qbench::attend_latent", mutates_args=())
def attend_latent(query: Tensor, latent: Tensor, rotary: Tensor, weight: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query `[batch, heads, 1, own + turned]`, latent `[batch, 1, length, width]`, rotary `[batch, 1, length, turned]`,
    weight `[heads * (own + value), width]` -> `[batch, 1, heads, value]`.

    A head's key at a position is its first `own` rows of the weight times the latent, then the rotary; its value the
    other rows times the latent. Mask and softmax are those of `attend_one`.
    """
    return attend_latent_plainly(query, latent, rotary, weight, mask, scale)


@attend_latent.register_fake
def _(query, latent, rotary, weight, mask, scale):
    batch, heads, _, width = query.shape
    return query.new_empty(batch, 1, heads, weight.shape[0] // heads - width + rotary.shape[-1])


@attend_latent.register_kernel("cuda")
def _(query, latent, rotary, weight, mask, scale):
    if not has_triton():
        return attend_latent_plainly(query, latent, rotary, weight, mask, scale)
    from qbench.kernels import triton_attend

    return triton_attend.attend_latent(query, latent, rotary, weight, mask, scale)


@torch.library.custom_op("qbench::dual_attend_latent", mutates_args=())
def dual_attend_latent(
    query: Tensor,
    latent: Tensor,
    rotary: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    mask: Tensor,
    scale: float,
) -> Tensor:
    """`attend_latent` of a weight in tiles: what `Tiles.flat` gives."""
    weight = layout.dequantize(Tiles.over(tensors, numbers), query.dtype)
    return attend_latent_plainly(query, latent, rotary, weight, mask, scale)


@dual_attend_latent.register_fake
def _(query, latent, rotary, tensors, numbers, mask, scale):
    batch, heads, _, width = query.shape
    return query.new_empty(batch, 1, heads, numbers[0] // heads - width + rotary.shape[-1])


@dual_attend_latent.register_kernel("cuda")
def _(query, latent, rotary, tensors, numbers, mask, scale):
    """Of one token every head's value multiplies with its own rows of the tiles; its key's rows are written first."""
    tiles = Tiles.over(tensors, numbers)
    (batch, heads, _, width), dtype = query.shape, query.dtype
    own, rows, device = width - rotary.shape[-1], tiles.shape[0] // heads, query.device.index
    ready = all(cuda.refusal(device, kernel) is None for kernel in ("dual_linear", "dequantize"))
    plain = tiles.rotation is None and tiles.permutation is None and own % layout.ROWS == rows % layout.ROWS == 0
    if not (plain and ready and has_triton() and batch == 1 and dtype in ops.HALF):
        with torch.cuda.device(query.device):
            weight = _natural(tiles, dtype)
        return attend_latent(query, latent, rotary, weight, mask, scale)
    from qbench.kernels import triton_attend

    with torch.cuda.device(query.device):
        keys = cuda.dequantize(_of_heads(tiles, heads, 0, own), dtype)
        found = triton_attend.over_latents(query, latent, rotary, keys.flatten(0, 1), mask, scale)
        values = _of_heads(tiles, heads, own, rows)
        return cuda.own_matrices(found.view(heads, -1), values, blocks.pair_plan(heads * (rows - own))).view(
            1, 1, heads, -1
        )


def _of_heads(tiles: Tiles, heads: int, first: int, last: int) -> Tiles:
    """Rows `first` to `last` of every head, as a stack `[heads, last - first, in]` of views."""
    strips, rows = tiles.data.shape[0] // heads, slice(first // layout.ROWS, last // layout.ROWS)
    t = None if tiles.input_scale is None else tiles.input_scale.expand(heads, -1)
    data = tiles.data.view(heads, strips, *tiles.data.shape[1:])[:, rows]
    return replace(tiles, data=data, shape=(heads, last - first, tiles.shape[1]), input_scale=t)


def _natural(tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]` itself, as it multiplies an x that is neither rotated nor permuted."""
    undone = cuda_rotate.undoes(tiles, dtype) and cuda.refusal(tiles.data.device.index, "dequantize") is None
    if tiles.rotation is not None and not undone:
        return layout.dequantize(tiles, dtype)
    weight = ops._dequantize_on_gpu(tiles, dtype)
    if tiles.permutation is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, tiles.permutation.long(), weight)


def attend_plainly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same in plain torch, which a compiler fuses."""
    batch, heads, _, width = query.shape
    query = query.reshape(batch, key.shape[1], -1, width) * scale
    scores = (query @ key.transpose(-1, -2)).float().masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).to(value.dtype) @ value).reshape(batch, 1, heads, value.shape[-1])


def attend_latent_plainly(
    query: Tensor, latent: Tensor, rotary: Tensor, weight: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """The same in plain torch."""
    heads, own = query.shape[1], query.shape[-1] - rotary.shape[-1]
    of_key, of_value = weight.view(heads, -1, latent.shape[-1]).tensor_split([own], dim=1)
    inner = torch.cat((query[..., :own] @ of_key, query[..., own:]), -1)  # of the width of a latent + turned
    found = attend_plainly(inner, torch.cat((latent, rotary), -1), latent, mask, scale)
    return (found.transpose(1, 2) @ of_value.mT).transpose(1, 2)
