"""What makes two measurements the same, decided once: the identity of a point, recorded in its result.

The run id, the rows and sections of a leaderboard, its history and the regression gate compare identities and nothing
else. An identity holds contents and settings: the weights, tokenizer and code of the model by their fingerprint, texts
by their sha256, the settings of the method, the protocol and the calibration with every default and every null filled
in. A setting that is null is a value like any other: a point without a codebook is not the point with one.

Names of models and calibrations, folders, launchers, trackers and exports stand outside: they cannot change a number.
The name of a text is inside, since it is the first part of the protocol's name, under which the number is shown. The
qbench version, the date and the hardware are outside as well: an identity measured twice has a history.

A setting of the configuration is inside unless it is listed here as one that cannot change a number, so that a new one
tells two measurements apart before anyone has thought of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qbench.record.strict import Strict

if TYPE_CHECKING:
    from qbench.config import Config

Settings = dict[str, Any]

# where a text is read from and how it is put together: the text's hash says what came of it
SOURCE_OF_TEXT = ("path", "dataset", "subset", "data_files", "split", "column", "revision", "separator", "include_path")
PERMISSIONS = ("beyond_positions",)  # allow a window, which is inside, and change nothing by themselves
# device and dtype are held as resolved; the share of weights that a point must cover is checked, not measured
RUNTIME_OUTSIDE = ("device", "dtype", "threads", "min_coverage", "rerun")


@dataclass(frozen=True)
class Identity(Strict):
    """Equal identities, the same measurement. Settings are as JSON holds them, and whole numbers are integers."""

    weights: str  # fingerprint of the original: weights, tokenizer and code
    remote_code: bool  # whether the model may run code of its own in place of transformers'
    quantizer: Settings  # `name` and every field
    text_sha256: str
    protocol: Settings  # of the task
    # with `text_sha256`; None for methods that need none, but for the `draws` of one that starts from a seed
    calibration: Settings | None
    device: str  # cpu or cuda
    dtype: str
    runtime: Settings  # batch_size, offload
    speed: Settings | None  # None: not timed
    transform: Settings | None = None  # `name` and every field; None: weights are quantized as they are

    @property
    def key(self) -> str:
        """The identity as a text: equal ones have equal texts, in every process and on every machine."""
        stated = asdict(self)
        if self.transform is None:
            del stated["transform"]
        return json.dumps(stated, sort_keys=True)

    @property
    def method(self) -> str:
        """What quantized, after the transform that the weights were given: `presinq+rtn`."""
        before = (self.transform or {}).get("name", self.quantizer.get("transform"))  # the latter: packed
        return "+".join(str(name) for name in (before, self.quantizer.get("name")) if name is not None)

    @property
    def original(self) -> tuple[str, ...]:
        """What a quantized model is compared with: only measurements that share it may be ranked together."""
        return (self.weights, str(self.remote_code), self.dtype, self.device)

    def flat(self) -> Settings:
        """`quantizer.nbits` -> 4, under the keys of the command line where it has one."""
        return dict(self._flat())

    def _flat(self) -> Iterator[tuple[str, Any]]:
        yield "weights", self.weights
        yield "model.trust_remote_code", self.remote_code
        yield "device", self.device
        yield "dtype", self.dtype
        yield "task.text_sha256", self.text_sha256
        parts = {"quantizer": self.quantizer, "task": self.protocol, "calibration": self.calibration}
        parts |= {"runtime": self.runtime, "speed": self.speed, "transform": self.transform}
        for part, settings in parts.items():
            yield from ((f"{part}.{key}", value) for key, value in (settings or {}).items())


def identify(
    config: Config,
    quantizer: Settings,
    protocol: Settings,
    *,
    weights: str,
    text_sha256: str,
    calibration_sha256: str | None,
    device: str,
    dtype: str,
    draws: range = range(1),
    transform: Settings | None = None,
) -> Identity:
    """The identity of the point that a configuration asks for.

    `quantizer` holds the method's name and its fields, defaults included, `transform` likewise, None for none;
    `protocol` the protocol's name and what of its fields can change a number; `weights` is the model's fingerprint,
    `calibration_sha256` None for a method that is shown no text; `device` is the kind, `dtype` the precision, resolved.
    `draws` are the numbers of those that the method is measured in; the one of number 0 alone is no setting.
    """
    speed = None if config.speed.name == "none" else asdict(config.speed)
    if speed is not None:
        del speed["name"]
        if not config.speed.compiles(device):
            del speed["compile"]
        else:
            speed["compile"] = True
        if device == "cpu":  # no other number depends on how many there are
            speed["threads"] = config.runtime.threads
    runtime = {k: v for k, v in asdict(config.runtime).items() if k not in RUNTIME_OUTSIDE}
    return Identity(
        weights=weights,
        remote_code=bool(config.model.get("trust_remote_code")),
        quantizer=_as_json(quantizer),
        text_sha256=text_sha256,
        protocol=_as_json(protocol),
        calibration=_as_json(_calibration(config, calibration_sha256, draws)),
        device=device,
        dtype=dtype,
        runtime=_as_json(runtime),
        speed=None if speed is None else _as_json(speed),
        transform=_as_json(transform),
    )


def _calibration(config: Config, text_sha256: str | None, draws: range) -> Settings | None:
    drawn = {"draws": len(draws)} if len(draws) > 1 else {}
    drawn |= {"first_draw": draws.start} if draws.start else {}
    if text_sha256 is None:
        return drawn or None
    outside = (*SOURCE_OF_TEXT, *PERMISSIONS, "name", "draws", "first_draw")
    settings = {k: v for k, v in asdict(config.calibration).items() if k not in outside}
    return settings | drawn | {"text_sha256": text_sha256}


def _as_json(value: Any) -> Any:
    """As JSON gives it back: tuples are lists, and 2.0 is 2, which a command line may have written either way."""
    if isinstance(value, dict):
        return {str(key): _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
