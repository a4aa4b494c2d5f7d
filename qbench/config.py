"""The shape of a request, checked by Hydra before anything heavy is imported (no torch here).

A quantizer's own fields are not listed: they come from `conf/quantizer/NAME.yaml`, which mirrors the
quantizer's dataclass, so that a third party adds a method without editing this file. A tracker's are not, either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
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
class TextConfig:
    """A text: embedded under `name`, a local file, or a dataset of the Hub."""

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


@dataclass
class TaskConfig(TextConfig):
    protocol: str = MISSING  # windows, crops or pages (evaluate/windows.py), or lmeval (evaluate/lmeval.py)
    max_windows: int | None = None
    pages: int | None = None  # to join, for protocol=pages
    divergence: bool = True
    divergence_topk: int = 64
    names: list[str] = field(default_factory=list)  # lm-eval's tasks or groups, for protocol=lmeval
    limit: int | None = None  # documents of each
    num_fewshot: int | None = None
    include_path: str | None = None  # folder with YAML of further lm-eval tasks
    add_bos_token: bool | None = None


@dataclass
class CalibrationConfig(TextConfig):
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
class ExportConfig:
    dir: str | None = None  # folder for the checkpoint of a point that succeeded
    format: str = "packed"  # or autogptq


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    quantizer: dict[str, Any] = field(default_factory=dict)
    task: TaskConfig = field(default_factory=TaskConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    tracker: dict[str, Any] = field(default_factory=dict)
    export: ExportConfig = field(default_factory=ExportConfig)
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
