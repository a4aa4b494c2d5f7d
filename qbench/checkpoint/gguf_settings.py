"""What a GGUF file says beside its tensors: the model's sizes under llama.cpp's names, and its tokenizer."""

from __future__ import annotations

import json
import logging
from typing import Any

import torch

from qbench.checkpoint import gguf_architectures as architectures
from qbench.model.gguf_names import ARCHITECTURES

log = logging.getLogger(__name__)

WRITTEN = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", *architectures.SETTINGS)  # known here
ROTATIONS = ("default", "linear", "llama3")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {WORDS % "{1,3}": "llama-bpe", WORDS % "": "qwen2"}  # a regular expression of words -> llama.cpp's name for it
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


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
    add_tokenizer(writer, tokenizer, config)


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


def add_tokenizer(writer: Any, tokenizer: Any, config: Any) -> None:
    """Adds a tokenizer of byte pairs; of another one only a warning: the file is then read by us and serves no text."""
    described = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    words = words_of(described)
    if words is None:
        log.warning("the GGUF file has no tokenizer: llama.cpp has no name for how this one splits a text into words")
        writer.add_tokenizer_model("no_vocab")
        return
    added = {int(entry["id"]): entry for entry in described.get("added_tokens", [])}
    by_id = {int(index): token for token, index in described["model"]["vocab"].items()}
    by_id |= {index: entry["content"] for index, entry in added.items()}
    tokens, kinds = [], []
    for index in range(config.vocab_size):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        special = CONTROL if added.get(index, {}).get("special") else USER_DEFINED
        kinds.append(special if index in added else NORMAL if index in by_id else UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    writer.add_token_merges(pairs)
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(int(number))
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def words_of(described: Any) -> str | None:
    """llama.cpp's name for how a tokenizer of byte pairs, as `tokenizers` describes it, cuts words; None for others."""
    if described.get("model", {}).get("type") != "BPE" or described["model"].get("byte_fallback"):
        return None
    steps = described.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return SPLITS.get(steps[0].get("pattern", {}).get("Regex"))
    return None
