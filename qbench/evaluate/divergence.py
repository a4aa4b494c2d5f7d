"""How far a quantized model's next-token distributions Q are from the baseline's P, position by position.

KL(P || Q), KL(Q || P), top-1 agreement and the RMS change of the probability of the token that follows: what
llama.cpp's perplexity tool reports. They see changes that cancel in a perplexity, such as a model that grew surer of
right and wrong tokens alike.

Two models are never in memory together. The baseline's run keeps, per position, its k most probable tokens and
TAIL_SAMPLES of the others, its tail; each with its log-probability, 8 bytes a token; and its argmax, 4 bytes. So 25,000
positions at k = 64 are 16 MB, on disk and, while they are used, in memory. With p_tail and q_tail what P and Q leave to
the tail, and P~ and Q~ their distributions inside of it,

    KL(P || Q) = KL_k + p_tail KL(P~ || Q~)      and      KL(Q || P) = KL_k' + q_tail KL(Q~ || P~),

where KL_k, which treats the tail as one outcome, is exact. It alone would be a lower bound that misses

    0  <=  KL - KL_k  <=  p_tail * max over the tail of ln((p / p_tail) / (q / q_tail)),

a quarter of the KL of a 135M model in 4 bits at k = 64. So the divergences inside the tail are estimated from samples:
as means of (Q~ - P~ - P~ ln(Q~ / P~)) / g and (P~ - Q~ + Q~ ln(Q~ / P~)) / g, both without bias and never negative.
The samples' distribution g is half P~ and half uniform over the tail, since what Q finds likely and P does not, P~
alone would almost never draw. Their noise is part of the intervals over windows: over 160 positions of that model it
was 1.5 % of KL(P || Q) and 5 % of KL(Q || P). At k = vocabulary there is no tail, and everything is exact; top-1
agreement and the RMS change always are.

For equal logits all of this is zero, and the agreement one, to the last bit: both sides compute the same numbers by the
same operations. Hence both tails are summed, and none is taken as what the top k leave of 1; and both sides find their
most probable token by argmax. In 16 bit logits tie often, and the first of a topk is another one of the tied.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TAIL_SAMPLES = 16
FORM = 2  # of what KeepTop keeps: kept scores of another form are measured again


class KeepTop:
    """Watches the baseline's run and keeps the top k of each position, most probable first, and samples of the tail."""

    def __init__(self, windows: int, tokens: int, k: int) -> None:
        self.shape, self.k = (windows, tokens), k
        self.ids = np.empty(0, np.int32)  # [windows, tokens, kept] once the first logits are seen
        self.log_probabilities = np.empty(0)  # fp32 (fp64 for a model in fp64), as ids
        self.log_tail = np.full(self.shape, -np.inf)  # of P's probability outside the top k
        self.most_probable = np.empty(self.shape, np.int32)  # argmax; where logits tie, not always the first of the k
        self.generator: torch.Generator | None = None

    def __call__(self, window: int, rows: slice, logits: Tensor, denominator: Tensor) -> None:
        self.most_probable[window, rows] = logits.argmax(-1).cpu().numpy()
        top, ids = logits.topk(min(self.k, logits.shape[-1]), dim=-1)
        kept = top - denominator[:, None]
        if ids.shape[-1] < logits.shape[-1]:
            tail = logits.scatter(1, ids, -torch.inf)
            log_sum = tail.logsumexp(-1)
            self.log_tail[window, rows] = (log_sum - denominator).double().cpu().numpy()
            empty = log_sum.isinf()[:, None]  # all of the tail is -inf, and nothing is drawn from it but at random
            drawn = self._sample(tail.sub_(log_sum[:, None].masked_fill(empty, 0)).exp_(), ids)
            kept = torch.cat([kept, logits.gather(1, drawn) - denominator[:, None]], dim=-1)
            ids = torch.cat([ids, drawn], dim=-1)
        if not self.ids.size:
            self.ids = np.empty((*self.shape, kept.shape[-1]), np.int32)
            self.log_probabilities = np.empty((*self.shape, kept.shape[-1]), kept.new_empty(0).cpu().numpy().dtype)
        self.ids[window, rows] = ids.cpu().numpy()
        self.log_probabilities[window, rows] = kept.cpu().numpy()

    def _sample(self, tail: Tensor, top: Tensor) -> Tensor:
        """Draws from half P~ `[rows, vocabulary]`, half uniform over what is not in `top` `[rows, k]`."""
        if self.generator is None:
            self.generator = torch.Generator(tail.device).manual_seed(0)
        both = tail.add_(1 / (tail.shape[-1] - top.shape[-1])).scatter_(1, top, 0)
        return torch.multinomial(both, TAIL_SAMPLES, replacement=True, generator=self.generator)


class CompareTop:
    """Watches the quantized model's run over the same windows; everything it keeps is `[windows, tokens]`.

    `ids`, `log_probabilities`, `log_tail` and `most_probable` are those of KeepTop.
    """

    def __init__(
        self,
        ids: np.ndarray,
        log_probabilities: np.ndarray,
        log_tail: np.ndarray,
        most_probable: np.ndarray,
        k: int,
    ) -> None:
        self.ids, self.log_probabilities, self.log_tail, self.k = ids, log_probabilities, log_tail, k
        self.most_probable = most_probable
        self.kl = np.empty(ids.shape[:2])
        self.kl_reverse = np.empty(ids.shape[:2])
        self.agrees = np.empty(ids.shape[:2], bool)

    def __call__(self, window: int, rows: slice, logits: Tensor, denominator: Tensor) -> None:
        ids = torch.from_numpy(self.ids[window, rows]).to(logits.device, torch.int64)
        log_p = torch.from_numpy(self.log_probabilities[window, rows]).to(logits.device).double()
        log_q = (logits.gather(1, ids) - denominator[:, None]).double()
        log_tail = torch.from_numpy(self.log_tail[window, rows]).to(logits.device)
        log_q_tail = torch.full_like(log_tail, -torch.inf)
        if self.k < logits.shape[-1]:
            tail = logits.scatter(1, ids[:, : self.k], -torch.inf)
            log_q_tail = (tail.logsumexp(-1) - denominator).double()
            del tail
        kl, reverse = divergences(log_p, log_q, log_tail, log_q_tail, self.k, logits.shape[-1])
        self.kl[window, rows] = kl.cpu().numpy()
        self.kl_reverse[window, rows] = reverse.cpu().numpy()
        self.agrees[window, rows] = logits.argmax(-1).cpu().numpy() == self.most_probable[window, rows]


def divergences(
    log_p: Tensor, log_q: Tensor, log_p_tail: Tensor, log_q_tail: Tensor, k: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """KL(P || Q) and KL(Q || P), each `[rows]`, in nats.

    From log-probabilities `[rows, k + samples]` of P's top k and of its tail's samples, and those of the two tails
    `[rows]`; without samples where the top k are the vocabulary. What has no probability counts for nothing.
    """
    top_p, top_q = log_p[:, :k], log_q[:, :k]
    p, q = top_p.exp(), top_q.exp()
    kl, reverse = _times(p, top_p - top_q).sum(-1), _times(q, top_q - top_p).sum(-1)
    if k >= vocabulary:
        return kl, reverse
    p_tail, q_tail = log_p_tail.exp(), log_q_tail.exp()
    log_p_inside = log_p[:, k:] - log_p_tail[:, None]
    log_q_inside = log_q[:, k:] - log_q_tail[:, None]
    p, q, log_ratio = log_p_inside.exp(), log_q_inside.exp(), log_q_inside - log_p_inside
    drawn_with = (p + 1 / (vocabulary - k)) / 2
    inside = ((q - p - _times(p, log_ratio)) / drawn_with).mean(-1)
    inside_reverse = ((p - q + _times(q, log_ratio)) / drawn_with).mean(-1)
    log_ratio = log_p_tail - log_q_tail
    return kl + _times(p_tail, log_ratio + inside), reverse + _times(q_tail, inside_reverse - log_ratio)


def _times(probability: Tensor, other: Tensor) -> Tensor:
    """The product, 0 where the probability is, whatever the other is: 0 ln 0 = 0."""
    return torch.where(probability > 0, probability * other, 0.0)
