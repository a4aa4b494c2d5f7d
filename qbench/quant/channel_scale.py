"""What AWQ and A-SINQ share: a family of channel scales, and the output error by which one of them is chosen.

Channels with large inputs matter more, so their weights are multiplied by s > 1 before rounding and the result is
divided by s again: the grid is the same, the error of those channels smaller. How much s should follow the inputs is
not known beforehand; `ratio` in [0, 1) interpolates, and every value is tried on a sample of the layer's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qbench.quant.quantizer import InputStatistics

LEAST = 1e-4  # floor of a scale and guard of the division, in AutoAWQ and the official A-SINQ alike
T_RANGE = (2.0**-14, 2.0**15)  # of 1/s: normal numbers of fp16, in which it is stored


def calibration(weights: Sequence[Tensor], stats: InputStatistics | None, method: str) -> tuple[Tensor, Tensor]:
    """mean |x| `[in]` and input rows `[tokens, in]`, fp32 on the weights' device; ValueError if of no use."""
    if stats is None or stats.absmean is None or stats.inputs is None:
        raise ValueError(f"{method} needs mean |x| and a sample of the layer's inputs: run it with calibration data")
    columns = {weight.shape[-1] for weight in weights}
    if columns != {stats.absmean.shape[-1]} or columns != {stats.inputs.shape[-1]}:
        seen = f"mean |x| {list(stats.absmean.shape)}, the inputs {list(stats.inputs.shape)}"
        raise ValueError(f"the weights have {sorted(columns)} input channels, {seen}")
    absmean = stats.absmean.to(weights[0].device, torch.float32)
    inputs = stats.inputs.to(weights[0].device, torch.float32)
    if not (torch.isfinite(absmean).all() and torch.isfinite(inputs).all()):
        raise ValueError("the calibration inputs of the layer hold NaN or Inf")
    # every ratio would have an error of zero: a choice among them would say nothing
    if not ((absmean > 0).any() and (inputs != 0).any()):
        raise ValueError("the inputs are zero throughout: no calibration token reached this layer")
    return absmean, inputs


def channel_scale(absmean: Tensor, magnitude: Tensor, ratio: float) -> Tensor:
    """s `[in]` = mean|x|^ratio / magnitude^(1 - ratio), centred: its largest times its smallest value is 1.

    `magnitude` `[in]` is the mean size of the weights of a channel. A channel that is never active gets the floor.
    """
    s = absmean.pow(ratio).clamp_min(LEAST) / (magnitude.pow(1 - ratio) + LEAST)
    s = s.clamp_min(LEAST)
    return s / (s.max() * s.min()).sqrt()


class OutputError:
    """Mean |X D^T| ("l1") or its mean square ("l2") for errors D `[out, in]` of weights, on inputs `[tokens, in]`.

    The square needs only the Gram matrix X^T X, the smaller factor when there are more tokens than channels.
    Errors in bf16 are multiplied in bf16 with fp32 sums, which is how a GPU is fast: it moves the mean by about 1e-4,
    and all ratios alike.
    """

    def __init__(self, inputs: Tensor, loss: str = "l2") -> None:
        self.inputs, self.loss = inputs, loss
        tokens, columns = inputs.shape
        self.gram = inputs.T @ inputs / tokens if loss == "l2" and tokens > columns else None
        self.narrow: Tensor | None = None

    def __call__(self, error: Tensor) -> float:
        if error.dtype == torch.bfloat16:
            output = self._narrow_product(error)
            if self.gram is not None:
                return float(torch.linalg.vecdot(output, error.float()).mean())
        elif self.gram is not None:
            return float(torch.linalg.vecdot(error @ self.gram, error).mean())
        else:
            output = self.inputs @ error.T
        return float(output.abs_().mean() if self.loss == "l1" else output.square_().mean())

    def _narrow_product(self, error: Tensor) -> Tensor:
        """The product with the Gram matrix or the inputs from bf16, in fp32."""
        if self.narrow is None:
            self.narrow = (self.inputs.T if self.gram is None else self.gram).bfloat16()
        if error.is_cuda:
            return torch.mm(error, self.narrow, out_dtype=torch.float32)
        return error.float() @ self.narrow.float()
