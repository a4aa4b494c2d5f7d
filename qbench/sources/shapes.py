"""Shapes of published models, by name: enough of each configuration to make a random model of its size.

Vocabulary, widths, heads, experts and depth are those of the model's config.json on the Hub; what changes no shape,
such as rotary scaling, has transformers' defaults.
"""

from __future__ import annotations

from typing import Any

from qbench.errors import RequestError, unknown
from qbench.sources.tiny import BOS, EOS

QWEN3 = dict(vocab_size=151936, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=False)
QWEN3_MIXTURE = QWEN3 | dict(num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, num_key_value_heads=4)
DEEPSEEK_V2 = dict(
    vocab_size=102400,
    max_position_embeddings=163840,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    tie_word_embeddings=False,
)
# name: (transformers' configuration, its settings)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": (
        "LlamaConfig",
        dict(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
    ),
    "llama-3.1-8b": (
        "LlamaConfig",
        dict(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            tie_word_embeddings=False,
        ),
    ),
    "qwen3-0.6b": (
        "Qwen3Config",
        QWEN3
        | dict(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3-1.7b": (
        "Qwen3Config",
        QWEN3
        | dict(
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3-4b": (
        "Qwen3Config",
        QWEN3
        | dict(
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3-8b": (
        "Qwen3Config",
        QWEN3
        | dict(
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
    ),
    "qwen3-14b": (
        "Qwen3Config",
        QWEN3
        | dict(
            hidden_size=5120,
            intermediate_size=17408,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=8,
        ),
    ),
    "qwen3-32b": (
        "Qwen3Config",
        QWEN3
        | dict(
            hidden_size=5120,
            intermediate_size=25600,
            num_hidden_layers=64,
            num_attention_heads=64,
            num_key_value_heads=8,
        ),
    ),
    "phi-4": (
        "Phi3Config",
        dict(
            vocab_size=100352,
            hidden_size=5120,
            intermediate_size=17920,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=10,
            max_position_embeddings=16384,
            pad_token_id=None,
            tie_word_embeddings=False,
        ),
    ),
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        QWEN3_MIXTURE
        | dict(
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_attention_heads=32,
        ),
    ),
    "qwen3-235b-a22b": (
        "Qwen3MoeConfig",
        QWEN3_MIXTURE
        | dict(
            hidden_size=4096,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            num_hidden_layers=94,
            num_attention_heads=64,
        ),
    ),
    "mixtral-8x7b": (
        "MixtralConfig",
        dict(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=32768,
            tie_word_embeddings=False,
        ),
    ),
    "deepseek-v2-lite": (
        "DeepseekV2Config",
        DEEPSEEK_V2
        | dict(
            hidden_size=2048,
            intermediate_size=10944,
            moe_intermediate_size=1408,
            num_hidden_layers=27,
            num_attention_heads=16,
            num_key_value_heads=16,
            n_routed_experts=64,
            q_lora_rank=None,
            topk_method="greedy",
            routed_scaling_factor=1.0,
        ),
    ),
    "deepseek-v2.5": (
        "DeepseekV2Config",
        DEEPSEEK_V2
        | dict(
            hidden_size=5120,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            num_hidden_layers=60,
            num_attention_heads=128,
            num_key_value_heads=128,
            n_routed_experts=160,
            q_lora_rank=1536,
            topk_method="group_limited_greedy",
            n_group=8,
            topk_group=3,
            routed_scaling_factor=16.0,
        ),
    ),
}


def depth(name: str, layers: int | None = None) -> int:
    """How many blocks a model of the shape has: `layers`, or where that is None all of the published model's.

    Raises RequestError for a name that is not in SHAPES, and for more layers than the model has.
    """
    if name not in SHAPES:
        raise unknown("model.shape", name, SHAPES)
    whole = SHAPES[name][1]["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= whole:
        raise RequestError(
            f"model.layers={layers} must be between 1 and {whole}, the layers of {name}", key="model.layers"
        )
    return layers or whole


def configuration(name: str, layers: int | None = None) -> Any:
    """transformers' configuration of the shape, with its first `layers` blocks or all; raises as `depth` does.

    Its special tokens are those of tiny.byte_tokenizer, which all shapes have in the place of their own.
    """
    import transformers

    blocks = depth(name, layers)
    kind, settings = SHAPES[name]
    return getattr(transformers, kind)(
        **settings | {"num_hidden_layers": blocks, "bos_token_id": BOS, "eos_token_id": EOS}
    )
