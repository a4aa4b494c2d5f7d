"""What a model can be fed: token ids that its embedding has, and no more positions than it has.

An id beyond the embedding is an IndexError on a CPU, and on a GPU an assertion on the device, after which the process
can do nothing more. So are positions that are rows of a table. Rotary positions can be counted on for ever, at a loss
that is not the quantizer's: that has to be asked for (`beyond_positions=true`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qbench.config import CalibrationConfig, Config, RuntimeConfig, SpeedConfig
from qbench.errors import RequestError
from qbench.evaluate.protocol import Protocol

CPU_BATCH, GPU_BATCH = 1, 8  # sequences: a CPU is busy with one of 2048 tokens, a GPU with a few of them


def batch_size(runtime: RuntimeConfig, device_type: str) -> int:
    """Sequences in a forward pass on a device such as `cuda`. Raises RequestError for less than one."""
    size = runtime.batch_size
    if size is None:
        return GPU_BATCH if device_type.startswith("cuda") else CPU_BATCH
    if size < 1:
        raise RequestError(f"runtime.batch_size must be at least 1, or null for the device's own, got {size}")
    return size


@dataclass(frozen=True)
class Limits:
    """None where the model sets none, as those without positions do."""

    vocabulary: int | None  # rows of the embedding
    positions: int | None
    rotary: bool = False

    @staticmethod
    def of(config: Any) -> Limits:
        """As transformers' configuration says."""
        text = config.get_text_config(decoder=True)
        rotary = any(getattr(text, key, None) is not None for key in ("rope_parameters", "rope_theta", "rotary_dim"))
        return Limits(getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None), rotary)


def check_request(config: Config, protocol: Protocol, model: Any | None, calibrated: bool) -> None:
    """Raises RequestError, before any weight is read, for windows that the model's configuration has no room for.

    `model` is transformers' configuration, None where it is not known yet (Source.configuration).
    """
    if model is not None:
        check_positions(Limits.of(model), protocol, config.calibration if calibrated else None, config.speed)


def check_model(
    model: Any, config: Config, protocol: Protocol, scored: np.ndarray | None, calibration: np.ndarray | None
) -> None:
    """Raises RequestError, before the first forward pass, for windows or ids that the loaded model has no room for.

    `scored` and `calibration` are the ids `[windows, tokens]`; None where a task makes them as it goes, or none is.
    """
    limits = Limits.of(model.config)
    check_positions(limits, protocol, None if calibration is None else config.calibration, config.speed)
    limits = replace(limits, vocabulary=model.get_input_embeddings().weight.shape[0])
    for ids, what in ((scored, "the text"), (calibration, "the calibration text")):
        if ids is not None:
            check_ids(limits, ids, what)


def check_positions(
    limits: Limits, task: Protocol, calibration: CalibrationConfig | None, speed: SpeedConfig | None
) -> None:
    """Raises RequestError when a window that is asked for is longer than the model's positions."""
    most = limits.positions
    if most is None:
        return
    for group, asked in (("task", task), ("calibration", calibration)):
        if asked is None or asked.window <= most or (asked.beyond_positions and limits.rotary):
            continue
        if asked.beyond_positions:
            way = "which are learned, so that there are no others"
        else:
            way = f"or {group}.beyond_positions=true, if its positions are rotary"
        raise RequestError(
            f"{group}.window={asked.window}, but this model takes {most} positions (max_position_embeddings); use "
            f"{group}.window={most}, {way}"
        )
    if speed is not None and speed.name != "none":
        longest = max(*speed.lengths, (speed.context_tokens or 0) + (speed.decode_tokens or 0))
        if longest > most:
            raise RequestError(
                f"speed asks for {longest} tokens in a sequence, this model takes {most}; lower speed.prefill_tokens, "
                "speed.context_tokens or speed.decode_tokens"
            )


def check_ids(limits: Limits, ids: np.ndarray, what: str) -> None:
    """Raises RequestError when `ids`, those of `what`, hold one that the embedding has no row for."""
    if limits.vocabulary is not None and ids.size and (largest := int(ids.max())) >= limits.vocabulary:
        raise RequestError(
            f"the tokenizer gives {what} the token id {largest}, but the model knows {limits.vocabulary} tokens (its "
            "embedding's rows): they do not belong together; resize the model's embedding or use its own tokenizer"
        )
