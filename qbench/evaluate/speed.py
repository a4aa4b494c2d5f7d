"""Prefill and decode speed of a causal language model, measured apart from quality, at fixed shapes.

Prefill: one forward pass over `[batch, prefill_tokens]` that fills the cache and gives the last position's logits.
Decode: `decode_tokens` greedy steps of `[batch, 1]` after a context of `context_tokens`. On a GPU a step of either is
replayed as a CUDA graph, as serving engines do: otherwise launching kernels from Python is what one would time. It is
timed as transformers runs it and, with `compile`, compiled (ways.py). The fastest way counts, for both models alike,
and the record has all that were tried, and why one was refused. A model that cannot be captured runs eagerly.

The tokens are seeded random ones. Each number is the median of `repeats` runs after a warm-up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from qbench.config import SpeedConfig
from qbench.errors import PointError, RequestError, unknown
from qbench.evaluate import ways
from qbench.evaluate.energy import joules_per_token
from qbench.evaluate.steps import Decoder, Prefill
from qbench.record.speed import InferenceRecord, Method, PhaseRecord, SpeedRecord, SpreadRecord, WayRecord

log = logging.getLogger(__name__)

NAMES = ("none", "default")
FEW = 8  # tokens at a time for which both ways of multiplying experts are tried: one of them copies the chosen experts
SIZES = ("batch_size", "prefill_tokens", "context_tokens", "decode_tokens", "repeats")


def check(config: SpeedConfig) -> None:
    """Raises RequestError for settings that cannot be measured."""
    if config.name not in NAMES:
        raise unknown("speed", config.name, NAMES)
    for key in (*SIZES, "compile"):
        value = getattr(config, key)
        if config.name == "none" and value is not None:
            raise RequestError(f"speed.{key}={value}, but speed=none measures nothing; add speed=default")
        if config.name == "none" or key == "compile":
            continue
        for each in (config.lengths or (value,)) if key == "prefill_tokens" else (value,):
            if not isinstance(each, int) or isinstance(each, bool) or each < 1:
                raise RequestError(f"speed.{key} must be a whole number, at least 1, got {each}")
    if len(set(config.lengths)) != len(config.lengths):
        raise RequestError(f"speed.prefill_tokens={list(config.lengths)} names a length twice")


def record(config: SpeedConfig, quantized: InferenceRecord, baseline: InferenceRecord | None) -> SpeedRecord:
    first, *more = config.lengths
    sizes = {key: getattr(config, key) for key in SIZES} | {"prefill_tokens": first}
    return SpeedRecord(**sizes, quantized=quantized, baseline=baseline, more_prefill_tokens=tuple(more))


@torch.inference_mode()
def measure(model: Any, config: SpeedConfig) -> InferenceRecord:
    """All phases of one model; raises PointError when it is not made for so many tokens."""
    text = model.config.get_text_config(decoder=True)
    longest = max(*config.lengths, config.context_tokens + config.decode_tokens)
    if longest > (limit := getattr(text, "max_position_embeddings", None) or longest):
        raise PointError(
            f"speed asks for {longest} tokens in a sequence, this model takes {limit}; lower speed.prefill_tokens, "
            "speed.context_tokens or speed.decode_tokens"
        )
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, max(*config.lengths, config.context_tokens))
    tokens = torch.randint(text.vocab_size, shape, generator=generator).to(model.device)
    with torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext():  # a graph is captured there
        first, *more = [_phase(Prefill(model, tokens[:, :length]), 1, config) for length in config.lengths]
        decoder = Decoder(model, tokens[:, : config.context_tokens], config.decode_tokens)
        return InferenceRecord(first, _phase(decoder, config.decode_tokens, config), tuple(more))


def _phase(work: Prefill | Decoder, steps: int, config: SpeedConfig) -> PhaseRecord:
    """The work in each way that there is, as the fastest has it; `steps` make one run."""
    device, experts = work.model.device.type, ways.experts_of(work.model)
    plain = "cuda graph" if device == "cuda" else "eager"
    few = device == "cuda" and work.attends_to_past and work.tokens <= FEW
    several = ways.EXPERTS if few and experts in ways.EXPERTS else (experts,)
    tried = [_timed(work, steps, config.repeats, plain, how) for how in several]
    if config.compiles(device):
        how = _fastest(tried)[0].experts
        if work.tokens == 1 and len(several) > 1:  # where a compiler reads the experts from where they lie
            how = "batched_mm"
        tried.append(_timed(work, steps, config.repeats, "compiled", how))
    refused = tried[0][0].refused
    if _fastest(tried)[1] is None:
        log.warning("%s is timed eagerly, which counts the launches as well: %s", work.name, refused)
        tried.append(_timed(work, steps, config.repeats, "eager", experts))
    _, best = _fastest(tried)
    assert best is not None  # an eager step that fails fails the point
    because = refused if device == "cuda" and best.method == "eager" else None
    return replace(best, eager_because=because, ways=tuple(way for way, _ in tried))


def _timed(
    work: Prefill | Decoder, steps: int, repeats: int, method: Method, experts: str | None
) -> tuple[WayRecord, PhaseRecord | None]:
    """The phase run in one way, and what its record says of that; no phase where it was refused."""
    device = work.model.device
    told = WayRecord(method, None, None, None, experts, None, None)
    try:
        with ways.multiplying(work.model, experts), ways.WAYS[method](work) as way:

            def run() -> int:
                for _ in range(steps):
                    way.run()
                return steps * work.tokens

            def again() -> int:
                work.rewind()
                return run()

            spread = _time(run, work.rewind, repeats, device)
            peaks = way.peak.alloc_bytes, way.peak.rss_bytes
            joules = joules_per_token(again, device) if work.rewinds_freely else None
            told = replace(
                told,
                tokens_per_second=spread,
                attention=way.attention,
                compile_seconds=way.compile_seconds,
                difference=way.difference,
            )
            return told, PhaseRecord(spread, method, None, *peaks, joules)
    except ways.RefusedError as refused:
        log.info("%s, %s: %s", work.name, method, refused)
        return replace(told, refused=str(refused)), None


def _fastest(tried: Sequence[tuple[WayRecord, PhaseRecord | None]]) -> tuple[WayRecord, PhaseRecord | None]:
    """The first one where none could be run."""
    return max(tried, key=lambda one: 0.0 if one[1] is None else one[1].tokens_per_second.median)


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
