"""How far a quantized model's next-token distributions Q are from the original's P, position by position.

KL(P || Q), KL(Q || P), top-1 agreement and the RMS change of the probability of the token that follows: what
llama.cpp's perplexity tool reports. They see changes that cancel in a perplexity, such as a model that grew surer of
right and wrong tokens alike. All are exact: of the whole vocabulary, from the logits of both models.

With r = ln P - ln Q of each token, the divergences are computed as

    KL(P || Q) = sum of P r + (Q - P)      and      KL(P || Q) + KL(Q || P) = sum of (P - Q) r.

The sum of Q - P is zero but for rounding, and with it an error in the logarithm of a softmax's denominator, which alone
would shift a KL by 1e-6 nats, enters squared. Every summand is as small as the models are near, so that sums in fp32
are enough: a token's KL is within 2e-7 nats, and a mean of 1e-5 nats within 0.02 % (tests/evaluate/test_divergence.py).
What is averaged over tokens is averaged in fp64. Equal logits give exactly zero, both sides being computed alike.

On a GPU both softmaxes and all sums are two reads of the logits in one kernel (kernels/divergence.py). Here they are 24
reads and 12 writes of the logits' size in fp32, in chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_probabilities(logits: Tensor) -> Tensor:
    """`[rows, vocabulary]`, in fp32, or fp64 for logits in fp64.

    Not torch's log_softmax: on a CPU its sum drops what is small, up to 2e-5 nats at a vocabulary of 49k, to one side.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide - wide.logsumexp(-1, keepdim=True)


def divergences(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(P || Q) and KL(Q || P), each `[rows]`, in nats, of log-probabilities `[rows, vocabulary]`; overwrites both.

    NaN where a token has no probability in a model (`masked_divergences`).
    """
    log_ratio = log_p - log_q
    p = log_p.exp_()
    change = log_q.exp_().sub_(p)
    forward = change.sum(-1) + p.mul_(log_ratio).sum(-1)
    both = -change.mul_(log_ratio).sum(-1)
    return forward.clamp_min(0), (both - forward).clamp_min(0)


def masked_divergences(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """The same for logits of -inf, which models with padded vocabularies give: 0 ln 0 = 0."""
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_p - log_q
    change = (q - p).sum(-1)
    forward = torch.where(p > 0, p * log_ratio, 0).sum(-1) + change
    reverse = torch.where(q > 0, -q * log_ratio, 0).sum(-1) - change
    return forward.clamp_min(0), reverse.clamp_min(0)
