"""Folders of quantized safetensors for tests, written part by part as each format is published."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from qbench.sources.tiny import build

Pack = Callable[[str, Tensor], dict[str, Tensor]]
ENDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@cache
def skeleton(architecture: str = "dense"):
    return build(architecture, 0)[0].to("meta")


@cache
def plain(architecture: str) -> tuple[dict, dict[str, Tensor]]:
    """config.json and the tensors that transformers saves of a tiny model: every expert's matrix by itself."""
    with tempfile.TemporaryDirectory() as name:
        build(architecture, 0)[0].half().save_pretrained(folder := Path(name))
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        return config, {key: tensor.clone() for key, tensor in tensors.items()}


def write(folder: Path, pack: Pack, quantization: dict, architecture: str = "dense") -> Path:
    """Writes a tiny model to `folder`, every linear of its blocks as the parts `.NAME` that `pack` makes of it.

    `pack` is given the module's name and weight `[out, in]` in fp16, and returns {} for what stays as it is.
    """
    config, tensors = plain(architecture)
    written = {}
    for key, tensor in tensors.items():
        module, _, last = key.rpartition(".")
        parts = pack(module, tensor) if last == "weight" and module.endswith(ENDS) else {}
        written |= {f"{module}.{part}": value.contiguous().clone() for part, value in parts.items()} or {key: tensor}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    save_file(written, folder / "model.safetensors", {"format": "pt"})
    return folder
