"""Chooses a transform's settings: by the KL to the original that the quantized model has on the calibration text.

Each choice is a variant of one walk over the first TOKENS tokens of the point's calibration sequences, quantized as the
point will be, and the least mean KL(original || variant) wins. So the text that is scored has no part in it. A choice
that fails drops out; a point whose choices all fail fails with the last one's error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qbench.evaluate.divergence import divergences, log_probabilities, masked_divergences
from qbench.passes.shown import Shown
from qbench.passes.states import States
from qbench.passes.transformed import Transformed
from qbench.passes.variant import Variant
from qbench.passes.walk import Reading, Walk
from qbench.run.asked import Asked
from qbench.transforms.transform import Transform

TOKENS = 2048  # about as many as the authors' prompts have


@dataclass(eq=False)
class Choice:
    """One point's transform with settings that may be taken."""

    one: Asked
    transform: Transform
    variant: Variant
    reader: MeanKL = field(default_factory=lambda: MeanKL())

    @property
    def name(self) -> str:
        asked = self.one.point.transform
        assert asked is not None
        return " ".join(f"{k}={v}" for k, v in self.transform.settings().items() if v != asked.settings()[k])


class MeanKL:
    """A reader (evaluate/asks.py) of KL(original || variant) over all positions of a row, in nats."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def see(self, batch: int, row: int, logits: Tensor, original: Tensor | None) -> None:
        assert original is not None
        kl, _ = divergences(log_probabilities(original), log_probabilities(logits))
        if not torch.isfinite(kl).all():
            kl, _ = masked_divergences(log_probabilities(original), log_probabilities(logits))
        self.total += float(kl.double().sum())
        self.tokens += len(kl)

    def scores(self) -> dict[str, np.ndarray]:
        return {"kl": np.array([self.total / max(1, self.tokens)])}


def search(asking: Sequence[Asked], walk: Walk) -> Iterator[tuple[Asked, Exception]]:
    """Sets `transform` and `searched` of each; gives those whose choices all failed. `walk` is used up."""
    texts: dict[str, list[Asked]] = {}
    for one in asking:
        assert one.calibration is not None
        texts.setdefault(one.calibration.token_ids_sha256, []).append(one)
    for same in texts.values():
        yield from _search(same, walk)
        walk = Walk(walk.stream, walk.device)


def _search(asking: Sequence[Asked], walk: Walk) -> Iterator[tuple[Asked, Exception]]:
    """Of points with one calibration text."""
    shown = asking[0].calibration
    assert shown is not None
    rows = shown.ids[: max(1, TOKENS // shown.ids.shape[1]), :TOKENS]
    begun = walk.begin([row[None] for row in rows], on_host=False)
    original, choices = States.like(begun), []
    for one in asking:
        assert one.point.transform is not None
        for transform in one.point.transform.choices(one.point.config.quantizer["name"]):
            choice = Choice(one, transform, Variant(one.label, one.quantizer, None))
            choice.variant.label += f", {choice.name}"
            choice.variant.transformed = Transformed(transform, walk)
            choices.append(choice)
    for choice in choices:
        variant = choice.variant
        try:
            walk.begin_own(variant, begun)
            if choice.one.quantizer.needs:
                chain, inputs = variant.chain or walk.chain, shown.inputs == "original"
                variant.shown = Shown(chain, shown.ids, choice.one.quantizer.needs, inputs)
        except Exception as error:
            variant.drop_out(error)
    del begun
    for _ in walk.run([choice.variant for choice in choices if choice.variant.alive], original):
        pass
    left = [choice for choice in choices if choice.variant.alive]
    readings = [Reading(c.reader, c.variant.states, True, c.variant.chain) for c in left]
    for _ in walk.read(readings, original):
        pass
    for one in asking:
        found = [(c, r) for c, r in zip(left, readings, strict=True) if c.one is one and r.error is None]
        one.searched = {choice.name: float(choice.reader.scores()["kl"][0]) for choice, _ in found}
        if found:
            one.transform = min((choice for choice, _ in found), key=lambda c: one.searched[c.name]).transform
            continue
        failed = [c.variant.error for c in choices if c.one is one] + [r.error for r in readings]
        yield one, next(error for error in reversed(failed) if error is not None)
