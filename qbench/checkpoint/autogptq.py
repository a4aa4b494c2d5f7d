"""AutoGPTQ's checkpoint format, as its successor gptqmodel loads it: for weights that its formula can hold.

    W[o, i] = (codes[o, i] - zero[o, g_idx[i]]) * scale[o, g_idx[i]]

Per linear, with `n` codes of `nbits` bits as one little-endian bit stream in 32-bit words (so 32 codes of 3 bits
fill 3 words, and some straddle two):

    qweight  int32 [in * nbits / 32, out]      codes, packed along `in`
    qzeros   int32 [groups, out * nbits / 32]  zero points, packed along `out`
    scales   fp16  [groups, out]
    g_idx    int32 [in]                        the group of each input channel; act-order makes it irregular

There are two conventions for qzeros. The first ("gptq") stores zero - 1, so it has no room for 0; it is written for
symmetric weights, whose zero points are all 2**(nbits - 1), since every reader knows it. Asymmetric weights are
written as "gptq_v2", which stores the zero point itself: gptqmodel refuses them in the first convention.

The other tensors are cast to fp16, or stay in bf16. Nothing else changes: what cannot be held exactly is refused.
That includes an asymmetric group whose weights all lie on one side of zero, since our zero points are not clamped.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbench import __version__
from qbench.checkpoint import packed as checkpoint
from qbench.checkpoint import served
from qbench.checkpoint.served import INSTEAD, example, integer_refusal
from qbench.errors import RequestError
from qbench.format.aux import FP16_MAX
from qbench.format.format import Format
from qbench.format.weight import QuantizedWeight
from qbench.format.words import WORD, pack_words
from qbench.layers.linear import in_packed_format
from qbench.model.linears import find_linears, matrix
from qbench.quant.quantizer import Quantizer

WHOSE = "AutoGPTQ's"
QUANTIZE_CONFIG = "quantize_config.json"
DIFFERENT = f"the layers differ in bits or group size, and AutoGPTQ's format has one of each; {INSTEAD}"


@dataclass(frozen=True)
class AutoGPTQ:
    """export.format=autogptq."""

    def refuse(self, quantizer: Quantizer) -> str | None:
        """Seen from a small weight that it quantizes here."""
        quantized = example(quantizer)
        return None if quantized is None else format_refusal(quantized)

    def refuse_model(self, model: Any, quantizer: Quantizer) -> str | None:
        found = find_linears(model)
        for name in found.experts:
            return f"AutoGPTQ's format has no place for fused experts ({name}); use export.format=packed"
        sizes = set()
        for name, layer in found.layers.items():
            weight = matrix(layer)
            rows, columns = weight.shape
            group_size = quantizer.columns(weight)
            if reason := shape_refusal(rows, columns, group_size):
                return f"layer {name}: {reason}"
            sizes.add((group_size, columns))
        return DIFFERENT if common_group(sizes) is None else None

    def check_target(self, folder: Path, run_id: str | None = None) -> None:
        check_target(folder, run_id)

    def save(self, model: Any, tokenizer: Any, folder: Path, origin: Mapping[str, Any]) -> None:
        save(model, tokenizer, folder, origin=origin)


def check_target(folder: Path, run_id: str | None = None) -> None:
    """Raises RequestError when `save` could not put a checkpoint at `folder`; as `checkpoint.check_target`."""
    checkpoint.check_target(folder, run_id, _origin, "AutoGPTQ checkpoint of ours")


def format_refusal(weight: Format) -> str | None:
    """Why no weight that is stored like this one can be expressed; None if it can."""
    if not isinstance(weight, QuantizedWeight):
        return f"it is stored as {weight.name}, which AutoGPTQ's format has no place for; {INSTEAD}"
    return integer_refusal(weight, WHOSE)


def shape_refusal(rows: int, columns: int, group_size: int) -> str | None:
    """Why a weight `[rows, columns]` in groups of `group_size` columns cannot be expressed; None if it can.

    Readers want both sizes of a layer in multiples of a word.
    """
    if rows % WORD or columns % WORD:
        return f"its shape [{rows}, {columns}] is not a multiple of {WORD} both ways, as AutoGPTQ's format needs"
    if columns % group_size:
        return (
            f"its {columns} input channels are no multiple of quantizer.group_size={group_size}, and AutoGPTQ's "
            "format is only read with whole groups; use a group size that divides them, or -1"
        )
    return None


def save(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    max_shard_bytes: int = checkpoint.SHARD_BYTES,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Writes the quantized `model` to `folder`, complete or not at all, replacing a checkpoint of ours that is there.

    Raises RequestError, before anything is written, naming the layer that cannot be expressed.
    """
    check_target(folder)
    dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16
    with in_packed_format(model), checkpoint.new_folder(folder) as partial:
        weights = expressible(model)
        quantization = quantize_config(weights, origin or {})
        v1 = quantization["checkpoint_format"] == "gptq"
        served.write_json(partial / QUANTIZE_CONFIG, quantization)
        content = served.tensors(
            model, weights, lambda weight: layer_tensors(weight, v1), lambda n, t: _sixteen_bit(n, t, dtype)
        )
        config = {"dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization}
        served.write(model, tokenizer, partial, content, config, max_shard_bytes)


def expressible(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The model's quantized linears by name; raises RequestError unless the format can hold every one of them."""
    weights = served.quantized_matrices(model, WHOSE)
    for name, weight in weights.items():
        if reason := format_refusal(weight) or shape_refusal(*weight.shape, weight.group_size):
            raise RequestError(f"layer {name}: {reason}")
    served.check_zeros(weights, WHOSE)
    if len({weight.nbits for weight in weights.values()}) > 1 or common_group(_sizes(weights)) is None:
        raise RequestError(DIFFERENT)
    return weights


def quantize_config(weights: Mapping[str, QuantizedWeight], origin: Mapping[str, Any]) -> dict[str, Any]:
    """The content of quantize_config.json, for weights that are `expressible`."""
    first = next(iter(weights.values()))
    symmetric = all(weight.zero is None for weight in weights.values())
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "bits": first.nbits,
        "group_size": common_group(_sizes(weights)),
        "sym": symmetric,
        "desc_act": any(weight.permutation is not None for weight in weights.values()),
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"qbench:{__version__}"], "origin": dict(origin)},
    }


def layer_tensors(weight: QuantizedWeight, v1: bool) -> dict[str, Tensor]:
    """qweight, qzeros, scales and g_idx of one weight `[out, in]`; with `v1` the zero points are stored less one."""
    codes = weight.codes()
    group = torch.arange(weight.shape[1], dtype=torch.int32, device=codes.device) // weight.group_size
    if weight.permutation is not None:  # back to the order of the input channels; the groups say what was where
        back = weight.permutation.long().argsort()
        codes, group = codes[:, back], group[back]
    zero = torch.full_like(weight.scale.stored, 2 ** (weight.nbits - 1)) if weight.zero is None else weight.zero.stored
    return {
        "qweight": pack_words(codes.T, weight.nbits),
        "qzeros": pack_words(zero.int() - int(v1), weight.nbits).T.contiguous(),
        "scales": weight.scale.stored.T.contiguous(),
        "g_idx": group,
    }


def _sixteen_bit(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if dtype == torch.float16 and tensor.numel() and tensor.abs().max() > FP16_MAX:
        raise RequestError(f"{name} holds values above {FP16_MAX:.0f}, too large for fp16; use runtime.dtype=bfloat16")
    return tensor.to(dtype)


def _sizes(weights: Mapping[str, QuantizedWeight]) -> set[tuple[int, int]]:
    return {(weight.group_size, weight.shape[1]) for weight in weights.values()}


def common_group(sizes: Collection[tuple[int, int]]) -> int | None:
    """The one group size, or -1 for whole rows, that says all (group size, input channels); None if there is none.

    A row of 64 channels in groups of 64 is one whole row as well, beside layers whose rows are longer.
    """
    if all(group_size == columns for group_size, columns in sizes):
        return -1
    groups = {group_size for group_size, _ in sizes}
    return groups.pop() if len(groups) == 1 else None


def _origin(folder: Path) -> Mapping[str, Any]:
    """What `save` was told about the checkpoint at `folder`; raises RequestError when that is not one of ours."""
    try:
        origin = json.loads((folder / QUANTIZE_CONFIG).read_text(encoding="utf-8"))["meta"]["origin"]
    except (OSError, ValueError, KeyError, TypeError):
        origin = None
    if not isinstance(origin, dict):
        raise RequestError(f"{folder} holds no AutoGPTQ checkpoint of ours")
    return origin
