"""What AWQ and A-SINQ share: a family of channel scales, and the output error by which one of them is chosen.

Channels with large inputs matter more, so their weights are multiplied by s > 1 before rounding and the result is
divided by s again: the grid is the same, the error of those channels smaller. How much s should follow the inputs is
not known beforehand; `ratio` in [0, 1) interpolates, and every value is tried on a sample of the layer's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qbench.quant.quantizer import InputStatistics
from qbench.quant.rounding import rounding_error

LEAST = 1e-4  # floor of a scale and guard of the division, in AutoAWQ and the official A-SINQ alike
T_RANGE = (2.0**-14, 2.0**15)  # of 1/s: normal numbers of fp16, in which it is stored


def calibration(weights: Sequence[Tensor], stats: InputStatistics | None, method: str) -> tuple[Tensor, Tensor]:
    """mean |x| `[in]` and input rows `[tokens, in]`, fp32 on the weights' device; ValueError if of no use."""
    absmean, inputs = _given(weights, stats, method)
    _require_usable(_usable(absmean, inputs))
    return absmean, inputs


def calibrations(
    weights: Sequence[Tensor], stats: Sequence[InputStatistics], method: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a batch: mean |x| `[n, in]`, rows `[n, tokens, in]` and how many of these are not padding, `[n]`."""
    given = [_given(weights, one, method) for one in stats]
    _require_usable(torch.stack([_usable(*one) for one in given]).all(0))
    absmean, inputs = zip(*given, strict=True)
    tokens = torch.tensor([len(rows) for rows in inputs], device=absmean[0].device)
    return torch.stack(absmean), pad_sequence(inputs, batch_first=True), tokens


def _given(weights: Sequence[Tensor], stats: InputStatistics | None, method: str) -> tuple[Tensor, Tensor]:
    if stats is None or stats.absmean is None or stats.inputs is None:
        raise ValueError(f"{method} needs mean |x| and a sample of the layer's inputs: run it with calibration data")
    columns = {weight.shape[-1] for weight in weights}
    if columns != {stats.absmean.shape[-1]} or columns != {stats.inputs.shape[-1]}:
        seen = f"mean |x| {list(stats.absmean.shape)}, the inputs {list(stats.inputs.shape)}"
        raise ValueError(f"the weights have {sorted(columns)} input channels, {seen}")
    return tuple(part.to(weights[0].device, torch.float32) for part in (stats.absmean, stats.inputs))


def _usable(absmean: Tensor, inputs: Tensor) -> Tensor:
    """Whether all is finite, and whether anything is not zero: two bools."""
    finite = torch.isfinite(absmean).all() & torch.isfinite(inputs).all()
    return torch.stack([finite, (absmean > 0).any() & (inputs != 0).any()])


def _require_usable(flags: Tensor) -> None:
    finite, active = flags.tolist()
    if not finite:
        raise ValueError("the calibration inputs of the layer hold NaN or Inf")
    # every ratio would have an error of zero: a choice among them would say nothing
    if not active:
        raise ValueError("the inputs are zero throughout: no calibration token reached this layer")


def channel_scale(absmean: Tensor, magnitude: Tensor, ratio: float | Tensor) -> Tensor:
    """s `[..., in]` = mean|x|^ratio / magnitude^(1 - ratio), centred: its largest times its smallest value is 1.

    `magnitude` `[..., in]` is the mean size of the weights of a channel. A channel that is never active gets the floor.
    """
    s = absmean.pow(ratio).clamp_min(LEAST) / (magnitude.pow(1 - ratio) + LEAST)
    s = s.clamp_min(LEAST)
    return s / (s.amax(-1, keepdim=True) * s.amin(-1, keepdim=True)).sqrt()


def search(
    weights: Sequence[Tensor],
    scales: Callable[[float | Tensor], Tensor],
    ratios: int,
    output_error: OutputError,
    rounding: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """The ratio out of 0, 1/n, .., (n - 1)/n, n = `ratios`, whose t = `scales(ratio)` `[..., in]` loses least in all.

    Weights are `[..., out, in]`; each matrix of a stack has a ratio of its own. Returns loss and ratio `[...]` and t
    `[..., in]`, on the device, which is asked for nothing meanwhile.
    """
    if weights[0].is_cuda:  # in few launches; a CPU's powers by a tensor may end in another bit than by a number
        steps = torch.arange(ratios, device=weights[0].device) / ratios
        ts = scales(steps.view(-1, *[1] * (weights[0].ndim - 1)))
    else:
        ts = torch.stack([scales(i / ratios) for i in range(ratios)])
    losses = []
    for t in ts:
        of_each = (
            output_error(rounding_error(weight, input_scale=t, **rounding)).double() * weight.shape[-2]
            for weight in weights
        )
        losses.append(sum(of_each) / sum(weight.shape[-2] for weight in weights))
    loss, best = torch.stack(losses).nan_to_num_(torch.inf).min(0)  # of [ratios, ...]
    return loss, best.double() / ratios, ts.gather(0, best[None, ..., None].expand_as(ts[:1]))[0]


class OutputError:
    """Mean |X D^T| ("l1") or its mean square ("l2") for errors D `[..., out, in]` of weights, `[...]`.

    X are inputs `[..., tokens, in]`, of which `tokens` `[...]` say how many are more than padding. The square needs
    only the Gram matrix X^T X, the smaller factor when there are more tokens than channels.
    Errors in bf16 are multiplied in bf16 with fp32 sums, which is how a GPU is fast: it moves the mean by about 1e-4,
    and all ratios alike.
    """

    def __init__(self, inputs: Tensor, loss: str = "l2", tokens: Tensor | None = None) -> None:
        self.inputs, self.loss = inputs, loss
        self.tokens = inputs.shape[-2] if tokens is None else tokens
        self.gram: Tensor | None = None
        if loss == "l2" and inputs.shape[-2] > inputs.shape[-1]:
            self.gram = inputs.mT @ inputs / (self.tokens if tokens is None else tokens[:, None, None])
        self.narrow: Tensor | None = None

    def __call__(self, error: Tensor) -> Tensor:
        if error.dtype == torch.bfloat16:
            output = self._narrow_product(error)
            if self.gram is not None:
                return torch.linalg.vecdot(output, error.float()).mean(-1)
            total = torch.linalg.vector_norm(output, 1 if self.loss == "l1" else 2, (-2, -1))
            return (total if self.loss == "l1" else total.square()) / (self.tokens * error.shape[-2])
        if self.gram is not None:
            return torch.linalg.vecdot(error @ self.gram, error).mean(-1)
        output = self.inputs @ error.mT
        output = output.abs_() if self.loss == "l1" else output.square_()
        return output.mean() if error.ndim == 2 else output.sum((-2, -1)) / (self.tokens * error.shape[-2])

    def _narrow_product(self, error: Tensor) -> Tensor:
        """The product with the Gram matrix or the inputs from bf16, in fp32."""
        if self.narrow is None:
            self.narrow = (self.inputs.mT if self.gram is None else self.gram).bfloat16()
        if not error.is_cuda:
            return error.float() @ self.narrow.float()
        return (torch.mm if error.ndim == 2 else torch.bmm)(error, self.narrow, out_dtype=torch.float32)
