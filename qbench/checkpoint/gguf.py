"""GGUF files that llama.cpp serves, of a model whose linears are blocks of its types, or can be said as such exactly.

`quantizer=gguf/TYPE` is written as it is. Integers of 4 or 8 bits without a zero point, with groups of a multiple of
32, are Q4_0 and Q8_0 to the bit: code and scale are the same numbers. Anything else is refused: a zero point would be
rounded to an fp16 minimum (Q4_1), and no type has an input scale, as SINQ and AWQ store it. Embedding, head, norms and
biases keep their precision. The folder gets model.gguf and, for us, configuration and tokenizer as transformers writes
them, and origin.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qbench.checkpoint import gguf_settings, settings
from qbench.checkpoint import packed as checkpoint
from qbench.checkpoint.served import example, integer_refusal, write_json
from qbench.errors import RequestError
from qbench.format.format import Format
from qbench.format.gguf import GGUFBlocks, of_blocks
from qbench.format.weight import QuantizedWeight
from qbench.layers.linear import PackedWeight, QuantLinear, in_packed_format
from qbench.model.gguf_names import ARCHITECTURES, INTERLEAVED, NORMS_PLUS_ONE, in_the_model, tensor_names
from qbench.model.linears import find_linears, matrix
from qbench.quant.quantizer import Quantizer

FILE, ORIGIN = "model.gguf", "origin.json"
KIND = "qbench-gguf"
BLOCK = 32
EXACT = {4: "Q4_0", 8: "Q8_0"}
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INSTEAD = "use quantizer=gguf/TYPE, quantizer=rtn quantizer.symmetric=true, or export.format=packed"


@dataclass(frozen=True)
class GGUF:
    """export.format=gguf."""

    def refuse(self, quantizer: Quantizer) -> str | None:
        """Seen from a small weight that it quantizes here."""
        quantized = example(quantizer)
        return None if quantized is None else format_refusal(quantized)

    def refuse_model(self, model: Any, quantizer: Quantizer) -> str | None:
        if reason := gguf_settings.refusal(model):
            return reason
        group_size = getattr(quantizer, "group_size", None)
        if hasattr(quantizer, "type") or group_size is None:
            return None
        for name, layer in find_linears(model).layers.items():
            columns = matrix(layer).shape[1]
            if columns % BLOCK or columns % quantizer.columns(matrix(layer)):
                return f"layer {name} has {columns} input channels, which groups of {group_size} and 32 do not divide"
        return None

    def check_target(self, folder: Path, run_id: str | None = None) -> None:
        checkpoint.check_target(folder, run_id, _origin, "GGUF file of ours")

    def save(self, model: Any, tokenizer: Any, folder: Path, origin: Mapping[str, Any]) -> None:
        self.check_target(folder)
        if reason := gguf_settings.refusal(model):
            raise RequestError(reason)
        with in_packed_format(model), checkpoint.new_folder(folder) as partial:
            settings.write(model, tokenizer, partial)
            write(model, tokenizer, partial / FILE)
            write_json(partial / ORIGIN, {"kind": KIND, "origin": dict(origin)})


def format_refusal(weight: Format) -> str | None:
    """Why no weight that is stored like this one can be expressed; None if it can."""
    if isinstance(weight, GGUFBlocks):
        return None
    if not isinstance(weight, QuantizedWeight):
        return f"it is stored as {weight.name}, which is no type of GGUF; {INSTEAD}"
    if reason := integer_refusal(weight, "GGUF"):
        return reason
    if weight.zero is not None:
        return f"it stores zero points, which GGUF's minima in fp16 would round; {INSTEAD}"
    if weight.permutation is not None:
        return f"its input channels are in another order (act-order), which GGUF has no place for; {INSTEAD}"
    if weight.nbits not in EXACT or weight.group_size % BLOCK:
        return (
            f"codes of {weight.nbits} bits in groups of {weight.group_size} are no type of GGUF, which has 4 and 8 "
            f"bits in groups of a multiple of {BLOCK}; {INSTEAD}"
        )
    return None


def as_blocks(weight: Format) -> GGUFBlocks:
    """The same weights as blocks, to the bit; raises RequestError where that cannot be."""
    if reason := format_refusal(weight):
        raise RequestError(reason)
    if isinstance(weight, GGUFBlocks):
        return weight
    assert isinstance(weight, QuantizedWeight)
    if weight.shape[-1] % BLOCK:
        raise RequestError(f"{weight.shape[-1]} input channels are no multiple of {BLOCK}; {INSTEAD}")
    codes = weight.codes().unflatten(-1, (-1, BLOCK))
    groups = torch.arange(0, weight.shape[-1], BLOCK, device=codes.device) // weight.group_size
    scale = weight.scale.stored[..., groups].contiguous().unsqueeze(-1).view(torch.uint8)
    # the first 16 weights of a block in the low bits of its bytes; or int8, as two's complement has code - 128
    held = codes[..., :16] | (codes[..., 16:] << 4) if weight.nbits == 4 else codes ^ 128
    return of_blocks(EXACT[weight.nbits], torch.cat([scale, held], -1).flatten(-2), weight.method)


def write(model: Any, tokenizer: Any, path: Path) -> None:
    """Writes the file; raises RequestError for a weight that cannot be expressed."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURES[model.config.model_type])
    gguf_settings.add(writer, model, tokenizer)
    entries = list(_entries(model))
    for name, type, weight in entries:
        rows = _rows(weight)
        shape = (*rows.shape[:-1], rows.shape[-1] * rows.element_size())
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), rows.nbytes, GGMLQuantizationType[type])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, weight in entries:
            writer.write_tensor_data(_rows(weight).contiguous().cpu().view(torch.uint8).numpy())
    finally:
        writer.close()


def _rows(weight: Format | Tensor) -> Tensor:
    return weight if isinstance(weight, Tensor) else as_blocks(weight).blocks


def _entries(model: Any) -> Iterator[tuple[str, str, Format | Tensor]]:
    """Name, type and content of every tensor, in the order of the model."""
    config, seen = model.config, set()
    arch = ARCHITECTURES[config.model_type]
    names = tensor_names(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def named(name: str) -> str:
        if (found := names.get_name(name, (".weight", ".bias"))) is None:
            raise RequestError(f"llama.cpp has no name for {name}; {INSTEAD}")
        return found

    def ordered(owner: str, weight: Any) -> Any:
        own = heads.get(owner.rpartition(".")[2])
        if arch not in INTERLEAVED or own is None:
            return weight
        order = in_the_model(weight.shape[0], own).to(weight.device)
        return weight[order] if isinstance(weight, Tensor) else as_blocks(weight).rows(order)

    for name, factors in gguf_settings.rotary_factors(model).items():
        yield name, "F32", factors
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            weight = as_blocks(module.quantized)
            yield named(f"{path}.weight"), weight.type, ordered(path, weight)
            if module.bias is not None:
                yield named(f"{path}.bias"), "F32", ordered(path, module.bias.float())
        elif isinstance(module, PackedWeight):  # a stack of experts: model.layers.0.mlp.experts.down_proj
            weight = as_blocks(module.quantized)
            block, kind = path.split(".")[2], path.rpartition(".")[2].removesuffix("_proj")
            yield f"blk.{block}.ffn_{kind}_exps.weight", weight.type, weight
        else:
            for key, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:  # a tied head is the embedding, in llama.cpp as well
                    seen.add(id(parameter))
                    value = parameter.detach()
                    value = value.float() if value.dim() == 1 else value  # as llama.cpp asks for
                    if arch in NORMS_PLUS_ONE and path.endswith("norm"):
                        value = value + 1
                    yield named(f"{path}.{key}"), FLOATS[value.dtype], ordered(path, value)


def _origin(folder: Path) -> Mapping[str, Any]:
    """What `save` was told about the file at `folder`; raises RequestError when that is not one of ours."""
    try:
        said = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        if said["kind"] == KIND and isinstance(said["origin"], dict):
            return said["origin"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RequestError(f"{folder} holds no GGUF file of ours")
