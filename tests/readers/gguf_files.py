"""GGUF files for tests, converted as llama.cpp's own script does it, with gguf's writer and nothing of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants

from tests.passes.architectures import COMMON, build

ARCHITECTURES = {
    "Llama": "llama",
    "Mixtral": "llama",
    "Qwen2": "qwen2",
    "Qwen2Moe": "qwen2moe",
    "Qwen3": "qwen3",
    "Qwen3Moe": "qwen3moe",
    "Gemma": "gemma",
    "Gemma2": "gemma2",
    "Gemma3Text": "gemma3",
    "Phi3": "phi3",
    "Olmo2": "olmo2",
    "DeepseekV2": "deepseek2",
    "DeepseekV3": "deepseek2",
    "GptOss": "gpt-oss",
}
MORE = {
    "Gemma": dict(head_dim=16),
    "Qwen2Moe": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64
    ),
}
Tensors = dict[str, np.ndarray]


def made(name: str) -> Any:
    """A small model of one of ARCHITECTURES."""
    if name not in MORE:
        return build(name)
    config = getattr(transformers, f"{name}Config")(**(COMMON | MORE[name]))
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def converted(model: Any, arch: str, latent: bool = False) -> Tensors:
    """The model's tensors, fp32, as llama.cpp's conversion script writes them; with `latent`, kv_b in two parts."""
    config = model.config
    names = get_tensor_name_map({v: k for k, v in MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers)
    found: Tensors = {}
    for name, tensor in model.state_dict().items():
        value, block = tensor.float().numpy(), name.split(".")[2] if ".layers." in name else ""
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and "q_proj" in name:
            value = permute(value, config.num_attention_heads, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            value = permute(value, config.num_attention_heads, config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if ".experts." in name:
            found |= experts(name.rpartition(".")[2], value, f"blk.{block}.ffn", arch)
        elif latent and name.endswith("kv_b_proj.weight"):
            both = value.reshape(config.num_key_value_heads, config.v_head_dim + config.qk_nope_head_dim, -1)
            key, rest = both[:, : config.qk_nope_head_dim], both[:, config.qk_nope_head_dim :]
            found |= {f"blk.{block}.attn_k_b.weight": key.swapaxes(1, 2), f"blk.{block}.attn_v_b.weight": rest}
        else:
            known = name.replace("e_score_correction_bias", "e_score_correction.bias")
            key = names.get_name(known, (".weight", ".bias"))
            assert key, name
            value = value[0] if name.endswith("shared_expert_gate.weight") else value
            found[key + ".weight" * name.endswith("sinks")] = value
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def permute(weights: np.ndarray, heads: int, of_keys: int) -> np.ndarray:
    """LlamaModel.permute of the conversion script."""
    heads = of_keys if heads != of_keys else heads
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def experts(key: str, value: np.ndarray, prefix: str, arch: str) -> Tensors:
    end = "bias" if key.endswith("_bias") else "weight"
    if arch == "gpt-oss" and end == "weight":
        value = value.swapaxes(1, 2)
    if key.startswith("down"):
        return {f"{prefix}_down_exps.{end}": value}
    half = value.shape[1] // 2
    gate, up = (value[:, ::2], value[:, 1::2]) if arch == "gpt-oss" else (value[:, :half], value[:, half:])
    return {f"{prefix}_gate_exps.{end}": gate, f"{prefix}_up_exps.{end}": up}


def settings_of(config: Any) -> dict[str, int]:
    return {
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }


def write(
    path: Path, arch: str, tensors: Tensors, settings: dict[str, int], types: dict[str, str] | None = None, **more: Any
) -> Path:
    """Writes fp32 tensors, those in `types` encoded by gguf's own encoder (Q4_0, Q8_0 and the like), or libgguf's."""
    writer = GGUFWriter(path, arch, **more)
    for key, value in settings.items():
        writer.add_uint32(f"{arch}.{key}", value)
    for name, value in tensors.items():
        kind = GGMLQuantizationType[(types or {}).get(name, "F32")]
        writer.add_tensor(name, encoded(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def encoded(value: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    try:
        return quants.quantize(value, kind)
    except NotImplementedError:
        import libgguf

        return libgguf.quantize_rows(value, libgguf.GGMLQuantizationType[kind.name], None)


def meta(model: Any) -> Any:
    """The model's skeleton."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(model.config)
