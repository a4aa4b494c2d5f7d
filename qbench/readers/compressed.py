"""compressed-tensors, which llm-compressor writes and vLLM reads: integers, packed or one byte a code; and floats.

    pack-quantized   weight_packed int32 [out, ceil(in * bits / 32)], weight_shape; codes shifted by 2**(bits - 1),
                     weight_zero_point int32 [ceil(out * bits / 32), groups] likewise
    int-quantized    weight int8 [out, in], weight_zero_point int8 [out, groups]
    both             weight_scale [out, groups], [out, 1] or [1]; weight_g_idx [in] with act-order, -1 without
    floats           blockfloat.py

quantization_config has groups of settings, each for some targets: names, patterns after "re:" or classes of modules.
Activations that an engine would quantize stay in 16 bits here; a result is that of the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qbench.format.format import Format
from qbench.format.weight import QuantizedWeight
from qbench.format.words import unpack_words
from qbench.readers.blockfloat import float_kind, float_weight
from qbench.readers.folder import HeldFolder, Linear, integer, method_of, quantization_of
from qbench.readers.gptq import BITS, SCALES, group_width, integers, order_of
from qbench.readers.reader import ReadError

PACKED, NAIVE = "pack-quantized", ("int-quantized", "naive-quantized")
REPETITIONS = 6  # in a pattern
ACTIVATIONS = "of activations, which stay in 16 bits here"
CACHE = "of the cache of keys and values, which stays in 16 bits here"


@dataclass(frozen=True)
class CompressedTensors:
    """A qbench.readers.reader.Reader."""

    def recognizes(self, path: Path) -> bool:
        return method_of(path) == "compressed-tensors"

    def open(self, path: Path, model: Any) -> HeldFolder:
        settings = quantization_of(path)
        for name, value in (("sparsity_config", "format"), ("transform_config", "config_groups")):
            said = settings.get(name)
            said = said.get(value) if isinstance(said, dict) else said
            if said and said != "dense":
                raise ReadError(f"{path} has a {name}, and how weights are to be transformed back is not known here")
        schemes = schemes_of(settings)
        held = HeldFolder(path, model, Schemes(schemes), "compressed-tensors")
        kinds = sorted({entry.kind for entry in held.entries.values() if entry.quantized})
        held.made_by = f"compressed-tensors, {', '.join(kinds)}"
        return held


@dataclass(frozen=True)
class Scheme:
    """One of the groups of a config: for which modules, and how their weights are stored."""

    targets: tuple[str, ...]
    format: str
    weights: Mapping[str, Any]

    def matches(self, module: str) -> bool:
        for target in self.targets:
            pattern = target.removeprefix("re:")
            if re.match(pattern, module) if pattern != target else target == module:
                return True
        return False


def schemes_of(settings: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """Raises ReadError when the config's groups are none."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ReadError("the quantization_config has no config_groups, which would say how weights are stored")
    schemes = []
    for name, group in groups.items():
        targets, weights = (group.get(part) if isinstance(group, dict) else None for part in ("targets", "weights"))
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ReadError(f"the quantization_config's {name[:50]} has no list of targets")
        for target in targets:
            if target.startswith("re:") and not harmless(target.removeprefix("re:")):
                raise ReadError(f"the target {target[:50]!r} of the quantization_config is no pattern to be matched")
        if isinstance(weights, dict):
            named = group.get("format") or settings.get("format")
            schemes.append(Scheme(tuple(targets), str(named), weights))
    return tuple(schemes)


def harmless(pattern: str) -> bool:
    """Whether it is a pattern, and one that cannot take forever: few repetitions, and none of repetitions."""
    if len(re.findall(r"[*+{]", pattern)) > REPETITIONS or re.search(r"[*+{][^()]*\)\s*[*+{]", pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


@dataclass(frozen=True)
class Schemes:
    """A layout of qbench.readers.folder: every module by the scheme that is for it."""

    schemes: tuple[Scheme, ...]
    marks = (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
        "weight_shape",
        "weight_global_scale",
    )
    parts = ("weight", *marks)
    unused = MappingProxyType(
        dict.fromkeys(("input_scale", "input_zero_point", "input_global_scale", "input_g_idx"), ACTIVATIONS)
        | dict.fromkeys(("output_scale", "output_zero_point"), ACTIVATIONS)
        | dict.fromkeys(("q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point"), CACHE)
    )

    def scheme(self, linear: Linear) -> Scheme:
        """The one whose target names the module, else the one that is for its class."""
        named = [scheme for scheme in self.schemes if scheme.matches(linear.module)]
        if not (found := named or [scheme for scheme in self.schemes if {*linear.classes} & {*scheme.targets}]):
            raise linear.error("it is quantized, and no group of the quantization_config is for it")
        return found[0]

    def kind(self, linear: Linear) -> str:
        scheme = self.scheme(linear)
        return codec(linear, scheme)[0](linear, scheme)

    def decode(self, linear: Linear, tensors: Mapping[str, Tensor]) -> Format:
        scheme = self.scheme(linear)
        return codec(linear, scheme)[1](linear, scheme, tensors)


def codec(linear: Linear, scheme: Scheme) -> tuple[Callable[..., str], Callable[..., Format]]:
    """What reads a scheme's headers and what reads its tensors; raises ReadError for one that nothing reads."""
    if scheme.weights.get("type") == "float":
        return float_kind, float_weight
    if scheme.weights.get("type", "int") == "int" and scheme.format in (PACKED, *NAIVE):
        return integer_kind, integer_weight
    raise linear.error(
        f"it is stored as {scheme.format[:50]} ({str(scheme.weights.get('type'))[:20]}), and of compressed-tensors' "
        f"formats {', '.join((PACKED, *NAIVE))} of integers are read, and those of floats"
    )


def integer_kind(linear: Linear, scheme: Scheme) -> str:
    (rows, columns), nbits = linear.shape, integer(scheme.weights, "num_bits", 8)
    if scheme.format == PACKED:
        if nbits not in BITS:
            raise linear.error(f"its codes have {nbits} bits, and read are {', '.join(map(str, BITS))}")
        linear.require("weight_packed", (rows, -(-columns * nbits // 32)), dtypes=(torch.int32,))
        if "weight_shape" in linear.stored:
            linear.require("weight_shape", (2,), dtypes=(torch.int32, torch.int64))
    else:
        linear.require("weight", (rows, columns), dtypes=(torch.int8,))
    shape = linear.require("weight_scale", dtypes=SCALES).shape
    groups = groups_of(linear, shape)
    if "weight_zero_point" in linear.stored and scheme.weights.get("symmetric", True) is not True:
        if scheme.format == PACKED and shape == (rows, groups):
            linear.require("weight_zero_point", (-(-rows * nbits // 32), groups), dtypes=(torch.int32,))
        else:
            linear.require("weight_zero_point", shape, dtypes=(torch.int8,))
    if "weight_g_idx" in linear.stored:
        linear.require("weight_g_idx", (columns,), dtypes=(torch.int32, torch.int64))
    width = width_of(linear, scheme, groups)
    return f"int{nbits} " + ("a scale a tensor" if shape in ((), (1,)) else f"g{width}")


def integer_weight(linear: Linear, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    (rows, columns), nbits, packed = linear.shape, integer(scheme.weights, "num_bits", 8), scheme.format == PACKED
    if packed:
        if "weight_shape" in tensors and tensors["weight_shape"].tolist() != [rows, columns]:
            raise linear.error(f"its weight_shape is {tensors['weight_shape'].tolist()}, not {[rows, columns]}")
        codes = unpack_words(tensors["weight_packed"].T, nbits, columns).T
    else:
        codes, nbits = (tensors["weight"].short() + 128).to(torch.uint8), 8
    scale = tensors["weight_scale"]
    groups = groups_of(linear, scale.shape)
    width = width_of(linear, scheme, groups)
    zero = None
    if scheme.weights.get("symmetric", True) is not True:
        if (stored := tensors.get("weight_zero_point")) is None:
            raise linear.error("its weights are asymmetric and weight_zero_point is missing")
        if stored.dtype == torch.int32:
            zero = unpack_words(stored, nbits, rows)
        else:
            zero = (stored.short() + 2 ** (nbits - 1)).to(torch.uint8).reshape(-1, groups).expand(rows, groups)
    permutation = None
    if "weight_g_idx" in tensors and not bool((tensors["weight_g_idx"] == -1).all()):
        permutation = order_of(linear, tensors["weight_g_idx"], width, always=True)
        codes = codes if permutation is None else codes[:, permutation]
    scale = scale.reshape(-1, groups).expand(rows, groups)
    return integers(linear, codes, scale, zero, nbits, width, permutation, "compressed-tensors")


def groups_of(linear: Linear, shape: tuple[int, ...]) -> int:
    """Groups of a row, by the shape of the scales."""
    if tuple(shape) in ((), (1,)):
        return 1
    if len(shape) != 2 or shape[0] != linear.shape[0] or shape[1] < 1:
        raise linear.error(f"weight_scale has the shape {list(shape)}, of a weight {list(linear.shape)}")
    return shape[1]


def width_of(linear: Linear, scheme: Scheme, groups: int) -> int:
    size = scheme.weights.get("group_size")
    return group_width(linear, groups, size if type(size) is int else -1)
