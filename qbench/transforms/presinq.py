"""`transform=presinq`: SINQ's t folded into the layers before, so that what is quantized needs none (arXiv 2509.22944).

SINQ divides each input channel by a factor t that evens out the standard deviations of rows and columns, and stores t.
The no-overhead variant (sections 2.3.1, A.6, A.7) has one t for all that read the same tensor and multiplies whatever
makes that tensor by it: the gain of a norm, the rows of up before down, of v before o. Then any method rounds W / t,
any format and any export can hold it, and nothing is computed anew when the model runs.

    1  o and down, expert by expert: t of the consumer goes into the producer's rows; heads of o that share a head of
       values (grouped queries) share its t, found on their columns on top of each other
    2  then the readers of each norm: t of all that will be quantized, on top of each other, goes into the gain

t is divided by its median, as in the authors' scripts. `iterations` of the normalization and how often all of it is
done, `repeats`, are chosen by the KL that the quantized model is left with on the calibration text: from 2, 8 and 16
(for GGUF types 2, 4, 8, 16, 32) times 1 and 2. The scripts choose by five prompts of their own. What they leave out is
done here: routers and the gates of shared experts read the same norms and are divided too, without which a mixture is
another function. They leave o alone, since heads of values are shared; `values=false` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qbench.quant.sinkhorn import check_steps, column_factors
from qbench.transforms.block import Block, Fold
from qbench.transforms.transform import Transform

ITERATIONS, OF_GGUF, REPEATS = (2, 8, 16), (2, 4, 8, 16, 32), (1, 2)


@dataclass(frozen=True)
class PreSINQ(Transform):
    """`iterations` and `repeats` null: chosen by the calibration text."""

    iterations: int | None = None
    repeats: int | None = None
    group_size: int = 64
    values: bool = True
    step_min: float = 0.7
    step_max: float = 2.0

    def __post_init__(self) -> None:
        check_steps(1 if self.iterations is None else self.iterations, self.step_min, self.step_max)
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f"repeats must be null or at least 1, got {self.repeats}")
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2 input channels, got {self.group_size}")

    def choices(self, quantizer: str) -> Sequence[PreSINQ]:
        iterations = OF_GGUF if quantizer.startswith("gguf/") else ITERATIONS
        return [
            replace(self, iterations=rounds, repeats=times)
            for rounds in ([self.iterations] if self.iterations else iterations)
            for times in ([self.repeats] if self.repeats else REPEATS)
        ]

    def folds(self, block: Block) -> Iterator[Fold]:
        """Unless they are set, 16 iterations, as SINQ itself has, and one repeat."""
        for _ in range(self.repeats or 1):
            for feed in block.feeds:
                if self.values or len(feed.heads) == len(feed.channels):
                    yield block.scaled_feed(feed, self.factors([block.consumer(feed)]))
            for experts in block.expert_feeds:
                t = torch.stack([self.factors([down]) for down in block.downs(experts)])
                yield block.scaled_experts(experts, t)
            for norm in block.norms:
                if weights := block.inputs(norm):
                    yield block.scaled(norm, self.factors(weights))

    def factors(self, weights: Sequence[Tensor]) -> Tensor:
        """t, fp32 `[in]`, that weights `[out, in]` share; its median is 1."""
        stacked = torch.cat([weight.float() for weight in weights])
        iterations = self.iterations or ITERATIONS[-1]
        [(t, _)] = column_factors([stacked], self.group_size, iterations, self.step_min, self.step_max)
        return t / t.median()
