"""The shapes of plain dense decoders by arithmetic on their config.json, equal to those of the model that it describes.

Such a model is an embedding, blocks of q, k, v, o and gate, up, down between RMSNorms, and a head. Anything that is not
just that, or a setting left to a default of transformers', is None here, and the model itself is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qbench.model.linears import Linears

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # as `model_type` says
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Skeleton:
    """What a model's configuration says of its weights."""

    parameters: int  # tied ones once
    shapes: Counter[tuple[int, int]]  # how often a quantizable weight `[out, in]` occurs
    found: Linears
    largest_block: int  # weights
    outside: int  # weights beside the blocks: embedding, head, norms
    hidden: int  # channels
    vocabulary: int
    experts_per_token: int = 0  # of a mixture


def sizes(config: Mapping[str, Any]) -> Skeleton | None:
    """Of the model that `config`, a config.json, describes; None for one that is not known to be plain."""
    kind, tied = config.get("model_type"), config.get("tie_word_embeddings")
    numbers = [config.get(key) for key in (*NEEDED, "vocab_size")]
    if kind not in FAMILIES or config.get("auto_map") or config.get("quantization_config"):
        return None
    if not isinstance(tied, bool) or not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    hidden, inner, layers, heads, kv_heads, vocabulary = numbers
    head = config.get("head_dim") or (None if kind == "qwen3" else hidden // heads)
    if head is None:
        return None
    queries, keys = heads * head, kv_heads * head
    attention = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    vectors = 2 * hidden + (2 * head if kind == "qwen3" else 0)  # the gains of the norms, and biases
    if kind == "qwen2":
        vectors += queries + 2 * keys
    elif kind != "mistral" and config.get("attention_bias"):
        vectors += queries + 2 * keys + hidden
    if kind == "llama" and config.get("mlp_bias"):
        vectors += 2 * inner + hidden
    linears = {f"self_attn.{name}": shape for name, shape in attention.items()}
    linears |= {f"mlp.{name}": shape for name, shape in mlp.items()}
    made = {name: nn.Linear(shape[1], shape[0], bias=False, device="meta") for name, shape in linears.items()}
    found = {f"model.layers.{block}.{name}": layer for block in range(layers) for name, layer in made.items()}
    shapes = Counter({shape: layers * count for shape, count in Counter(linears.values()).items()})
    block = sum(rows * columns for rows, columns in linears.values()) + vectors
    outside = vocabulary * hidden * (1 if tied else 2) + hidden
    return Skeleton(layers * block + outside, shapes, Linears(found, {}, []), block, outside, hidden, vocabulary)
