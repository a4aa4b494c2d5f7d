"""The shape of a request, checked by Hydra before anything heavy is imported (no torch here).

What a third party can bring is a mapping here. Its fields come from its YAML, such as `conf/quantizer/NAME.yaml` or
`conf/model/NAME.yaml`, and are checked against the member's dataclass (registry.make).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class CalibrationConfig:
    """The calibration text, embedded under `name`, a local file or a dataset of the Hub, and what is cut from it."""

    name: str = MISSING
    path: str | None = None  # local text file, in place of the Hub
    dataset: str | None = None
    subset: str | None = None
    data_files: str | None = None
    split: str | None = None
    column: str = "text"
    revision: str | None = None
    separator: str | None = None  # between a dataset's rows; None: a file is taken as it is
    window: int = 2048  # tokens
    beyond_positions: bool = False  # windows may be longer than a model with rotary positions was made for
    sequences: int | None = None
    draws: int = 1  # of sequences from the text, or of the seed of a method that has one; each is measured
    first_draw: int = 0  # the number of the first one: another number, another choice
    inputs: str = "quantized"  # of each block, from the blocks before it: quantized or original (calibrate.py)


@dataclass
class RuntimeConfig:
    device: str = "auto"
    dtype: str = "auto"
    offload: bool = False
    batch_size: int | None = None
    threads: int = 0
    min_coverage: float = 0.95
    rerun: bool = False


@dataclass
class SpeedConfig:
    """What to time, apart from quality; all fields are None for speed=none."""

    name: str = "none"
    batch_size: int | None = None
    prefill_tokens: Any = None  # a length, or a list of them
    context_tokens: int | None = None
    decode_tokens: int | None = None
    repeats: int | None = None
    compile: bool | None = None  # steps are timed compiled as well; None: on a GPU

    @property
    def lengths(self) -> tuple[Any, ...]:
        """Of the prompts to time, in tokens; the first one is what tables show."""
        asked = self.prefill_tokens
        return () if asked is None else tuple(asked) if isinstance(asked, list | tuple) else (asked,)

    def compiles(self, device: str) -> bool:
        """Whether compiled steps are timed too, on a "cuda" or "cpu" device."""
        return device == "cuda" if self.compile is None else self.compile


@dataclass
class Config:
    model: dict[str, Any] = field(default_factory=dict)
    quantizer: dict[str, Any] = field(default_factory=dict)
    transform: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    tracker: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    files: str | None = None  # what quantizer=file reads, unless quantizer.path or quantizer.id says it
    outputs: str = "outputs"


def from_container(values: Mapping[str, Any]) -> Config:
    """The configuration from what `dataclasses.asdict` made of one, also by way of JSON."""
    empty, parts = Config(), {}
    for part in fields(Config):
        kind = type(getattr(empty, part.name))
        parts[part.name] = kind(**values[part.name]) if is_dataclass(kind) else values[part.name]
    return Config(**parts)


def register() -> None:
    """Makes the schema known to Hydra under the name that `conf/config.yaml` starts from."""
    ConfigStore.instance().store(name="qbench_schema", node=Config)
