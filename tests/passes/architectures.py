"""Small seeded random models of many architectures: three blocks, hidden size 64, sliding windows of 8 tokens."""

import torch
import transformers

COMMON = dict(
    vocab_size=258,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=256,
    eos_token_id=257,
    pad_token_id=None,
    initializer_range=0.1,
    experts_implementation="eager",  # the only one that runs in fp64
)
MIXTURE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
LATENT = dict(  # DeepSeek's attention; its first block has no experts
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    num_key_value_heads=4,
)
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

CHAINS = {
    "Llama": {},
    "Qwen2": dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "Qwen3": dict(head_dim=16, tie_word_embeddings=True),
    "Gemma2": dict(
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=5.0,
        attn_implementation="eager",
    ),
    "Gemma3Text": dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=16, layer_types=SLIDING),
    "Phi3": {},
    "Olmo2": {},
    "GPTNeoX": dict(rotary_pct=0.5),
    "Qwen3Moe": MIXTURE | dict(output_router_logits=True),
    "Mixtral": dict(num_local_experts=4),
    "DeepseekV2": LATENT | dict(q_lora_rank=None),
    "DeepseekV3": LATENT | dict(q_lora_rank=16),
    "GPT2": dict(n_embd=64, n_head=4, n_layer=3, n_positions=512),
    "OPT": dict(ffn_dim=128, word_embed_proj_dim=32),
    "Falcon": dict(new_decoder_architecture=True, num_kv_heads=2),
    "Bloom": dict(n_layer=3, n_head=4),
    "Mpt": dict(d_model=64, n_heads=4, n_layers=3, max_seq_len=512),
    "Cohere": dict(logit_scale=0.25),
    "GptOss": dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "Mamba2": dict(num_heads=8, head_dim=16, n_groups=2, state_size=16, chunk_size=8),
    "Jamba": dict(
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        pad_token_id=0,
        mamba_d_state=8,
    ),
}
RESIDENT = {
    "Gemma3nText": dict(
        head_dim=16,
        vocab_size_per_layer_input=258,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=1,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0, 0.0],
    ),
    "Gemma4Text": dict(
        head_dim=16,
        vocab_size_per_layer_input=258,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        sliding_window=8,
        layer_types=SLIDING[1:] + SLIDING[1:2],
    ),
    "Zamba2": dict(
        num_hidden_layers=6,
        hybrid_layer_ids=[2, 4],
        layers_block_type=["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
        num_mem_blocks=1,
        mamba_d_state=8,
        mamba_headdim=16,
        n_mamba_heads=8,
        mamba_ngroups=1,
        use_mem_rope=False,
        use_shared_attention_adapter=False,
        num_key_value_heads=4,
        kv_channels=16,
        attention_head_dim=32,
        chunk_size=8,
    ),
}


def config(name, **settings):
    given = COMMON | (CHAINS | RESIDENT).get(name, {}) | settings
    return getattr(transformers, f"{name}Config")(**given)


def build(name, **settings):
    """The architecture's causal language model in eval mode, fp32, from one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config(name, **settings)).eval().requires_grad_(False)
