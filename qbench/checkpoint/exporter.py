"""What a format of checkpoints offers: a frozen dataclass whose fields are settings of `export`, and that writes one.

    [project.entry-points."qbench.exporters"]
    mine = "my_package.mine:Mine"

It is chosen with `export.format=mine export.dir=DIR`, and its fields are set with `+export.FIELD=`. What it cannot hold
it refuses before a point's time is spent: the method from the quantizer, the layers from the loaded model.
qbench.testing.ExporterConformance tests what is written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from qbench.quant.quantizer import Quantizer


class Exporter(Protocol):
    """Writes a quantized model; a sentence that refuses says what would do instead."""

    def refuse(self, quantizer: Quantizer) -> str | None:
        """Why nothing that this quantizer makes can be held; None if it can."""
        ...

    def refuse_model(self, model: Any, quantizer: Quantizer) -> str | None:
        """Why what the quantizer will make of this loaded `model` cannot be held, naming the layer; None if it can."""
        ...

    def check_target(self, folder: Path, run_id: str | None = None) -> None:
        """Raises RequestError when `save` could not put a checkpoint at `folder`; creates nothing.

        A folder that holds anything but a checkpoint of this format is occupied; with `run_id`, so is one that holds
        the checkpoint of another point.
        """
        ...

    def save(self, model: Any, tokenizer: Any, folder: Path, origin: Mapping[str, Any]) -> None:
        """Writes the quantized `model` to `folder`, complete or not at all, replacing one of ours that is there.

        `origin` is kept with it: `run_id`, `qbench_version`, `model` and `quantizer` of the point. Raises RequestError,
        before anything is written, for what cannot be held.
        """
        ...
