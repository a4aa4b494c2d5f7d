"""compressed-tensors' checkpoint format, which vLLM, SGLang and transformers load: integers and the block floats.

    pack-quantized        W[o, i] = (codes[o, i] - zero[o, g(i)]) * scale[o, g(i)]
      weight_packed       int32 [out, ceil(in * nbits / 32)]      codes as one little-endian bit stream along `in`
      weight_scale        fp16 or fp32 [out, groups]
      weight_zero_point   int32 [ceil(out * nbits / 32), groups]  packed along `out`; asymmetric weights have it
      weight_shape        int64 [2]
    naive-quantized       fp8: weight, e4m3 [out, in], and weight_scale, as in format/blockfloat.py; [1] per tensor
    mxfp8-quantized       the same with weight_scale as e8m0 bytes, uint8 [out, in / 32]
    mxfp4-pack-quantized  weight_packed, uint8 [out, in / 2], and weight_scale, e8m0 bytes [out, in / 32]
    nvfp4-pack-quantized  weight_packed; weight_scale, e4m3 [out, in / 16]; weight_global_scale, fp32 [1], which divides

Only weights are quantized: the activations stay in 16 bit. Layers that differ in bits or groups go into config groups
of their own. All other tensors stay in the model's precision. Nothing changes: what cannot be held exactly is refused.
Act-order is held where it needs no permutation.

A reader may compute in less than fp32. transformers casts scales to the model's precision, or with `dequantize=True`
computes in theirs: then `+export.scale_dtype=fp32` makes it fp32. The weights of MX and NV formats it computes in bf16,
which is exact for MX; a model in fp32 takes them with `dequantize=True` alone. So it does asymmetric weights, whose
zero points it otherwise expects unpacked, even from compressed-tensors' own writer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbench import __version__
from qbench.checkpoint import packed as checkpoint
from qbench.checkpoint import served
from qbench.checkpoint.expert_names import expert_names
from qbench.checkpoint.served import INSTEAD, example, integer_refusal
from qbench.errors import RequestError, none_of
from qbench.format.blockfloat import MX_BLOCK, FP8Weight, MXFP4Weight, NVFP4Weight
from qbench.format.format import Format
from qbench.format.weight import QuantizedWeight
from qbench.format.words import pack_words
from qbench.layers.expert_form import expert_weights
from qbench.layers.linear import in_packed_format
from qbench.model.linears import find_linears, matrix
from qbench.quant.quantizer import Quantizer

METHOD, WHOSE = "compressed-tensors", "compressed-tensors'"
WRITTEN_FOR = "0.20.0"  # the release of compressed-tensors whose layout this is
SCALE_DTYPES = ("stored", "fp32")
ORIGIN = "origin.json"  # what the checkpoint was made of; readers pass it by


@dataclass(frozen=True)
class CompressedTensors:
    """export.format=compressed-tensors."""

    scale_dtype: str = "stored"  # of integers' scales as written: as they are stored (fp16), or fp32

    def __post_init__(self) -> None:
        if self.scale_dtype not in SCALE_DTYPES:
            raise none_of("scale_dtype", self.scale_dtype, SCALE_DTYPES)

    def refuse(self, quantizer: Quantizer) -> str | None:
        """Seen from a small weight that it quantizes here."""
        quantized = example(quantizer)
        return None if quantized is None else format_refusal(quantized)

    def refuse_model(self, model: Any, quantizer: Quantizer) -> str | None:
        found, likely = find_linears(model), example(quantizer)
        if likely is None:
            return None
        matrices = {name: matrix(layer) for name, layer in found.layers.items()}
        for name, experts in found.experts.items():
            if (names := expert_names(model, name)) is None:
                return (
                    f"compressed-tensors' format has no place for fused experts like {name}; use export.format=packed"
                )
            matrices |= dict(zip(names.values(), expert_weights(experts, 0), strict=True))
        for name, weight in matrices.items():
            if not isinstance(likely, QuantizedWeight):  # calibration-free, and small
                likely = example(quantizer, weight.shape[1]) or likely
            group_size = quantizer.columns(weight) if isinstance(likely, QuantizedWeight) else likely.group_size
            if reason := shape_refusal(likely, weight.shape[1], group_size):
                return f"layer {name}: {reason}"
        return None

    def check_target(self, folder: Path, run_id: str | None = None) -> None:
        checkpoint.check_target(folder, run_id, _origin, "compressed-tensors checkpoint of ours")

    def save(self, model: Any, tokenizer: Any, folder: Path, origin: Mapping[str, Any]) -> None:
        save(model, tokenizer, folder, origin=origin, scale_dtype=self.scale_dtype)


def save(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    max_shard_bytes: int = checkpoint.SHARD_BYTES,
    origin: Mapping[str, Any] | None = None,
    scale_dtype: str = "stored",
) -> None:
    """Writes the quantized `model` to `folder`, complete or not at all, replacing a checkpoint of ours that is there.

    Raises RequestError, before anything is written, naming the layer that cannot be expressed.
    """
    CompressedTensors().check_target(folder)
    with in_packed_format(model), checkpoint.new_folder(folder) as partial:
        weights = expressible(model)
        config = {"dtype": str(model.dtype).removeprefix("torch."), "quantization_config": quantization(model, weights)}
        content = served.tensors(model, weights, lambda weight: parts(weight, scale_dtype))
        served.write(model, tokenizer, partial, content, config, max_shard_bytes)
        served.write_json(partial / ORIGIN, {"made_by": f"qbench:{__version__}", "origin": dict(origin or {})})


def expressible(model: nn.Module) -> dict[str, Format]:
    """The model's quantized linears by name; raises RequestError unless the format can hold every one of them."""
    weights = served.quantized_matrices(model, WHOSE, experts=True)
    for name, weight in weights.items():
        if reason := format_refusal(weight) or shape_refusal(weight, weight.shape[1], weight.group_size):
            raise RequestError(f"layer {name}: {reason}")
    served.check_zeros(weights, WHOSE)
    return weights


def format_refusal(weight: Format) -> str | None:
    """Why no weight that is stored like this one can be expressed; None if it can."""
    if isinstance(weight, QuantizedWeight):
        if weight.permutation is not None:
            return (
                "its groups follow act-order, which compressed-tensors no longer reads; use "
                "quantizer.static_groups=true, or export.format=autogptq"
            )
        return integer_refusal(weight, WHOSE)
    if isinstance(weight, NVFP4Weight) and not weight.global_divides:
        return f"its global scale multiplies and compressed-tensors' divides, which rounds otherwise; {INSTEAD}"
    if isinstance(weight, FP8Weight) and weight.scale.dtype == torch.uint8 and not _is_mxfp8(weight):
        return f"its scales are powers of two of blocks other than 32 input channels; {INSTEAD}"
    if not isinstance(weight, (FP8Weight, MXFP4Weight, NVFP4Weight)):
        return f"it is stored as {weight.name}, which compressed-tensors' format has no place for; {INSTEAD}"
    return None


def shape_refusal(stored: Format, columns: int, group_size: int) -> str | None:
    """Why rows of `columns` input channels in groups of `group_size` cannot be stored like this; None if they can."""
    if isinstance(stored, FP8Weight) and stored.block[0] > 1:  # blocks may end early
        return None
    fixed = isinstance(stored, (MXFP4Weight, NVFP4Weight)) or _is_mxfp8(stored)
    if columns % group_size == 0 or (group_size > columns and not fixed):
        return None
    instead = INSTEAD if fixed else f"use a group size that divides them, or -1; {INSTEAD}"
    return (
        f"its {columns} input channels are no multiple of the {group_size} that share a scale, and compressed-tensors' "
        f"format has whole groups alone; {instead}"
    )


def quantization(model: nn.Module, weights: Mapping[str, Format]) -> dict[str, Any]:
    """What config.json says as `quantization_config`, for weights that are `expressible`."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    rows = all(weight.group_size == weight.shape[1] for weight in weights.values())
    for name, weight in weights.items():
        how = scheme(weight, rows)
        groups.setdefault(json.dumps(how), (how, []))[1].append(name)
    alike = len(groups) == 1
    formats = {how["format"] for how, _ in groups.values()}
    left = [name for name, module in model.named_modules() if _is_linear(module)]
    return {
        "quant_method": METHOD,
        "version": WRITTEN_FOR,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": ["Linear"] if alike else names, **how}
            for i, (how, names) in enumerate(groups.values())
        },
        "ignore": left if alike else [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def scheme(weight: Format, rows: bool = True) -> dict[str, Any]:
    """How one weight is stored, as a config group says it.

    Without `rows`, a row of 64 channels in groups of 64 is called one group, as it is beside layers with longer rows.
    """
    columns = weight.shape[1]
    args: dict[str, Any] = {"type": "float", "symmetric": True, "dynamic": False}
    if isinstance(weight, QuantizedWeight):
        args |= {"num_bits": weight.nbits, "type": "int", "symmetric": weight.zero is None}
        whole = weight.group_size > columns or (rows and weight.group_size == columns)
        args |= {"strategy": "channel"} if whole else _grouped(weight.group_size)
        kind = "pack-quantized"
    elif isinstance(weight, NVFP4Weight):
        args |= {"num_bits": 4, "strategy": "tensor_group", "group_size": weight.group_size}
        args |= {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
        kind = "nvfp4-pack-quantized"
    elif isinstance(weight, MXFP4Weight):
        args |= {"num_bits": 4, **_grouped(MX_BLOCK), "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        kind = "mxfp4-pack-quantized"
    elif _is_mxfp8(weight):
        args |= {"num_bits": 8, **_grouped(MX_BLOCK), "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        kind = "mxfp8-quantized"
    else:
        shared, width = weight.block
        args |= {"num_bits": 8}
        if shared == 1:
            args |= {"strategy": "channel"} if width >= columns else _grouped(width)
        elif weight.block == weight.shape:
            args |= {"strategy": "tensor"}
        else:
            args |= {"strategy": "block", "block_structure": list(weight.block)}
        kind = "naive-quantized"
    return {"weights": args, "input_activations": None, "output_activations": None, "format": kind}


def parts(weight: Format, scale_dtype: str = "stored") -> dict[str, Tensor]:
    """What is written of one weight `[out, in]`, by the last part of its name."""
    if isinstance(weight, QuantizedWeight):
        named = {
            "weight_packed": pack_words(weight.codes().T, weight.nbits).T,
            "weight_scale": weight.scale.stored if scale_dtype == "stored" else weight.scale.dense(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if weight.zero is not None:
            named["weight_zero_point"] = pack_words(weight.zero.stored.int(), weight.nbits)
        return named
    if isinstance(weight, FP8Weight):
        scale = weight.scale.flatten() if scheme(weight)["weights"]["strategy"] == "tensor" else weight.scale
        return {"weight": weight.codes.view(torch.float8_e4m3fn), "weight_scale": scale}
    if isinstance(weight, MXFP4Weight):
        return {"weight_packed": weight.codes, "weight_scale": weight.scale}
    assert isinstance(weight, NVFP4Weight)
    return {
        "weight_packed": weight.codes,
        "weight_scale": weight.scale.view(torch.float8_e4m3fn),
        "weight_global_scale": weight.global_scale.flatten(),
    }


def _grouped(group_size: int) -> dict[str, Any]:
    return {"strategy": "group", "group_size": group_size}


def _is_linear(module: nn.Module) -> bool:
    """Whether a reader takes it for a linear in 16 bits: routers are linears in vLLM, whatever they are here."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _is_mxfp8(weight: Format) -> bool:
    return isinstance(weight, FP8Weight) and weight.scale.dtype == torch.uint8 and weight.block == (1, MX_BLOCK)


def _origin(folder: Path) -> Mapping[str, Any]:
    """What `save` was told about the checkpoint at `folder`; raises RequestError when that is not one of ours."""
    try:
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["origin"]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ours = isinstance(origin, dict) and config["quantization_config"]["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise RequestError(f"{folder} holds no compressed-tensors checkpoint of ours")
    return origin
