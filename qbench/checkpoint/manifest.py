"""qbench.json: what a packed checkpoint says about itself, sealed by a hash over its own content.

A quantized layer is `{"kind": "QuantLinear", "weights": {PREFIX: WEIGHT}}`: a module may hold several QuantizedWeights,
whose buffers are called PREFIX + name, as its method `packed` says; QuantLinear has one, without a prefix. WEIGHT is
the part of a QuantizedWeight that is not a tensor, and the names of its buffers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbench.errors import RequestError
from qbench.format.aux import Aux
from qbench.format.packing import PLANES
from qbench.format.weight import QuantizedWeight

FORMAT, VERSION = "qbench-packed", 1
MANIFEST = "qbench.json"
_PARTS = {"config": str, "origin": dict, "layers": dict, "tied": dict, "files": dict}


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the hash that `read` checks."""
    return manifest | {"sha256": _digest(manifest)}


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises RequestError in one sentence when it is missing, foreign or changed."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{folder} is no packed checkpoint: {MANIFEST}: {error.strerror}") from None
    except ValueError as error:
        raise RequestError(f"{path} is damaged or foreign: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RequestError(f"{path} is foreign: it does not say that its format is {FORMAT}")
    if manifest.get("version") != VERSION:
        raise RequestError(f"{path} has version {manifest.get('version')} of the format; this qbench reads {VERSION}")
    sealed = manifest.pop("sha256", None)
    if sealed != _digest(manifest) or not all(isinstance(manifest.get(k), kind) for k, kind in _PARTS.items()):
        raise RequestError(f"{path} is damaged: it was changed after it was written; export the checkpoint again")
    return manifest


def verify(folder: Path, manifest: Mapping[str, Any], weights: bool = True) -> None:
    """Raises RequestError naming the first file that is missing or is not what was written.

    Without `weights` only the small files are read: configuration and tokenizer.
    """
    for name, expected in manifest["files"].items():
        if not weights and name.endswith(".safetensors"):
            continue
        path = folder / name
        try:
            found = file_sha256(path)
        except OSError as error:
            raise RequestError(f"{path}: {error.strerror}; the checkpoint is incomplete, export it again") from None
        if found != expected:
            raise RequestError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}; export it again")


def describe(weight: QuantizedWeight) -> dict[str, Any]:
    """Everything about the weight but its tensors, as JSON holds it."""
    return {
        "shape": list(weight.shape),
        "nbits": weight.nbits,
        "group_size": weight.group_size,
        "method": weight.method,
        "diagnostics": {key: float(value) for key, value in weight.diagnostics.items()},
        "buffers": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in weight.tensors().items()},
    }


def rebuild(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """The weight that `describe` described over its stored `tensors`; raises KeyError or ValueError if one is off."""
    named = {name: tensors[name] for name in description["buffers"]}
    for name, (dtype, shape) in description["buffers"].items():
        if named[name].dtype != getattr(torch, dtype) or list(named[name].shape) != shape:
            raise ValueError(f"buffer {name} is not {dtype} {shape}")
    nbits, nothing = description["nbits"], torch.empty(0)
    empty = QuantizedWeight(
        tuple(description["shape"]),
        nbits,
        description["group_size"],
        (nothing,) * len(PLANES[nbits]),
        Aux(nothing),
        method=description["method"],
        diagnostics=description["diagnostics"],
    )
    return empty.with_tensors(named)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
