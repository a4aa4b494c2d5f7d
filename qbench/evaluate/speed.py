"""Prefill and decode speed of a causal language model, measured apart from quality, at fixed shapes.

Prefill: one forward pass over `[batch, prefill_tokens]` that fills the cache and gives the last position's logits.
Decode: `decode_tokens` greedy steps of `[batch, 1]` after a context of `context_tokens`. Both use transformers'
StaticCache, so every step has the same shape. On a GPU one decode step is captured as a CUDA graph and replayed, as
serving engines do: otherwise launching kernels from Python is what one would time. A model that cannot be captured
decodes eagerly, and the record says so. Mixtures always do, quantized or not, so that both are timed alike: the loop
over the experts that were chosen asks the GPU which those are.

The tokens are seeded random ones. Each number is the median of `repeats` runs after a warm-up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qbench.config import SpeedConfig
from qbench.errors import PointError, RequestError, unknown
from qbench.evaluate.energy import joules_per_token
from qbench.evaluate.memory import Peak
from qbench.layers.experts import QuantExperts, stacked_parameters
from qbench.record.speed import InferenceRecord, PhaseRecord, SpeedRecord, SpreadRecord

log = logging.getLogger(__name__)

NAMES = ("none", "default")
SIZES = ("batch_size", "prefill_tokens", "context_tokens", "decode_tokens", "repeats")


def check(config: SpeedConfig) -> None:
    """Raises RequestError for settings that cannot be measured."""
    if config.name not in NAMES:
        raise unknown("speed", config.name, NAMES)
    for key in SIZES:
        value = getattr(config, key)
        if config.name == "none" and value is not None:
            raise RequestError(f"speed.{key}={value}, but speed=none measures nothing; add speed=default")
        if config.name != "none" and (value is None or value < 1):
            raise RequestError(f"speed.{key} must be at least 1, got {value}")


def record(config: SpeedConfig, quantized: InferenceRecord, baseline: InferenceRecord | None) -> SpeedRecord:
    return SpeedRecord(**{key: getattr(config, key) for key in SIZES}, quantized=quantized, baseline=baseline)


@torch.inference_mode()
def measure(model: Any, config: SpeedConfig) -> InferenceRecord:
    """Both phases of one model; raises PointError when it is not made for so many tokens."""
    text = model.config.get_text_config(decoder=True)
    longest = max(config.prefill_tokens, config.context_tokens + config.decode_tokens)
    if longest > (limit := getattr(text, "max_position_embeddings", None) or longest):
        raise PointError(
            f"speed asks for {longest} tokens in a sequence, this model takes {limit}; lower speed.prefill_tokens or "
            "speed.context_tokens"
        )
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, max(config.prefill_tokens, config.context_tokens))
    tokens = torch.randint(text.vocab_size, shape, generator=generator).to(model.device)
    with torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext():  # a graph is captured there
        return InferenceRecord(
            prefill=_prefill(model, tokens[:, : config.prefill_tokens], config.repeats),
            decode=_decode(model, tokens[:, : config.context_tokens], config.decode_tokens, config.repeats),
        )


def _prefill(model: Any, prompt: Tensor, repeats: int) -> PhaseRecord:
    cache = static_cache(model, prompt.shape[1])
    peak = Peak(model.device)

    def work() -> int:
        model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return prompt.numel()

    def again() -> int:
        cache.reset()
        return work()

    spread = _time(work, cache.reset, repeats, model.device)
    return PhaseRecord(
        tokens_per_second=spread,
        method="eager",
        eager_because=None,
        peak_alloc_bytes=peak.alloc_bytes,
        peak_rss_bytes=peak.rss_bytes,
        joules_per_token=joules_per_token(again, model.device),
    )


def _decode(model: Any, prompt: Tensor, steps: int, repeats: int) -> PhaseRecord:
    decoder = Decoder(model, prompt, steps)
    peak = Peak(model.device)  # not before: filling the context is prefill
    step, refused = (decoder.step, None) if model.device.type != "cuda" else decoder.capture()

    def work() -> int:
        for _ in range(steps):
            step()
        return steps * len(prompt)

    def again() -> int:
        decoder.rewind()
        return work()

    spread = _time(work, decoder.rewind, repeats, model.device)
    return PhaseRecord(
        tokens_per_second=spread,
        method="eager" if step == decoder.step else "cuda graph",
        eager_because=refused,
        peak_alloc_bytes=peak.alloc_bytes,
        peak_rss_bytes=peak.rss_bytes,
        joules_per_token=joules_per_token(again, model.device) if decoder.rewinds_freely else None,
    )


class Decoder:
    """Greedy decoding over a StaticCache that holds `prompt` `[batch, context]`; `token` `[batch, 1]` is the newest."""

    def __init__(self, model: Any, prompt: Tensor, steps: int) -> None:
        from transformers.cache_utils import StaticLayer

        self.model, self.prompt = model, prompt
        self.cache = static_cache(model, prompt.shape[1] + steps)
        self.token = torch.empty_like(prompt[:, :1])
        # layers of a sliding window overwrite what they hold, and keep their length where no graph can change it
        self.rewinds_freely = all(type(layer) is StaticLayer for layer in self.cache.layers)
        self._fill()
        self.first = self.token.clone()

    def step(self) -> None:
        """Feeds the newest token and replaces it by the most probable next one."""
        logits = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits
        self.token.copy_(logits[:, -1:].argmax(-1))

    def rewind(self) -> None:
        """Back to where the prompt ends, in place: a captured step goes on from there."""
        if not self.rewinds_freely:
            self.cache.reset()
            self._fill()
            return
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt.shape[1])
        self.token.copy_(self.first)

    def capture(self) -> tuple[Callable[[], None], str | None]:
        """`step` as a CUDA graph; or `step` itself, and why."""
        if not self.rewinds_freely:
            return self.step, "the model has sliding-window layers"
        if any(isinstance(module, QuantExperts) or stacked_parameters(module) for module in self.model.modules()):
            return self.step, "the model is a mixture of experts"
        try:
            aside = torch.cuda.Stream(self.model.device)  # libraries allocate and kernels are tuned before a capture
            aside.wait_stream(torch.cuda.current_stream(self.model.device))
            with torch.cuda.stream(aside):
                for _ in range(2):
                    self.rewind()
                    self.step()
            torch.cuda.current_stream(self.model.device).wait_stream(aside)
            self.rewind()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            log.warning("decoding is timed without a CUDA graph, which counts the launches as well: %s", reason)
            torch.cuda.synchronize(self.model.device)
            self.rewind()
            return self.step, reason
        return graph.replay, None

    def _fill(self) -> None:
        output = self.model(input_ids=self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(output.logits[:, -1:].argmax(-1))


def static_cache(model: Any, tokens: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=tokens)


def _time(work: Callable[[], int], prepare: Callable[[], None], repeats: int, device: torch.device) -> SpreadRecord:
    """Tokens per second of `work`, which returns how many it made, each time after `prepare`, which is not timed."""
    rates = []
    for _ in range(repeats + 1):
        prepare()
        _wait(device)
        started = time.perf_counter()
        tokens = work()
        _wait(device)
        rates.append(tokens / (time.perf_counter() - started))
    timed = rates[1:]  # the first one warms caches and clocks up
    return SpreadRecord(median=median(timed), min=min(timed), max=max(timed))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
