"""The shape of a request, checked by Hydra before anything heavy is imported (no torch here).

A quantizer's and a protocol's own fields are not listed: they come from `conf/quantizer/NAME.yaml` and
`conf/task/NAME.yaml`, which mirror their dataclasses, so that a third party adds one without editing this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class ModelConfig:
    name: str = MISSING
    source: str = MISSING  # hub, local, packed, smollm2 or random: who delivers the weights
    id: str | None = None  # Hub repository, for source=hub
    revision: str | None = None  # branch, tag or commit of the Hub repository; recorded as the commit
    path: str | None = None  # folder, for source=local and source=packed
    trust_remote_code: bool = False
    architecture: str | None = None  # dense or moe, for source=random
    seed: int = 0


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
    inputs: str = "quantized"  # of each block, from the blocks before it: quantized or original (calibrate.py)


@dataclass
class RuntimeConfig:
    device: str = "auto"
    dtype: str = "auto"
    offload: bool = False
    batch_size: int = 1
    threads: int = 0
    min_coverage: float = 0.95
    rerun: bool = False


@dataclass
class SpeedConfig:
    """What to time, apart from quality; all fields are None for speed=none."""

    name: str = "none"
    batch_size: int | None = None
    prefill_tokens: int | None = None
    context_tokens: int | None = None
    decode_tokens: int | None = None
    repeats: int | None = None


@dataclass
class TrackerConfig:
    name: str = "none"
    project: str = "qbench"
    entity: str | None = None
    group: str | None = None
    mode: str = "auto"


@dataclass
class ExportConfig:
    dir: str | None = None  # folder for the checkpoint of a point that succeeded
    format: str = "packed"  # or autogptq


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    quantizer: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    outputs: str = "outputs"


def register() -> None:
    """Makes the schema known to Hydra under the name that `conf/config.yaml` starts from."""
    ConfigStore.instance().store(name="qbench_schema", node=Config)
