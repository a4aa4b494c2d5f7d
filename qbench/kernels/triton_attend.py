"""Attention of one new token over a static cache, in Triton launches: parts of the cache, then their sum.

A program takes a part of the positions for heads that share a key, so that keys and values are read once, and keeps
what it has in fp32: the largest score, the sum of exponentials, the sum of values. The second launch joins the parts.
Latents are key and value of all heads: a launch before takes queries to their columns, and one after makes values of
what was attended to.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.kernels.triton_experts import early_start, gdc_launch_dependents, gdc_wait

HEADS, POSITIONS = 16, 32  # of a program at a time; a tensor core's product has 16 rows
MOST_PARTS = 64  # of a cache, which the second launch holds at once


@triton.jit
def _parts(
    query, more_query, key, more_key, value, mask, sums, stats,
    scale, length, per, group, width, more_width, value_width, shared, pieces, splits,
    q_batch, q_head, r_batch, r_head, k_batch, k_head, k_at, e_batch, e_head, e_at, v_batch, v_head, v_at, m_batch,
    G: tl.constexpr, W: tl.constexpr, R: tl.constexpr, V: tl.constexpr, L: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`per` positions for G of the `group` heads that share a key; R columns of a key may lie apart."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    here, split = tl.program_id(0), tl.program_id(1)
    piece, head, batch = here % pieces, here // pieces % shared, here // pieces // shared
    g, w, r, d = piece * G + tl.arange(0, G), tl.arange(0, W), tl.arange(0, R), tl.arange(0, V)
    mine, heads = (g < group)[:, None], (head * group + g)[:, None]
    queries = tl.load(
        query + batch * q_batch + heads * q_head + w[None, :], mask=mine & (w < width)[None, :], other=0.0
    )
    more_at = more_query + batch * r_batch + heads * r_head + r[None, :]
    more = tl.load(more_at, mask=mine & (r < more_width)[None, :], other=0.0)
    largest = tl.full((G,), float("-inf"), tl.float32)
    total, found = tl.zeros((G,), tl.float32), tl.zeros((G, V), tl.float32)
    for first in range(split * per, tl.minimum(split * per + per, length), L):
        at = first + tl.arange(0, L)
        inside, far = at < length, at.to(tl.int64)
        k = key + batch * k_batch + head * k_head + far[None, :] * k_at + w[:, None]
        v = value + batch * v_batch + head * v_head + far[:, None] * v_at + d[None, :]
        looks = tl.load(mask + batch * m_batch + at, mask=inside, other=0) != 0
        keys = tl.load(k, mask=inside[None, :] & (w < width)[:, None], other=0.0)
        values = tl.load(v, mask=inside[:, None] & (d < value_width)[None, :], other=0.0)
        scores = tl.dot(queries, keys, input_precision="ieee")
        if R > 1:
            e = more_key + batch * e_batch + head * e_head + far[None, :] * e_at + r[:, None]
            more_keys = tl.load(e, mask=inside[None, :] & (r < more_width)[:, None], other=0.0)
            scores = tl.dot(more, more_keys, scores, input_precision="ieee")
        scores = tl.where(looks[None, :], scores * scale, float("-inf"))
        before, largest = largest, tl.maximum(largest, tl.max(scores, 1))
        level = tl.where(largest == float("-inf"), 0.0, largest)
        shares, kept = tl.exp(scores - level[:, None]), tl.exp(before - level)
        total = total * kept + tl.sum(shares, 1)
        found = tl.dot(shares.to(values.dtype), values, found * kept[:, None], input_precision="ieee")
    row = ((batch * shared + head) * group + g) * splits + split
    tl.store(sums + row[:, None] * value_width + d[None, :], found, mask=mine & (d < value_width)[None, :])
    tl.store(stats + 2 * row, largest, mask=g < group)
    tl.store(stats + 2 * row + 1, total, mask=g < group)


@triton.jit
def _join(sums, stats, out, splits, value_width, V: tl.constexpr, S: tl.constexpr, EARLY: tl.constexpr):
    """A head's parts."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    here, s, d = tl.program_id(0), tl.arange(0, S), tl.program_id(1) * V + tl.arange(0, V)
    row, held, inside = here * splits + s, s < splits, d < value_width
    largest = tl.load(stats + 2 * row, mask=held, other=float("-inf"))
    share = tl.load(stats + 2 * row + 1, mask=held, other=0.0)
    values = tl.load(sums + row[:, None] * value_width + d[None, :], mask=held[:, None] & inside[None, :], other=0.0)
    level = tl.exp(largest - tl.max(largest, 0))
    found = tl.sum(values * level[:, None], 0) / tl.sum(share * level, 0)
    tl.store(out + here * value_width + d, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _into_latent(
    query, weight, out, heads, own, width, rows, q_batch, q_head, w_row,
    W: tl.constexpr, C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A head's query `[own]` times its key's rows `[own, width]` of `weight`; C columns."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    here, n, c = tl.program_id(0), tl.arange(0, W), tl.program_id(1) * C + tl.arange(0, C)
    batch, head = here // heads, here % heads
    q = tl.load(query + batch * q_batch + head * q_head + n, mask=n < own, other=0.0).to(tl.float32)
    at = weight + (head * rows + n)[:, None].to(tl.int64) * w_row + c[None, :]
    w = tl.load(at, mask=(n < own)[:, None] & (c < width)[None, :], other=0.0).to(tl.float32)
    found = tl.sum(q[:, None] * w, 0)
    tl.store(out + here * width + c, found.to(out.dtype.element_ty), mask=c < width)


@triton.jit
def _out_of_latent(
    found, weight, out, heads, own, width, rows, value_width, w_row,
    C: tl.constexpr, D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """D of a head's values: its value's rows `[value_width, width]` of `weight`, after those `own` of its key."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    here, d, c = tl.program_id(0), tl.program_id(1) * D + tl.arange(0, D), tl.arange(0, C)
    at = weight + (here % heads * rows + own + d)[:, None].to(tl.int64) * w_row + c[None, :]
    w = tl.load(at, mask=(d < value_width)[:, None] & (c < width)[None, :], other=0.0).to(tl.float32)
    x = tl.load(found + here * width + c, mask=c < width, other=0.0).to(tl.float32)
    to = out + here * value_width + d
    tl.store(to, tl.sum(w * x[None, :], 1).to(out.dtype.element_ty), mask=d < value_width)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """As attend.attend_one."""
    with torch.cuda.device_of(query):
        return _over_parts(query, key, value, mask, scale, None)


def attend_latent(query: Tensor, latent: Tensor, rotary: Tensor, weight: Tensor, mask: Tensor, scale: float) -> Tensor:
    """As attend.attend_latent."""
    batch, heads, _, _ = query.shape
    own, rows, width = query.shape[-1] - rotary.shape[-1], weight.shape[0] // heads, latent.shape[-1]
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    out = query.new_empty(batch, 1, heads, rows - own)
    with torch.cuda.device_of(query):
        found = over_latents(query, latent, rotary, weight, mask, scale)
        _out_of_latent[(batch * heads, -(-(rows - own) // 32))](
            found, weight, out, heads, own, width, rows, rows - own, weight.stride(0),
            C=triton.next_power_of_2(width), D=32, **_started(query),
        )  # fmt: skip
    return out


def over_latents(query: Tensor, latent: Tensor, rotary: Tensor, weight: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`[batch, 1, heads, width]` of latents that were attended to; the keys' rows are the first of each head's."""
    (batch, heads, _, _), width = query.shape, latent.shape[-1]
    own, inner = query.shape[-1] - rotary.shape[-1], query.new_empty(batch, heads, 1, width)
    _into_latent[(batch * heads, -(-width // 128))](
        query, weight, inner, heads, own, width, weight.shape[0] // heads, *query.stride()[:2], weight.stride(0),
        W=triton.next_power_of_2(own), C=128, **_started(query),
    )  # fmt: skip
    return _over_parts(inner, latent, latent, mask, scale, (query[..., own:], rotary))


def _over_parts(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, more: tuple[Tensor, Tensor] | None
) -> Tensor:
    """`[batch, 1, heads, width of a value]`; `more`: columns of queries and keys that lie apart."""
    batch, heads, _, width = query.shape
    (shared, length), value_width, started = key.shape[1:3], value.shape[-1], _started(query)
    query, key, value = (one if one.stride(-1) == 1 else one.contiguous() for one in (query, key, value))
    mask, group = mask.expand(batch, 1, 1, length).contiguous(), heads // shared
    more_query, more_key = (query, key) if more is None else more
    pieces, per = -(-group // HEADS), POSITIONS * -(-length // (POSITIONS * MOST_PARTS))
    splits, V = -(-length // per), triton.next_power_of_2(value_width)
    sums = query.new_empty(batch * heads, splits, value_width, dtype=torch.float32)
    stats = query.new_empty(batch * heads, splits, 2, dtype=torch.float32)
    out = query.new_empty(batch, 1, heads, value_width)
    _parts[(batch * shared * pieces, splits)](
        query, more_query, key, more_key, value, mask, sums, stats,
        scale, length, per, group, width, more_key.shape[-1], value_width, shared, pieces, splits,
        *query.stride()[:2], *more_query.stride()[:2], *key.stride()[:3], *more_key.stride()[:3], *value.stride()[:3],
        mask.stride(0), G=HEADS, W=max(16, triton.next_power_of_2(width)), V=V, L=POSITIONS,
        R=1 if more is None else max(16, triton.next_power_of_2(more_key.shape[-1])), num_stages=1,
        **(started | {"num_warps": 8 if V > 128 else 4}),
    )  # fmt: skip
    _join[(batch * heads, -(-V // 128))](
        sums, stats, out, splits, value_width, V=min(V, 128), S=triton.next_power_of_2(splits), **started
    )
    return out


def _started(x: Tensor) -> dict[str, Any]:
    early = early_start(x)
    return {"EARLY": early, "num_warps": 4} | ({"launch_pdl": True} if early else {})
