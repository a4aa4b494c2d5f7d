"""What is timed of a model, over transformers' StaticCache, so that each step has the same shape: Prefill and Decoder.

Both are a `step`, which gives the newest logits `[batch, 1, vocabulary]`, and a `rewind`, which puts the cache back to
what it was, in place: a step that was captured as a CUDA graph goes on from there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Prefill:
    """One forward pass over `prompt` `[batch, tokens]` into an empty cache, with the last position's logits."""

    name = "prefill"
    attends_to_past = False
    uncapturable: str | None = None

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self.model, self.prompt, self.cache = model, prompt, _empty_cache(model, prompt.shape[1])
        self.tokens = prompt.numel()  # of one step
        self.rewinds_freely = True

    def step(self) -> Tensor:
        return self.model(input_ids=self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits

    def rewind(self) -> None:
        self.cache.reset()


class Decoder:
    """Greedy decoding over a cache that holds `prompt` `[batch, context]`; `token` `[batch, 1]` is the newest."""

    name = "decode"
    attends_to_past = True

    def __init__(self, model: Any, prompt: Tensor, steps: int) -> None:
        from transformers.cache_utils import StaticLayer

        self.model, self.prompt = model, prompt
        self.cache = static_cache(model, prompt.shape[1] + steps)
        self.token = torch.empty_like(prompt[:, :1])
        self.tokens = len(prompt)  # of one step
        # layers of a sliding window overwrite what they hold, and keep their length where no graph can change it
        self.rewinds_freely = all(type(layer) is StaticLayer for layer in self.cache.layers)
        sliding = any(getattr(layer, "is_sliding", False) for layer in self.cache.layers)
        because = "the model has sliding-window layers" if sliding else "its cache holds more than keys and values"
        self.uncapturable = None if self.rewinds_freely else because
        self._fill()
        self.first = self.token.clone()

    def step(self) -> Tensor:
        """Feeds the newest token and replaces it by the most probable next one."""
        logits = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits[:, -1:]
        self.token.copy_(logits.argmax(-1))
        return logits

    def rewind(self) -> None:
        if not self.rewinds_freely:
            self.cache.reset()
            self._fill()
            return
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt.shape[1])
        self.token.copy_(self.first)

    def _fill(self) -> None:
        output = self.model(input_ids=self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(output.logits[:, -1:].argmax(-1))


def static_cache(model: Any, tokens: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=tokens)


def _empty_cache(model: Any, tokens: int) -> Any:
    """One that is filled from its start: transformers asks a static cache for its length, which only the GPU knows.

    Not knowing that it is 0, a captured prefill would attend through a mask, and slower than an eager one.
    """
    from transformers import StaticCache

    class Empty(StaticCache):
        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 0

    return Empty(config=model.config, max_cache_len=tokens)
