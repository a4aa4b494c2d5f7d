"""What llama.cpp calls a transformers model and its tensors, and the order in which it keeps the rows of q and k.

Its conversion pairs the rows of a head for its rotation: row 2i of a head is the model's row i, row 2i + 1 the one half
a head further on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# transformers' model_type -> general.architecture
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "granite": "granite",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
}
INTERLEAVED = ("llama", "granite", "smollm3")  # whose q and k are kept pair by pair
NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3")


def tensor_names(architecture: str, blocks: int) -> Any:
    """The package gguf's map from transformers' names: `.get_name(NAME, (".weight", ".bias"))`, None if unknown."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(kinds[architecture], blocks)


def in_a_file(rows: int, heads: int) -> Tensor:
    """Where each row of the model's q or k lies in a file, int64 `[rows]`: model = file[in_a_file]."""
    return torch.arange(rows).view(heads, -1, 2).mT.reshape(-1)


def in_the_model(rows: int, heads: int) -> Tensor:
    """Where each row of a file's q or k lies in the model: file = model[in_the_model]."""
    return in_a_file(rows, heads).argsort()
