"""SINQ's checkpoints, as its package and transformers with the package save them: arXiv 2509.22944.

W_q                             packed codes of the table, see format/hqq.py
meta.scale, meta.zero           [rows, 1]; or in 8 bits meta.scale.x uint8 [parts, rows / parts], .s, .m
meta.scale2                     t, [1, in]
model.safetensors.index.json.meta.json
                                a JSON object: {module: {"meta": {"nbits", "axis", "group_size", "shape", "method"}}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qbench.format.hqq import HQQWeight
from qbench.quant.codebook import NF4_LEVELS
from qbench.readers.folder import HeldFolder, Linear, config_of, quantization_of
from qbench.readers.hqq import FLOATS, table_weight
from qbench.readers.hqq import SINQ_BESIDE as BESIDE
from qbench.readers.reader import ReadError

AUX = ("scale", "zero")


@dataclass(frozen=True)
class SINQ:
    """A qbench.readers.reader.Reader."""

    def recognizes(self, path: Path) -> bool:
        settings = quantization_of(path)
        told = {str(settings.get(key, "")).lower() for key in ("quant_method", "quantization_method", "backend")}
        return "sinq" in told or (path.is_dir() and (path / BESIDE).is_file())

    def open(self, path: Path, model: Any) -> HeldFolder:
        settings = config_of(path, BESIDE)
        if not settings:
            raise ReadError(f"{path} lacks {BESIDE}, which says how its codes are packed")
        said = {name: about.get("meta") for name, about in settings.items() if isinstance(about, dict)}
        layout = Tables({name: meta for name, meta in said.items() if isinstance(meta, dict)})
        held = HeldFolder(path, model, layout, "SINQ")
        kinds = sorted({entry.kind for entry in held.entries.values() if entry.quantized})
        held.made_by = f"SINQ, {', '.join(kinds)}"
        return held


@dataclass(frozen=True)
class Tables:
    """A layout of qbench.readers.folder; `settings` are those of every module."""

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    marks = ("W_q",)
    parts = ("W_q", *(f"meta.{name}{part}" for name in AUX for part in ("", ".x", ".s", ".m")), "meta.scale2")
    unused = MappingProxyType({})

    def about(self, linear: Linear) -> Mapping[str, Any]:
        """A module's settings; raises ReadError for a method that is none of uniform codes or NF4."""
        if linear.module not in self.settings:
            raise linear.error(f"{BESIDE} says nothing of it")
        about = self.settings[linear.module]
        method = str(about.get("method", "")).lower()
        if about.get("shape") != list(linear.shape):
            raise linear.error(
                f"{BESIDE} says that its shape is {str(about.get('shape'))[:50]}, not {list(linear.shape)}"
            )
        if not re.fullmatch(r"\w{1,50}", method) or "nf3" in method:
            raise linear.error(f"its method is {method[:50]!r}, which is not read")
        return about

    def kind(self, linear: Linear) -> str:
        about = self.about(linear)
        linear.require("W_q", dtypes=(torch.uint8, torch.int32, *FLOATS))
        for name in AUX:
            if f"meta.{name}.x" in linear.stored:
                parts, width = (*linear.require(f"meta.{name}.x", dtypes=(torch.uint8,)).shape, 0, 0)[:2]
                linear.require(f"meta.{name}.x", (parts, width))
                for part in ("s", "m"):
                    linear.require(f"meta.{name}.{part}", (1, width), dtypes=FLOATS)
            else:
                linear.require(f"meta.{name}", dtypes=FLOATS)
        if "meta.scale2" in linear.stored:
            linear.require("meta.scale2", (1, linear.shape[1]), (linear.shape[1],), dtypes=FLOATS)
        return f"{str(about['method'])[:20]} {str(about.get('nbits'))[:9]} bits g{str(about.get('group_size'))[:9]}"

    def decode(self, linear: Linear, tensors: Mapping[str, Tensor]) -> HQQWeight:
        about, more = self.about(linear), {}
        stored = {}
        for name in AUX:
            if (codes := tensors.get(f"meta.{name}.x")) is None:
                stored[name] = tensors[f"meta.{name}"]
                continue
            stored[name] = codes
            more |= {f"{name}_step": tensors[f"meta.{name}.s"], f"{name}_offset": tensors[f"meta.{name}.m"]}
        if (t := tensors.get("meta.scale2")) is not None:
            more["input_scale"] = t.flatten()
        if "nf4" in str(about["method"]).lower():
            if about.get("nbits") != 4:
                raise linear.error("its method is NF4 and its codes are not of 4 bits")
            more["levels"] = torch.tensor(NF4_LEVELS).to(more.get("scale_step", stored["scale"]).dtype)
        settings = [about.get(name) for name in ("nbits", "axis", "group_size")]
        dtype = str(about.get("compute_dtype") or "float16").removeprefix("torch.")
        return table_weight(linear, settings, dtype, tensors["W_q"], **stored, method="sinq", **more)
