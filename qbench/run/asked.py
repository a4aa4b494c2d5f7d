"""What a pass is asked for: its points, each in as many draws as it is measured in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from qbench.passes.calibrate import Calibration, cut_draws
from qbench.passes.variant import Variant
from qbench.passes.walk import Reading
from qbench.quant.noise import Noise
from qbench.quant.original import Original
from qbench.quant.quantizer import Quantizer
from qbench.record.result import Result
from qbench.request.prepare import Prepared
from qbench.run.outcome import started
from qbench.transforms.transform import Transform


@dataclass(eq=False)
class Asked:
    """One draw of a point of the pass on its way; most points have a single one, which is the point."""

    point: Prepared
    result: Result
    calibration: Calibration | None
    quantizer: Quantizer
    draw: int = 0
    variant: Variant | None = None  # None: the original as a row
    reading: Reading | None = None
    original_speed: Any = None
    transform: Transform | None = None  # as it is chosen
    searched: dict[str, float] = field(default_factory=dict)  # choice -> KL on the calibration text

    @property
    def timed(self) -> bool:
        return self.point.config.speed.name != "none" and self.draw == 0

    @property
    def original(self) -> bool:
        """Whether it is the original as a row, which has no variant of its own."""
        plain = isinstance(self.quantizer, Original) and not isinstance(self.quantizer, Noise)
        return plain and self.transform is None

    @property
    def label(self) -> str:
        settings, draws = self.point.config.quantizer, self.point.draws
        words = [str(settings[key]) for key in ("name", "nbits") if settings.get(key) is not None]
        if self.transform is not None:
            words.insert(0, str(self.point.config.transform["name"]))
        return " ".join([*words, *([f"draw {self.draw + 1} of {draws}"] if draws > 1 else [])])

    @property
    def seconds(self) -> dict[str, float]:
        """What its variant has taken, by phase."""
        spent = {} if self.variant is None else self.variant.seconds
        return {phase: round(seconds, 3) for phase, seconds in spent.items()}


def drawn(point: Prepared, tokenizer: Any) -> list[Asked]:
    """The point in each of its draws: another choice of sequences, and of the seed of a method that has one."""
    text, quantizer, result = point.calibration_text, point.quantizer, started(point)
    assert quantizer is not None
    calibrations: list[Calibration | None] = [None] * point.draws
    if text is not None:
        calibrations = [*cut_draws(text, tokenizer, point.config.calibration, point.drawn)]
    field = quantizer.seed_field
    seeds = [{} if field is None else {field: getattr(quantizer, field) + draw} for draw in point.drawn]
    return [
        Asked(
            point,
            result,
            calibration,
            replace(quantizer, **seed) if seed else quantizer,
            draw,
            transform=point.transform,
        )
        for draw, (calibration, seed) in enumerate(zip(calibrations, seeds, strict=True))
    ]
