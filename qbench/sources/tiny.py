"""Seeded random two-layer models with a byte tokenizer: everything the harness does, in a second, for tests."""

from __future__ import annotations

from typing import Any

import torch

from qbench.errors import RequestError, unknown

VERSION = 1
ARCHITECTURES = ("dense", "moe")


def build(architecture: str, seed: int) -> tuple[Any, Any]:
    """A random Qwen3 (`dense`) or Qwen3-MoE with 4 fused experts (`moe`), fp32, and its tokenizer.

    Raises RequestError for another architecture, or a seed that no generator takes.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    if architecture not in ARCHITECTURES:
        raise unknown("model.architecture", architecture, ARCHITECTURES)
    if not -(2**63) <= seed < 2**64:
        raise RequestError(f"model.seed must fit into 64 bits, got {seed}")
    shape = dict(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
        initializer_range=0.1,  # larger than usual, so that the logits are far from uniform
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "dense":
            model = Qwen3ForCausalLM(Qwen3Config(**shape))
        else:
            experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, decoder_sparse_step=1)
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts))
    return model, byte_tokenizer()


def byte_tokenizer() -> Any:
    """One token per byte of UTF-8, plus `<s>` (256) and `</s>` (257); adds none of them by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
