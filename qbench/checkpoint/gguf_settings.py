"""What a GGUF file says beside its tensors: the model's sizes under llama.cpp's names, and its tokenizer."""

from __future__ import annotations

from typing import Any

import torch

from qbench.checkpoint import gguf_architectures as architectures
from qbench.checkpoint import gguf_tokenizer
from qbench.model.gguf_names import ARCHITECTURES

WRITTEN = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", *architectures.SETTINGS)  # known here
ROTATIONS = ("default", "linear", "llama3")


def refusal(model: Any) -> str | None:
    """Why llama.cpp's settings do not describe this model; None if they do."""
    config = model.config
    if config.model_type not in WRITTEN:
        return f"a {config.model_type} model is not written as GGUF here; known are {', '.join(WRITTEN)}"
    rotations = architectures.ROTATIONS.get(config.model_type, ROTATIONS)
    if (kind := architectures.rotation(config).get("rope_type", "default")) not in rotations:
        return f"its rotary positions are of the kind {kind}; written are {', '.join(rotations)}"
    if config.model_type in architectures.REFUSALS:
        if reason := architectures.REFUSALS[config.model_type](config):
            return reason
    elif architectures.windowed(config):
        return "its attention sees a sliding window, which llama.cpp's models of that architecture do not"
    if config.model_type == "qwen3_moe" and not config.norm_topk_prob:
        return (
            "its router does not scale the chosen experts' weights to a sum of 1 (norm_topk_prob), as llama.cpp's does"
        )
    if getattr(config, "mlp_bias", False):
        return "its MLP has biases, which llama.cpp's models of that architecture do not"
    return None


def add(writer: Any, model: Any, tokenizer: Any) -> None:
    """Adds all settings to a GGUFWriter, and the rotary factors where the model has any."""
    config = model.config
    arch, rotation = ARCHITECTURES[config.model_type], architectures.rotation(config)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes: dict[str, architectures.Setting] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "rope.dimension_count": head_size,
        "vocab_size": config.vocab_size,
    }
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if experts:
        sizes |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
        if width := getattr(config, "moe_intermediate_size", None):
            sizes["expert_feed_forward_length"] = width
    sizes["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    sizes["rope.freq_base"] = float(rotation.get("rope_theta", 10000.0))
    if rotation.get("rope_type") == "linear":
        sizes |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rotation["factor"])}
    if config.model_type in architectures.SETTINGS:
        sizes |= architectures.SETTINGS[config.model_type](config)
    ways = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in sizes.items():
        ways[type(value)](f"{arch}.{key}", value)
    writer.add_quantization_version(2)
    writer.add_quantized_by("qbench")
    gguf_tokenizer.add(writer, tokenizer, config.vocab_size)


def rotary_factors(model: Any) -> dict[str, torch.Tensor]:
    """By how much a model slows each frequency down, fp32 `[head size / 2]`, by the names of such tensors.

    Llama 3 does it alike for all texts, Phi-3 in one way for short texts and in another for long ones.
    """
    rotation = architectures.rotation(model.config)
    if rotation.get("rope_type") == "longrope":
        kinds = ("long", "short")
        return {f"rope_factors_{kind}.weight": torch.tensor(rotation[f"{kind}_factor"]) for kind in kinds}
    if rotation.get("rope_type") != "llama3":
        return {}
    scaled = model.get_decoder().rotary_emb.inv_freq.float().cpu()
    exponent = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    return {"rope_freqs.weight": 1 / (rotation["rope_theta"] ** exponent) / scaled}
