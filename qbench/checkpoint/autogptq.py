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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbench import __version__
from qbench.checkpoint import packed as checkpoint
from qbench.checkpoint import settings
from qbench.errors import RequestError
from qbench.format.aux import FP16_MAX
from qbench.format.format import Format
from qbench.format.weight import QuantizedWeight
from qbench.layers.linear import PackedWeight, QuantLinear, in_packed_format
from qbench.model.linears import find_linears, matrix
from qbench.quant.quantizer import InputStatistics, Quantizer

QUANTIZE_CONFIG = "quantize_config.json"
WORD = 32  # bits; readers want both sizes of a layer in multiples of it
INSTEAD = "export.format=packed keeps everything"
DIFFERENT = f"the layers differ in bits or group size, and AutoGPTQ's format has one of each; {INSTEAD}"


@dataclass(frozen=True)
class AutoGPTQ:
    """export.format=autogptq."""

    def refuse(self, quantizer: Quantizer) -> str | None:
        """Seen from a small weight that it quantizes here."""
        group_size: int = getattr(quantizer, "group_size", -1)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(8, 64 if group_size == -1 else group_size, generator=generator)
        inputs = torch.randn(64, weight.shape[1], generator=generator)
        stats = InputStatistics(len(inputs), inputs.abs().mean(0), inputs, inputs.T @ inputs, inputs.square().mean(0))
        try:
            [quantized] = quantizer.quantize([weight], stats if quantizer.needs else None)
        except ValueError:  # said better where it meets the model
            return None
        return format_refusal(quantized)

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
    for part, what in (
        (weight.input_scale, "it stores an input scale t beside the group scales"),
        (weight.codebook, "its codes index a codebook instead of being evenly spaced"),
    ):
        if part is not None:
            return f"{what}, which AutoGPTQ's format has no place for; {INSTEAD}"
    if any(aux is not None and aux.step is not None for aux in (weight.scale, weight.zero)):
        return "its scales are stored in int8 and AutoGPTQ's in fp16; use quantizer.aux_dtype=fp16"
    if weight.zero is not None and not torch.equal(weight.zero.stored, weight.zero.stored.round()):
        return f"its zero points are not integers, which AutoGPTQ's must be; {INSTEAD}"
    return None


def shape_refusal(rows: int, columns: int, group_size: int) -> str | None:
    """Why a weight `[rows, columns]` in groups of `group_size` columns cannot be expressed; None if it can."""
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
        settings.write(model, tokenizer, partial)
        path = partial / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization}
        config["architectures"] = config.get("architectures") or [type(model).__name__]
        _write_json(path, config)
        _write_json(partial / QUANTIZE_CONFIG, quantization)
        shards = checkpoint.write_shards(_tensors(model, weights, v1, dtype), partial, max_shard_bytes)
        if len(shards) == 1:
            (partial / next(iter(shards))).rename(partial / "model.safetensors")
        else:
            files = {name: file for file, sizes in shards.items() for name in sizes}
            total = sum(sum(sizes.values()) for sizes in shards.values())
            index = {"metadata": {"total_size": total}, "weight_map": files}
            _write_json(partial / "model.safetensors.index.json", index)


def expressible(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The model's quantized linears by name; raises RequestError unless the format can hold every one of them."""
    weights: dict[str, QuantizedWeight] = {}
    outside: dict[str, int] = {}
    groups = 0
    for name, module in model.named_modules():
        if not isinstance(module, PackedWeight):
            continue
        if not isinstance(module, QuantLinear):
            raise RequestError(f"{name}: AutoGPTQ's format has no place for stacks of experts; {INSTEAD}")
        weights[name] = weight = module.quantized
        rows, columns = weight.shape
        if reason := format_refusal(weight) or shape_refusal(rows, columns, weight.group_size):
            raise RequestError(f"layer {name}: {reason}")
        if weight.zero is not None:
            zero = weight.zero.dense()
            groups += zero.numel()
            if count := int(((zero < 0) | (zero > 2**weight.nbits - 1)).sum()):
                outside[name] = count
    if not weights:
        raise RequestError("the model has no quantized layer; save_pretrained is the way to save it")
    if outside:
        raise RequestError(
            f"{sum(outside.values())} of {groups} groups, the first in layer {next(iter(outside))}, have a zero point "
            f"outside of the codes, since their weights all lie on one side of zero; AutoGPTQ's format has no room "
            f"for that: use quantizer.symmetric=true or export.format=packed"
        )
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


def pack_words(values: Tensor, nbits: int) -> Tensor:
    """Packs integers of `nbits` bits `[n, m]` along `n`, a multiple of 32, into int32 `[n * nbits / 32, m]`."""
    values = values.unflatten(0, (-1, WORD))
    words = torch.zeros(len(values), nbits, values.shape[2], dtype=torch.int64, device=values.device)
    for i in range(WORD):
        word, shift = divmod(i * nbits, WORD)
        value = values[:, i].long() << shift
        words[:, word] |= value
        if shift + nbits > WORD:
            words[:, word + 1] |= value >> WORD
    words = words & 0xFFFFFFFF
    return torch.where(words < 2**31, words, words - 2**32).int().flatten(0, 1)


def _tensors(
    model: nn.Module, weights: Mapping[str, QuantizedWeight], v1: bool, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """What is written, one tensor at a time, so that only one shard exists twice; tied tensors come once."""
    seen: set[int] = set()
    done: set[str] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, key = name.rpartition(".")
        if owner in weights and key != "bias":
            if owner not in done:
                done.add(owner)
                for part, packed in layer_tensors(weights[owner], v1).items():
                    yield f"{owner}.{part}", packed
        elif id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, _sixteen_bit(name, tensor.detach(), dtype)


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


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
