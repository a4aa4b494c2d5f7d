"""qbench.json: what a packed checkpoint says about itself, sealed by a hash over its own content.

A quantized layer is `{"kind": "QuantLinear", "weights": {PREFIX: WEIGHT}}`: a module may hold several weights, whose
buffers are called PREFIX + name, as its method `packed` says; QuantLinear has one, without a prefix. WEIGHT is what the
weight's format says of it (`Format.describe`), the name under which the format is registered, and what its buffers are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbench import registry
from qbench.errors import RequestError
from qbench.format.format import Format

FORMAT, VERSION = "qbench-packed", 1
MANIFEST = "qbench.json"
DUAL_SCALE = "dual-scale"  # the format of a weight whose description names none
HASHED_AT_ONCE_BYTES = 32 << 20
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


def entry(weight: Format) -> dict[str, Any]:
    """Everything about the weight but its tensors, as JSON holds it.

    Raises RequestError if its format is not registered: nothing could read the checkpoint.
    """
    if registry.find(registry.FORMAT, weight.name) is not type(weight):
        raise RequestError(f"another format than {type(weight).__name__} is registered as '{weight.name}'")
    buffers = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in weight.tensors().items()}
    return {"format": weight.name} | weight.describe() | {"buffers": buffers}


def rebuild(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Format:
    """The weight of an `entry` over its stored `tensors`; raises KeyError or ValueError if one is off.

    Raises RequestError if its format is not registered here.
    """
    own = dict(description)
    format = registry.find(registry.FORMAT, own.pop("format", DUAL_SCALE))
    buffers = own.pop("buffers")
    named = {name: tensors[name] for name in buffers}
    for name, (dtype, shape) in buffers.items():
        if named[name].dtype != getattr(torch, dtype) or list(named[name].shape) != shape:
            raise ValueError(f"buffer {name} is not {dtype} {shape}")
    return format.rebuild(own, named)


def file_sha256(path: Path) -> str:
    """Of a file's content, 64 hex digits.

    In steps of many milliseconds: between two of them a thread waits for the interpreter's lock, which another one that
    imports modules keeps for 5 ms at a time.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        part = memoryview(bytearray(max(1, min(HASHED_AT_ONCE_BYTES, path.stat().st_size))))
        while count := file.readinto(part):
            digest.update(part[:count])
    return digest.hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
