"""What single architectures say in a GGUF file beyond their sizes, and what llama.cpp takes for granted of them.

Settings are under llama.cpp's names. llama.cpp has constants where transformers has settings (which of Gemma's layers
see a window, what Gemma divides its scores by, how DeepSeek's router chooses): a model with others is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Setting = bool | int | float | str
GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}  # blocks of the one whose scores are scaled by hidden size over heads
PATTERN = {"gemma2": 2, "gemma3_text": 6}  # the last of so many layers sees everything, the others a window
LOCAL_THETA = 10000.0  # of Gemma 3's layers with a window
NO_QUERY_RANK = (26, 27)  # blocks of the DeepSeek-V2 whose queries have no low rank
SOFTMAX = 1  # of a router's gate


def rotation(config: Any) -> dict[str, Any]:
    """The rotary settings; of a model with two kinds of layers those of the layers that see everything."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    return dict(found.get("full_attention") or found)


def windowed(config: Any) -> bool:
    """Whether a layer sees less than the longest text that the model is made for."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    used = "sliding_attention" in layers if layers else bool(window)
    return used and (window or 0) < config.max_position_embeddings


def gemma_refusal(config: Any) -> str | None:
    kind, layers = config.model_type, config.num_hidden_layers
    if (activation := getattr(config, "hidden_activation", None) or config.hidden_act) != "gelu_pytorch_tanh":
        return f"its MLP has the activation {activation}, and llama.cpp's Gemma has gelu_pytorch_tanh"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention sees what follows (use_bidirectional_attention), which llama.cpp's Gemma does not"
    if kind not in PATTERN:
        return None
    size = config.hidden_size / config.num_attention_heads if layers == GEMMA_27B[kind] else config.head_dim
    if config.query_pre_attn_scalar != size:
        return f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp divides by the root of {size:g}"
    expected = ["full_attention" if (i + 1) % PATTERN[kind] == 0 else "sliding_attention" for i in range(layers)]
    if list(config.layer_types) != expected:
        return f"its layers do not take turns as llama.cpp's do, where one of {PATTERN[kind]} sees everything"
    caps = config.attn_logit_softcapping, config.final_logit_softcapping
    if kind == "gemma2" and None in caps:
        return "it caps no scores or no logits, and llama.cpp's Gemma 2 caps both"
    if kind == "gemma3_text":
        if any(caps):
            return "it caps scores or logits, which llama.cpp's Gemma 3 does not"
        local = config.rope_parameters["sliding_attention"]
        if local.get("rope_type", "default") != "default" or local["rope_theta"] != LOCAL_THETA:
            return f"its layers with a window have other rotary positions than llama.cpp's, of base {LOCAL_THETA:g}"
    return None


def gemma_settings(config: Any) -> dict[str, Setting]:
    said: dict[str, Setting] = {}
    if config.model_type in PATTERN:
        said["attention.sliding_window"] = int(config.sliding_window)
    if config.model_type == "gemma2":
        said["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        said["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return said


def phi3_refusal(config: Any) -> str | None:
    if windowed(config):
        return "its attention sees a sliding window, which llama.cpp's Phi-3 does not"
    return None


def phi3_settings(config: Any) -> dict[str, Setting]:
    turned = rotation(config)
    size = config.hidden_size // config.num_attention_heads
    said: dict[str, Setting] = {"rope.dimension_count": int(size * turned.get("partial_rotary_factor", 1.0))}
    if turned.get("rope_type") == "longrope":
        short = turned.get("original_max_position_embeddings") or config.original_max_position_embeddings
        stretch = config.max_position_embeddings / short
        factor = turned.get("attention_factor")
        if factor is None:
            factor = math.sqrt(1 + math.log(stretch) / math.log(short)) if stretch > 1 else 1.0
        said |= {"rope.scaling.original_context_length": int(short), "rope.scaling.attn_factor": float(factor)}
    return said


def deepseek_refusal(config: Any) -> str | None:
    if config.topk_method != "greedy" and config.n_group > 1:
        return "its router chooses experts within groups of them, which llama.cpp's DeepSeek-V2 does not"
    if config.q_lora_rank is None and config.num_hidden_layers not in NO_QUERY_RANK:
        return "its queries have no low rank, which llama.cpp expects of DeepSeek-V2-Lite's 27 blocks alone"
    turned = rotation(config)
    if turned.get("rope_type") == "yarn" and turned.get("mscale") != turned.get("mscale_all_dim"):
        return "its rotary positions have an mscale that is not mscale_all_dim, which a GGUF file does not say"
    return None


def deepseek_settings(config: Any) -> dict[str, Setting]:
    turned = rotation(config)
    said: dict[str, Setting] = {
        "leading_dense_block_count": config.first_k_dense_replace,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": False,
        "expert_gating_func": SOFTMAX,
    }
    if config.q_lora_rank is not None:
        said["attention.q_lora_rank"] = config.q_lora_rank
    if turned.get("rope_type") == "yarn":
        said |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(turned["factor"]),
            "rope.scaling.original_context_length": int(turned["original_max_position_embeddings"]),
            "rope.scaling.yarn_log_multiplier": 0.1 * float(turned["mscale_all_dim"]),
        }
    return said


REFUSALS: Mapping[str, Callable[[Any], str | None]] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), gemma_refusal),
    "phi3": phi3_refusal,
    "deepseek_v2": deepseek_refusal,
}
SETTINGS: Mapping[str, Callable[[Any], dict[str, Setting]]] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), gemma_settings),
    "phi3": phi3_settings,
    "deepseek_v2": deepseek_settings,
}
ROTATIONS = {"phi3": ("default", "longrope"), "deepseek_v2": ("default", "yarn")}
