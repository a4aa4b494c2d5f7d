"""Attention of one new token over a static cache, in two Triton launches: parts of the cache, then their sum.

A program takes a part of the positions for all heads that share a key, so that keys and values are read once, and keeps
what it has in fp32: the largest score, the sum of exponentials, the sum of values. The second launch joins the parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.kernels.triton_experts import early_start, gdc_launch_dependents, gdc_wait

FEW_HEADS = 32  # heads with keys of their own below which a part is short, so that there are programs enough


@triton.jit
def _parts(
    query, key, value, mask, sums, stats, scale, length, group, width, value_width, shared, splits,
    q_batch, q_head, k_batch, k_head, k_at, v_batch, v_head, v_at, m_batch,
    G: tl.constexpr, W: tl.constexpr, V: tl.constexpr, L: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """L positions for the `group` heads that share a key."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    here, split = tl.program_id(0), tl.program_id(1)
    batch, head = here // shared, here % shared
    g, w, d, at = tl.arange(0, G), tl.arange(0, W), tl.arange(0, V), split * L + tl.arange(0, L)
    inside, far = at < length, at.to(tl.int64)
    q = query + batch * q_batch + (head * group + g)[:, None] * q_head + w[None, :]
    k = key + batch * k_batch + head * k_head + far[None, :] * k_at + w[:, None]
    v = value + batch * v_batch + head * v_head + far[:, None] * v_at + d[None, :]
    looks = tl.load(mask + batch * m_batch + at, mask=inside, other=0) != 0
    queries = tl.load(q, mask=(g < group)[:, None] & (w < width)[None, :], other=0.0)
    keys = tl.load(k, mask=inside[None, :] & (w < width)[:, None], other=0.0)
    values = tl.load(v, mask=inside[:, None] & (d < value_width)[None, :], other=0.0)
    scores = tl.where(looks[None, :], tl.dot(queries, keys, input_precision="ieee") * scale, float("-inf"))
    largest = tl.max(scores, 1)
    e = tl.exp(scores - tl.where(largest == float("-inf"), 0.0, largest)[:, None])
    row = (here * splits + split) * G + g
    tl.store(sums + row[:, None] * V + d[None, :], tl.dot(e.to(values.dtype), values, input_precision="ieee"))
    tl.store(stats + 2 * row, largest)
    tl.store(stats + 2 * row + 1, tl.sum(e, 1))


@triton.jit
def _join(
    sums, stats, out, splits, group, value_width, G: tl.constexpr, V: tl.constexpr, S: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A head's parts."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    here, g, s, d = tl.program_id(0), tl.program_id(1), tl.arange(0, S), tl.arange(0, V)
    row, held = (here * splits + s) * G + g, s < splits
    largest = tl.load(stats + 2 * row, mask=held, other=float("-inf"))
    scale = tl.exp(largest - tl.max(largest, 0))
    total = tl.sum(tl.load(stats + 2 * row + 1, mask=held, other=0.0) * scale, 0)
    values = tl.sum(tl.load(sums + row[:, None] * V + d[None, :], mask=held[:, None], other=0.0) * scale[:, None], 0)
    to = out + (here * group + g) * value_width + d
    tl.store(to, (values / total).to(out.dtype.element_ty), mask=d < value_width)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """As attend.attend_one."""
    batch, heads, _, width = query.shape
    (shared, length), value_width = key.shape[1:3], value.shape[-1]
    query, key, value = (one if one.stride(-1) == 1 else one.contiguous() for one in (query, key, value))
    mask, group = mask.expand(batch, 1, 1, length).contiguous(), heads // shared
    G, W, V = max(16, triton.next_power_of_2(group)), *(triton.next_power_of_2(n) for n in (width, value_width))
    L = 32 if batch * shared < FEW_HEADS else 128
    splits, programs, early = -(-length // L), batch * shared, early_start(query)
    sums = query.new_empty(programs, splits, G, V, dtype=torch.float32)
    stats = query.new_empty(programs, splits, G, 2, dtype=torch.float32)
    out, started = query.new_empty(batch, 1, heads, value_width), {"launch_pdl": True} if early else {}
    with torch.cuda.device_of(query):
        _parts[(programs, splits)](
            query, key, value, mask, sums, stats, scale, length, group, width, value_width, shared, splits,
            *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], mask.stride(0),
            G=G, W=W, V=V, L=L, EARLY=early, num_warps=4, **started,
        )  # fmt: skip
        _join[(programs, group)](
            sums, stats, out, splits, group, value_width, G=G, V=V, S=triton.next_power_of_2(splits), EARLY=early,
            num_warps=4, **started,
        )  # fmt: skip
    return out
