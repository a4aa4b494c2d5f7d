"""Seeded random two-layer models with a byte tokenizer: everything the harness does, in a second, for tests."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from qbench.errors import unknown
from qbench.sources import pretrained
from qbench.sources.source import LoadedModel, check_seed

VERSION = 1
BOS, EOS = 256, 257  # of the byte tokenizer
ARCHITECTURES = ("dense", "moe")
NOTE = "seeded random weights: perplexities mean nothing"
SHAPE: dict[str, Any] = dict(
    vocab_size=258,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
    bos_token_id=BOS,
    eos_token_id=EOS,
    initializer_range=0.1,  # larger than usual, so that the logits are far from uniform
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Tiny:
    """A model of `build`; what it is worth is its structure, so that its numbers mean nothing."""

    original: ClassVar[bool] = True
    name: str = "tiny"
    architecture: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def named(self, given: Collection[str]) -> Tiny:
        return replace(self, name=f"{self.name}-seed{self.seed}") if "seed" in given and self.seed != 0 else self

    def pinned(self) -> Tiny:
        return self

    def fingerprint(self) -> str:
        return f"random:{VERSION}:{self.architecture}:seed{self.seed}"

    def made_by(self) -> None:
        return None

    def tokenizer(self, cache: Path) -> Any:
        return byte_tokenizer()

    def configuration(self) -> None:  # made with the model, in a moment
        return None

    def config_json(self) -> dict[str, Any] | None:
        return {"model_type": "qwen3", **SHAPE} if self.architecture == "dense" else None

    def skeleton(self) -> Any:
        return build(self.architecture, self.seed)[0]

    def load(
        self, dtype: torch.dtype, device: torch.device, cache: Path, offload: bool = False, identity: str | None = None
    ) -> LoadedModel:
        model, tokenizer = build(self.architecture, self.seed)
        for parameter in model.parameters():  # not .to(dtype), which would round the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
        model = pretrained.settled(model, device, offload)
        return LoadedModel(model, tokenizer, identity or self.fingerprint(), NOTE)


def build(architecture: str, seed: int) -> tuple[Any, Any]:
    """A random Qwen3 (`dense`) or Qwen3-MoE with 4 fused experts (`moe`), fp32, and its tokenizer.

    Raises RequestError for another architecture.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    if architecture not in ARCHITECTURES:
        raise unknown("model.architecture", architecture, ARCHITECTURES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "dense":
            model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
        else:
            experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, decoder_sparse_step=1)
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **experts))
    return model, byte_tokenizer()


def byte_tokenizer() -> Any:
    """One token per byte of UTF-8, plus `<s>` (256) and `</s>` (257); adds none of them by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)} | {"<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
