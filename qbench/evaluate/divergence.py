"""How far a quantized model's next-token distributions Q are from the baseline's P, position by position.

KL(P || Q), KL(Q || P), top-1 agreement and the RMS change of the probability of the token that follows: what
llama.cpp's perplexity tool reports. They see changes that cancel in a perplexity, such as a model that grew surer of
right and wrong tokens alike.

Two models are never in memory together. The baseline's run keeps, per position, its k most probable tokens and
TAIL_SAMPLES tokens drawn from the others, its tail, by their probability; each with its log-probability, 8 bytes a
token. So 25,000 positions at k = 64 are 16 MB, on disk and, while they are used, in memory. Then, with p_tail and
q_tail what P and Q leave to the tail, and P~ and Q~ their distributions inside of it,

    KL(P || Q) = KL_k + p_tail KL(P~ || Q~)      and      KL(Q || P) = KL_k' + q_tail KL(Q~ || P~),

where KL_k, which treats the tail as one outcome, is exact. It alone would be a lower bound that misses

    0  <=  KL - KL_k  <=  p_tail * max over the tail of ln((p / p_tail) / (q / q_tail)),

a fifth of the KL of a 135M model in 4 bits at k = 64. So KL(P~ || Q~) is estimated from the samples, as the mean of
s - 1 - ln s with s = Q~ / P~, and KL(Q~ || P~) as the mean of s ln s - s + 1: both are without bias, since the mean of
s is 1, and never negative. Their noise is part of the intervals over windows. At k = vocabulary there is no tail, and
everything is exact; top-1 agreement and the RMS change always are. q_tail is what is left of one, a difference of
rounded numbers, and counts as FLOOR when it is smaller.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TAIL_SAMPLES = 16
FLOOR = 1e-9


class KeepTop:
    """Watches the baseline's run and keeps the top k of each position, most probable first, and samples of the tail."""

    def __init__(self, windows: int, tokens: int, k: int) -> None:
        self.shape, self.k = (windows, tokens), k
        self.ids = np.empty(0, np.int32)  # [windows, tokens, kept] once the first logits are seen
        self.log_probabilities = np.empty(0)  # fp32 (fp64 for a model in fp64), as ids
        self.log_tail = np.full(self.shape, -np.inf)  # of P's probability outside the top k
        self.generator: torch.Generator | None = None

    def __call__(self, window: int, rows: slice, logits: Tensor, denominator: Tensor) -> None:
        top, ids = logits.topk(min(self.k, logits.shape[-1]), dim=-1)
        kept = top - denominator[:, None]
        if ids.shape[-1] < logits.shape[-1]:
            tail = (logits - denominator[:, None]).exp_().scatter_(1, ids, 0)
            tail.clamp_min_(torch.finfo(tail.dtype).tiny)  # a row of zeros cannot be drawn from, and has no weight
            self.log_tail[window, rows] = tail.sum(-1, dtype=torch.float64).log().cpu().numpy()
            drawn = self._sample(tail)
            kept = torch.cat([kept, tail.gather(1, drawn).log()], dim=-1)
            ids = torch.cat([ids, drawn], dim=-1)
        if not self.ids.size:
            self.ids = np.empty((*self.shape, kept.shape[-1]), np.int32)
            self.log_probabilities = np.empty((*self.shape, kept.shape[-1]), kept.new_empty(0).cpu().numpy().dtype)
        self.ids[window, rows] = ids.cpu().numpy()
        self.log_probabilities[window, rows] = kept.cpu().numpy()

    def _sample(self, tail: Tensor) -> Tensor:
        if self.generator is None:
            self.generator = torch.Generator(tail.device).manual_seed(0)
        return torch.multinomial(tail, TAIL_SAMPLES, replacement=True, generator=self.generator)


class CompareTop:
    """Watches the quantized model's run over the same windows; everything it keeps is `[windows, tokens]`."""

    def __init__(self, ids: np.ndarray, log_probabilities: np.ndarray, log_tail: np.ndarray, k: int) -> None:
        self.ids, self.log_probabilities, self.log_tail, self.k = ids, log_probabilities, log_tail, k
        self.kl = np.empty(ids.shape[:2])
        self.kl_reverse = np.empty(ids.shape[:2])
        self.agrees = np.empty(ids.shape[:2], bool)

    def __call__(self, window: int, rows: slice, logits: Tensor, denominator: Tensor) -> None:
        ids = torch.from_numpy(self.ids[window, rows]).to(logits.device, torch.int64)
        log_p = torch.from_numpy(self.log_probabilities[window, rows]).to(logits.device).double()
        log_q = (logits.gather(1, ids) - denominator[:, None]).double()
        log_tail = torch.from_numpy(self.log_tail[window, rows]).to(logits.device)
        kl, reverse = divergences(log_p, log_q, log_tail, self.k)
        self.kl[window, rows] = kl.cpu().numpy()
        self.kl_reverse[window, rows] = reverse.cpu().numpy()
        self.agrees[window, rows] = (logits.argmax(-1) == ids[:, 0]).cpu().numpy()


def divergences(log_p: Tensor, log_q: Tensor, log_tail: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """KL(P || Q) and KL(Q || P), each `[rows]`, in nats.

    From log-probabilities `[rows, k + samples]` of the top k and of the tail's samples, and that of P's tail `[rows]`.
    Without samples, the top k are taken to be the vocabulary.
    """
    top_p, top_q = log_p[:, :k], log_q[:, :k]
    p, q = top_p.exp(), top_q.exp()
    kl, reverse = (p * (top_p - top_q)).sum(-1), (q * (top_q - top_p)).sum(-1)
    if log_p.shape[-1] <= k:
        return kl, reverse
    p_tail, q_tail = log_tail.exp(), (1 - q.sum(-1)).clamp_min(FLOOR)
    ratio = log_tail - q_tail.log()
    log_s = log_q[:, k:] - log_p[:, k:] + ratio[:, None]
    s = log_s.exp()
    inside = (s - 1 - log_s).mean(-1)
    inside_reverse = (s * log_s - s + 1).mean(-1)
    return kl + p_tail * (ratio + inside), reverse + q_tail * (inside_reverse - ratio)
