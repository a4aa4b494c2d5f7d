"""The ways in which a step of a model is run when it is timed: eagerly, as a CUDA graph, or compiled.

A compiled model is transformers' own, its blocks run through torch.compile. All blocks of one kind share one
compilation, which takes seconds where compiling the model as a whole takes a minute: what tells one block from another,
its number and its place in the cache, is taken out of the way. On a GPU the compiled step is replayed as a CUDA graph
like the plain one, as serving engines do.
"""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.evaluate import attention
from qbench.evaluate.memory import Peak
from qbench.evaluate.steps import Decoder, Prefill
from qbench.kernels import rewrite
from qbench.layers.experts import stacked_parameters
from qbench.layers.linear import packed_weights
from qbench.model.linears import block_list

log = logging.getLogger(__name__)

BACKEND = "inductor"
TUNING = "coordinate_descent_tuning"  # inductor's
TOGETHER = True  # packed weights that multiply the same x, as q, k and v do, share a launch
KINDS = 64  # compilations: kinds of blocks, times what differs in whole numbers between blocks of one kind
MOST_DIFFERENCE = 0.5  # of the logits: 16-bit rounding gives some 0.03, a model that computes something else above 1


EXPERTS = ("grouped_mm", "batched_mm")  # of transformers' ways, those that do not ask the GPU which experts were chosen


class RefusedError(Exception):
    """The step cannot be run in that way; the message is one line."""


@dataclass(frozen=True)
class Way:
    """A step, ready to run; what it is called and what is known of it goes to its record."""

    run: Callable[[], Any]
    peak: Peak  # from before a graph was captured on
    attention: str | None = None
    compile_seconds: float | None = None
    difference: float | None = None


@contextmanager
def eager(work: Prefill | Decoder) -> Iterator[Way]:
    yield Way(work.step, Peak(work.model.device), _attention(work.model))


@contextmanager
def graph(work: Prefill | Decoder) -> Iterator[Way]:
    """Raises RefusedError."""
    with nullcontext() if work.attends_to_past else attention.static(work.model):
        peak = Peak(work.model.device)
        yield Way(_captured(work), peak, _attention(work.model))


@contextmanager
def compiled(work: Prefill | Decoder) -> Iterator[Way]:
    """Raises RefusedError, also where the compiled step computes something else than the eager one."""
    if work.uncapturable:
        raise RefusedError(work.uncapturable)
    work.rewind()
    expected, options = work.step().float(), _options(work)
    tuned = ", trying several kernels for each product, which may take a minute" * bool(options.get(TUNING))
    log.info("%s: compiling the model's blocks%s", work.name, tuned)
    with attention.static(work.model), _compiled_blocks(work.model, work.cache, options):
        started = time.perf_counter()
        try:
            work.rewind()
            found = work.step().float()
        except Exception as error:  # whatever a compiler or a kernel raises: the point goes on without
            raise RefusedError(_told(error)) from error
        difference = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
        seconds = time.perf_counter() - started
        if not difference <= MOST_DIFFERENCE:
            raise RefusedError(f"its logits differ from the eager ones by {difference:.2f} of their norm")
        peak = Peak(work.model.device)
        run = _captured(work) if work.model.device.type == "cuda" else work.step
        yield Way(run, peak, _attention(work.model), seconds, difference)


WAYS = {"eager": eager, "cuda graph": graph, "compiled": compiled}


def experts_of(model: Any) -> str | None:
    """transformers' way of multiplying a mixture's experts in 16 bit; None where there are none."""
    if not any(stacked_parameters(module) for module in model.modules()):
        return None
    return getattr(model.config.get_text_config(decoder=True), "_experts_implementation", None)


@contextmanager
def multiplying(model: Any, experts: str | None) -> Iterator[None]:
    """While it lasts, the model's experts in 16 bit are multiplied in that way of transformers'; None: as they are."""
    before = experts_of(model)
    if experts is None or before is None or experts == before:
        yield
        return
    try:
        model.set_experts_implementation(experts)
        yield
    finally:
        model.set_experts_implementation(before)


def _captured(work: Prefill | Decoder) -> Callable[[], None]:
    """`step` as a CUDA graph that starts where `rewind` leaves off. Raises RefusedError."""
    if work.uncapturable:
        raise RefusedError(work.uncapturable)
    device, first = work.model.device, None
    aside, current, recorded = torch.cuda.Stream(device), torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
    try:
        aside.wait_stream(current)  # libraries allocate, and kernels are compiled and tuned, before a capture
        with torch.cuda.stream(aside):
            work.rewind()
            work.step()
            work.rewind()
            with _no_waiting():
                work.step()
        current.wait_stream(aside)
        work.rewind()
        with torch.cuda.graph(recorded):
            try:
                work.step()
            except Exception as error:
                first = error  # what a failed capture says as it ends is that it failed
                raise
    except Exception as error:
        torch.cuda.synchronize(device)
        work.rewind()
        raise RefusedError(_told(first or error)) from error
    return recorded.replay


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raises RuntimeError where Python asks the GPU for a value, which no graph can hold."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is said to miss some; the capture does not
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _compiled_blocks(model: Any, cache: Any, options: dict[str, Any]) -> Iterator[None]:
    """While it lasts, the blocks of `model` run compiled, over the layers of the static `cache`. Raises RefusedError.

    Every block is told that it is the first, and is handed a cache of its own layer alone.
    """
    from transformers.cache_utils import Cache

    name = block_list(model)
    blocks = [] if name is None else list(model.get_submodule(name))
    if not blocks or len(blocks) != len(cache.layers):
        raise RefusedError(f"the model has {len(blocks)} blocks and a cache of {len(cache.layers)} layers")
    if any("forward" in vars(block) for block in blocks):
        raise RefusedError("something else stands in the place of the blocks' own forward")
    numbered = [module for block in blocks for module in block.modules() if "layer_idx" in vars(module)]
    numbers = [module.layer_idx for module in numbered]
    _forget()
    run = torch.compile(_block, fullgraph=True, backend=BACKEND, options=options or None)
    patched = torch._dynamo.config.patch(
        recompile_limit=KINDS,
        accumulated_recompile_limit=4 * KINDS,
        fail_on_recompile_limit_hit=True,  # it would go on eagerly
        allow_unspec_int_on_nn_module=True,  # whole numbers that differ between blocks become arguments
    )
    try:
        for block, layer in zip(blocks, cache.layers, strict=True):
            for value in vars(layer).values():
                if isinstance(value, Tensor):  # a compilation is not to be for the cache of one block
                    vars(value).pop("_dynamo_static_input_type", None)
            block.forward = _Block(run, block, cache, Cache(layers=[layer]))
        for module in numbered:
            module.layer_idx = 0
        with patched, _merging(model.device):
            yield
    finally:
        for module, number in zip(numbered, numbers, strict=True):
            module.layer_idx = number
        for block in blocks:
            vars(block).pop("forward", None)
        _forget()


def _options(work: Prefill | Decoder) -> dict[str, Any]:
    """Inductor's, of those that this version of torch knows."""
    if BACKEND != "inductor":
        return {}
    from torch._inductor import config

    device, decoding = work.model.device, work.attends_to_past
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    wanted = {
        "triton.cudagraphs": False,  # the whole step is captured here
        # products with 16-bit weights become kernels of its own, which also pick a mixture's experts; tuning takes 15 s
        TUNING: decoding and not packed_weights(work.model),
        "triton.enable_pdl": decoding and hopper,  # its kernels start while the one in front ends, as ours do
    }
    return {key: value for key, value in wanted.items() if key in config.get_config_copy()}


def _merging(device: torch.device) -> Any:
    """While it lasts, inductor lets what is small share a launch: the linears of one x, what a router computes."""
    if BACKEND != "inductor" or not TOGETHER:
        return nullcontext()
    from torch._inductor import config

    return config.patch(post_grad_custom_pre_pass=rewrite.graph_pass(choices=device.type == "cuda"))


class _Block:
    """A block's forward that hands `own` to the compiled block wherever the model hands it `cache`."""

    def __init__(self, run: Callable[..., Any], block: nn.Module, cache: Any, own: Any) -> None:
        self.run, self.block, self.cache, self.own = run, block, cache, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {key: self._swap(value) for key, value in kwargs.items()}
        return self.run(self.block, *map(self._swap, args), **given)

    def _swap(self, value: Any) -> Any:
        return self.own if value is self.cache else value


def _block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)


def _forget() -> None:
    """Frees what was compiled, and what that holds."""
    torch.compiler.reset()
    gc.collect()


def _attention(model: Any) -> str | None:
    return getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None)


def _told(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
