"""What the checkpoints that other programs load have in common: a folder as transformers reads it, and its integers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbench.checkpoint import packed as checkpoint
from qbench.checkpoint import settings
from qbench.checkpoint.expert_names import expert_names
from qbench.errors import RequestError
from qbench.format.format import Format
from qbench.format.weight import QuantizedWeight
from qbench.layers.experts import QuantExperts
from qbench.layers.linear import QuantLinear, packed_weights
from qbench.quant.quantizer import InputStatistics, Quantizer

LONGEST_BLOCK = 256  # input channels; some formats refuse a shorter row
INSTEAD = "export.format=packed keeps everything"


def example(quantizer: Quantizer, columns: int | None = None) -> Format | None:
    """What the quantizer makes of a small weight, of whole groups without `columns`; None where it refuses that one."""
    group_size: int = getattr(quantizer, "group_size", -1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, columns or (LONGEST_BLOCK if group_size == -1 else group_size), generator=generator)
    inputs = torch.randn(2 * weight.shape[1], weight.shape[1], generator=generator)
    stats = InputStatistics(len(inputs), inputs.abs().mean(0), inputs, inputs.T @ inputs, inputs.square().mean(0))
    try:
        return quantizer.quantize([weight], stats if quantizer.needs else None)[0]
    except (ValueError, TypeError):  # said better where it meets the model, as a file's weights must
        return None


def integer_refusal(weight: QuantizedWeight, whose: str) -> str | None:
    """Why no weight stored like this one is `(codes - zero) * scale` alone, as `whose` format has it; None if it is."""
    for part, what in (
        (weight.input_scale, "it stores an input scale t beside the group scales"),
        (weight.rotation, "it is quantized in a rotated basis"),
        (weight.codebook, "its codes index a codebook instead of being evenly spaced"),
    ):
        if part is not None:
            return f"{what}, which {whose} format has no place for; {INSTEAD}"
    if any(aux is not None and aux.step is not None for aux in (weight.scale, weight.zero)):
        return f"its scales are stored in int8 and {whose} in fp16; use quantizer.aux_dtype=fp16"
    if weight.zero is not None and not torch.equal(weight.zero.stored, weight.zero.stored.round()):
        return f"its zero points are not integers, which {whose} must be; {INSTEAD}"
    return None


def check_zeros(weights: Mapping[str, Format], whose: str) -> None:
    """Raises RequestError where a zero point lies outside of the codes: ours are not clamped, served formats' are."""
    outside: dict[str, int] = {}
    groups = 0
    for name, weight in weights.items():
        if isinstance(weight, QuantizedWeight) and weight.zero is not None:
            zero = weight.zero.dense()
            groups += zero.numel()
            if count := int(((zero < 0) | (zero > 2**weight.nbits - 1)).sum()):
                outside[name] = count
    if outside:
        raise RequestError(
            f"{sum(outside.values())} of {groups} groups, the first in layer {next(iter(outside))}, have a zero point "
            f"outside of the codes, since their weights all lie on one side of zero; {whose} format has no room "
            f"for that: use quantizer.symmetric=true or export.format=packed"
        )


def quantized_matrices(model: nn.Module, whose: str, experts: bool = False) -> dict[str, Format]:
    """The model's quantized weights `[out, in]` by the names of their modules in a checkpoint; experts' one by one.

    Raises RequestError where there is none, and for stacks of experts, without `experts` or where they have no names.
    """
    weights: dict[str, Format] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            weights[name] = module.quantized
        elif isinstance(module, QuantExperts):
            names = expert_names(model, name) if experts else None
            if names is None:
                raise RequestError(f"{name}: {whose} format has no place for these stacks of experts; {INSTEAD}")
            for prefix, stack in module.packed().items():
                for index in range(stack.shape[0]):
                    weights[names[prefix.rstrip(".")].replace("*", str(index))] = stack.select(index)
    if not weights:
        raise RequestError("the model has no quantized layer; save_pretrained is the way to save it")
    return weights


def tensors(
    model: nn.Module,
    weights: Mapping[str, Format],
    parts: Callable[[Format], Mapping[str, Tensor]],
    other: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> Iterator[tuple[str, Tensor]]:
    """What is written, one tensor at a time, so that only one shard exists twice; tied tensors come once.

    `parts` are those of a quantized weight, `other` is what is written for any other tensor.
    """
    seen: set[int] = set()
    packed = packed_weights(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, key = name.rpartition(".")
        if id(tensor) not in seen and (owner not in packed or key == "bias"):
            seen.add(id(tensor))
            yield name, other(name, tensor.detach())
    for name, weight in weights.items():
        for part, tensor in parts(weight).items():
            yield f"{name}.{part}", tensor


def write(
    model: Any,
    tokenizer: Any,
    folder: Path,
    content: Iterator[tuple[str, Tensor]],
    config: Mapping[str, Any],
    max_shard_bytes: int,
) -> None:
    """Fills `folder` with the settings, a config.json that says `config` too, and shards under transformers' names."""
    settings.write(model, tokenizer, folder)
    path = folder / "config.json"
    said = json.loads(path.read_text(encoding="utf-8")) | dict(config)
    said["architectures"] = said.get("architectures") or [type(model).__name__]
    write_json(path, said)
    shards = checkpoint.write_shards(content, folder, max_shard_bytes)
    if len(shards) == 1:
        (folder / next(iter(shards))).rename(folder / "model.safetensors")
    else:
        files = {name: file for file, sizes in shards.items() for name in sizes}
        total = sum(sum(sizes.values()) for sizes in shards.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
