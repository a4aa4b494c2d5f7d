"""The Triton kernels of a mixture's layer: its pairs sorted, multiplied with dense stacks, added up again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.kernels.routes import Routes

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton: no kernel of its starts while the one in front ends
    gdc_launch_dependents = gdc_wait = None

BLOCK = 1024


def early_start(x: Tensor) -> bool:
    """Whether a kernel may start while the one in front ends and wait for it itself: from Hopper on."""
    return gdc_wait is not None and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


@triton.jit
def _expert(index, at, pairs, experts, BLOCK: tl.constexpr):
    """The pairs from `at` on and their experts; `experts` stands for all that live elsewhere, one more for no pair."""
    pair = at + tl.arange(0, BLOCK)
    found = tl.load(index + pair, mask=pair < pairs, other=0)
    return pair, tl.where(pair < pairs, tl.minimum(found, experts), experts + 1).to(tl.int32)


@triton.jit
def _route(
    index, token, expert, row, place, starts, slots, pairs, per_token, experts, rows, BLOCK: tl.constexpr
):  # fmt: skip
    """One program an expert, and one for the pairs that live elsewhere; none waits for another."""
    mine = tl.program_id(0)
    before, here = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for at in range(0, pairs, BLOCK):
        _, found = _expert(index, at, pairs, experts, BLOCK)
        before += (found < mine).to(tl.int32)
        here += (found == mine).to(tl.int32)
    start, count = tl.sum(before, 0), tl.sum(here, 0)
    first_slot = start // rows + mine
    tl.store(starts + mine, start)
    at_place = start
    for at in range(0, pairs, BLOCK):
        pair, found = _expert(index, at, pairs, experts, BLOCK)
        hit = found == mine
        to = at_place + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(place + pair, to, mask=hit)
        tl.store(token + to, pair // per_token, mask=hit)
        tl.store(expert + to, tl.zeros_like(to) + tl.minimum(mine, experts - 1), mask=hit)
        tl.store(row + to, tl.where(mine < experts, rows * first_slot + to - start, -1), mask=hit)
        at_place += tl.sum(hit.to(tl.int32), 0)
    owned = (start + count) // rows - start // rows + (mine < experts).to(tl.int32)  # elsewhere: the rest, empty
    held = tl.where(mine < experts, count, 0)
    for slot in range(0, owned):
        to = slots + 3 * (first_slot + slot)
        tl.store(to, tl.minimum(mine, experts - 1))
        tl.store(to + 1, start + rows * slot)
        tl.store(to + 2, tl.maximum(tl.minimum(held - rows * slot, rows), 0))


def route(index: Tensor, experts: int, rows: int, made: list[Tensor]) -> None:
    """Fills `made`, the tensors of Routes, for index `[tokens, k]`."""
    with torch.cuda.device_of(index):
        _route[(experts + 1,)](
            index.contiguous(), *made, index.numel(), index.shape[-1], experts, rows, BLOCK=BLOCK, num_warps=8
        )  # fmt: skip


@triton.jit
def _multiply(
    x,
    stack,
    slots,
    y,
    first_expert,
    last_expert,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M of a slot's rows of y against BLOCK_N rows of its expert's matrix."""
    slot = tl.program_id(1)
    expert, first, held = tl.load(slots + 3 * slot), tl.load(slots + 3 * slot + 1), tl.load(slots + 3 * slot + 2)
    above = tl.program_id(2) * BLOCK_M
    if (held > above) & (expert >= first_expert) & (expert < last_expert):
        m, n = above + tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        a = x + (first + m).to(tl.int64)[:, None] * K
        b = stack + (expert - first_expert).to(tl.int64) * N * K + n.to(tl.int64)[None, :] * K
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for at in range(0, K, BLOCK_K):
            k = at + tl.arange(0, BLOCK_K)
            rows = tl.load(a + k[None, :], mask=(m < held)[:, None] & (k < K)[None, :], other=0.0)
            weight = tl.load(b + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
            total = tl.dot(rows, weight, total, input_precision=PRECISION)
        at = y + (first + m).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, total.to(y.dtype.element_ty), mask=(m < held)[:, None] & (n < N)[None, :])


def multiply(x: Tensor, stack: Tensor, routes: Routes, y: Tensor, first_expert: int = 0) -> None:
    """Into y `[pairs, out]`: x `[pairs, in]`, sorted, times the matrices of `stack` `[some, out, in]`, whose first is
    expert `first_expert`'s; rows of other experts stay as they are. Sums in fp32; fp32 is multiplied as such."""
    (count, N, K), block_m = stack.shape, min(routes.rows, 64)
    block_n, block_k = (64, 32) if x.dtype == torch.float32 else (128, 64)
    with torch.cuda.device_of(x):
        _multiply[(-(-N // block_n), len(routes.slots), routes.rows // block_m)](
            x.contiguous(), stack.contiguous(), routes.slots, y, first_expert, first_expert + count, N, K,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, PRECISION="ieee",
            num_warps=8 if block_m == 64 else 4,
        )  # fmt: skip


@triton.jit
def _combine(
    y, index, scores, place, out, N, experts, SORTED: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    token, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(PER_TOKEN):
        pair = token * PER_TOKEN + j
        here = tl.load(index + pair) < experts
        at = tl.load(place + pair).to(tl.int64) if SORTED else pair
        score = tl.load(scores + pair).to(tl.float32)
        total += tl.load(y + at * N + n, mask=(n < N) & here, other=0.0).to(tl.float32) * score
    tl.store(out + token * N + n, total.to(out.dtype.element_ty), mask=n < N)


def combine(y: Tensor, index: Tensor, scores: Tensor, experts: int, place: Tensor | None, out: Tensor) -> None:
    """Into out `[tokens, hidden]`, as grouped.combine says."""
    (tokens, per_token), early = scores.shape, early_start(y)
    block = BLOCK if tokens > 8 else 256  # few tokens: more programs, each waits for memory but once
    with torch.cuda.device_of(y):
        _combine[(tokens, -(-y.shape[1] // block))](
            y.contiguous(), index.contiguous(), scores.contiguous(), index if place is None else place, out,
            y.shape[1], experts, SORTED=place is not None, PER_TOKEN=per_token, BLOCK=block, num_warps=4,
            EARLY=early, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip


@triton.jit
def _silu_times(gate, up, y, count, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(
        y + at, (silu * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)).to(y.dtype.element_ty), mask=inside
    )


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, which are of one shape and dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    y, count, early = torch.empty_like(gate), gate.numel(), early_start(gate)
    with torch.cuda.device_of(gate):
        _silu_times[(-(-count // BLOCK),)](
            gate, up, y, count, BLOCK=BLOCK, num_warps=4, EARLY=early, **({"launch_pdl": True} if early else {})
        )
    return y


@triton.jit
def _rms_norm(x, weight, y, width, stride, epsilon, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    wide = tl.load(x + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
    quotient = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)).to(y.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(y + row * width + at, (quotient * factor).to(y.dtype.element_ty), mask=at < width)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight `[width]` * x / sqrt(mean(x^2) + epsilon) of each row of x `[..., width]`, which are few."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y, early, block = rows.new_empty(rows.shape), early_start(rows), triton.next_power_of_2(rows.shape[1])
    with torch.cuda.device_of(rows):
        _rms_norm[(len(rows),)](
            rows, weight.contiguous(), y, rows.shape[1], rows.stride(0), epsilon, BLOCK=block, EARLY=early,
            num_warps=8 if block >= 2048 else 4, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return y.view(x.shape)


@triton.jit
def _choose(
    logits, weights, index, experts, stride,
    K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, KS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A token. A number and its place are one key, whose order is that of numbers, and of equal ones the first."""
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(logits + token * stride + at, mask=at < experts, other=float("-inf")).to(tl.float32)
    if SOFTMAX:
        e = tl.exp(x - tl.max(x, 0))
        x = e / tl.sum(e, 0)
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (BLOCK - 1 - at).to(tl.int64)
    least = -0x7FFFFFFFFFFFFFFF - 1
    key = tl.where(at < experts, key, least)
    slot = tl.arange(0, KS)
    found = tl.full((KS,), least, tl.int64)
    for j in tl.static_range(K):
        best = tl.max(key, 0)
        found = tl.where(slot == j, best, found)
        key = tl.where(key == best, least, key)
    high = (found >> 32).to(tl.int32)
    value = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    value = tl.where(slot < K, value, 0.0)
    if NORMALIZE:
        value = value / tl.sum(value, 0)
    to = token * K + slot
    tl.store(weights + to, value.to(weights.dtype.element_ty), mask=slot < K)
    tl.store(index + to, BLOCK - 1 - (found & 0xFFFFFFFF), mask=slot < K)


def choose(logits: Tensor, k: int, softmax: bool, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As choose.choose."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    tokens, experts = logits.shape
    weights, index = logits.new_empty(tokens, k, dtype=dtype), logits.new_empty(tokens, k, dtype=torch.int64)
    early = early_start(logits)
    block = triton.next_power_of_2(max(experts, 32))
    with torch.cuda.device_of(logits):
        _choose[(tokens,)](
            logits, weights, index, experts, logits.stride(0), K=k, SOFTMAX=softmax, NORMALIZE=normalize,
            BLOCK=block, KS=triton.next_power_of_2(k), EARLY=early, num_warps=1 if block <= 256 else 4,
            **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return weights, index
