"""One walk over a model's blocks that serves all its variants, whatever the model's size.

    source ---- block i, one ahead of its turn: disk or cache -> device ---->
      original block       -> states of the original
      for each variant:       statistics of what the block is shown -> its linears quantized (variant.py)
                              -> states of the variant go through the quantized block
    last: final norm and head, row by row: the original's logits beside each variant's -> scores (evaluate/asks.py)

Weights exist for one block and the next one, hidden states for all tokens at one depth: tokens x hidden for each
variant (states.py). A variant is never affected by the others: the batches are the protocol's, and what a block gives
out for one is computed by the same operations as if it were alone. One that fails drops out, and the others go on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qbench.errors import PointError
from qbench.evaluate.asks import Reader
from qbench.model.linears import find_linears
from qbench.model.readers import mark_without_storage
from qbench.passes.account import Tally
from qbench.passes.chain import Calls, Chain
from qbench.passes.groups import Groups
from qbench.passes.own import has_own, sharing, take_own
from qbench.passes.quantize import require_finite_weights
from qbench.passes.shown import Collected, Group, Shown
from qbench.passes.states import States
from qbench.passes.transformed import Replaced
from qbench.passes.variant import Names, Variant
from qbench.sources.ahead import ahead
from qbench.sources.stream import Stream
from qbench.transforms.observe import Observed

After = Callable[[Tensor, int, int], None]  # changes, in place, what block `i` gave out for batch `b`: (states, i, b)


class Walk:
    """A model that is there but for its blocks, which come one after the other.

    Raises NotAChainError for a model that is no plain chain of blocks (chain.py).
    """

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self.stream, self.device = stream, device
        self.model = stream.rest()
        self.chain = Chain.of(self.model)
        self.skeleton = without_storage(self.model)
        self.found = find_linears(self.skeleton)
        self.tally = Tally(self.model, self.skeleton, stream.prefix)
        self.names = [self._names(f"{stream.prefix}.{i}.") for i in range(len(stream))]
        if stream.resident:  # else a block is looked at when it comes
            for i, names in enumerate(self.names):
                require_finite_weights(*names.inside(stream.block(i)))
        self.ids: list[Tensor] = []
        self.calls: list[Calls] = []
        self.observed: dict[Any, Observed] = {}  # of blocks, by kind, for those variants that are transformed

    def begin(self, batches: Sequence[np.ndarray], on_host: bool) -> States:
        """The states in front of the first block; `batches` are int64 `[rows, tokens]`."""
        self.ids = [torch.from_numpy(ids).to(self.device) for ids in batches]

        def embedded() -> Iterator[Tensor]:
            for ids in self.ids:
                states, calls = self.chain.begin(ids)
                self.calls.append(calls)
                yield states

        return States(embedded(), self.device, on_host)

    def begin_own(self, variant: Variant, begun: States | None) -> None:
        """Gives a variant its states in front of the first block: those that all `begun` with, or those of its own.

        Its own embedding, norms and head are put in their places. Raises PointError for what does not fit.
        """
        variant.states = None if begun is None else States.like(begun)
        around = {} if variant.transformed is None else variant.transformed.begin()
        if not has_own(variant.quantizer) and not around:
            return
        model, own = sharing(self.model), Replaced(around) if around else variant.quantizer
        blocks = {f"{self.stream.prefix}.{i}.{name}" for i in range(len(self.stream)) for name in self._in_block(i)}
        variant.others += take_own(model, own, without=blocks, places=model)
        if not variant.others:
            return
        _untie(model)
        variant.model, variant.chain = model, Chain.of(model)
        if begun is not None:
            handed = [variant.chain.begin(ids) for ids in self.ids]
            variant.states = States((states for states, _ in handed), self.device, begun.on_host)
            variant.calls = [calls for _, calls in handed]

    def _in_block(self, i: int) -> list[str]:
        block = self.model.get_submodule(f"{self.stream.prefix}.{i}")
        return [name for name, _ in block.named_parameters(remove_duplicate=False)]

    @torch.no_grad()
    def run(
        self, variants: Sequence[Variant], original: States | None, shown: Sequence[Shown] = ()
    ) -> Iterator[Variant]:
        """Sends everything through all blocks; yields the variants that dropped out, each when it does.

        `original` are the original's states, None where they are not asked for. `shown` are calibrations on the
        original's states, each shared by the variants that name it as theirs. Raises PointError where the original
        itself gives no numbers.
        """
        if not variants and original is None:
            return
        joint = any(v.quantizer.joint and not v.quantizer.needs for v in variants)
        groups = Groups(self.chain) if joint else None
        total = len(self.stream) * (len(variants) + (original is not None))
        with tqdm(total=total, desc="pass", unit="block") as bar, closing(self._blocks(bar)) as blocks:
            for i, block in blocks:
                names = self.names[i]
                self.tally.add(block, names.prefix)
                require_finite_weights(*names.inside(block))
                layers, experts = names.inside(block)
                collected = {id(one): one.collect(i, block, layers, experts) for one in shown}
                together = None if groups is None else groups.of(i, block, layers)
                same: list[States] = []  # those of the original, or of what it is so far
                if original is not None:
                    bar.set_postfix_str("original")
                    self._through(i, block, original, "the original", self.calls)
                    same.append(original)
                    bar.update()
                for variant in variants:
                    if not variant.alive:  # it may have been let go together with the one before
                        continue
                    bar.set_postfix_str(variant.label)
                    try:
                        self._take(i, block, variant, collected, together, same)
                    except Exception as error:
                        variant.drop_out(error)
                        yield variant
                    bar.update()
                del collected, layers, experts, together
                if not any(v.alive for v in variants) and original is None:
                    return

    def _take(
        self,
        i: int,
        block: nn.Module,
        variant: Variant,
        collected: dict[int, Collected],
        groups: list[Group] | None,
        same: list[States],
    ) -> None:
        """Block `i` of a variant; one that is the original so far has its states, or those of another such variant."""
        after = getattr(variant.quantizer, "after_block", None)  # of one that changes states and no weights
        with _seconds(variant, "quantize", self.device):
            shared = collected.get(id(variant.shares))
            new = block if after else variant.quantize(i, block, self.names[i], shared, groups)
        untouched = after is None and variant.untouched
        if variant.states is not None and untouched and same:
            variant.states = States.like(same[0])
        elif variant.states is not None:
            with _seconds(variant, "evaluate", self.device):
                self._through(i, new, variant.states, "the quantized model", variant.calls or self.calls, after)
            if untouched:
                same.append(variant.states)

    def _through(
        self, i: int, block: nn.Module, states: States, whose: str, calls: Sequence[Calls], after: After | None = None
    ) -> None:
        def run(b: int, x: Tensor) -> Tensor:
            # a block may write into what it is handed
            y = calls[b][i].run(block, x.clone() if states.shared else x)
            if after is not None:
                after(y, i, b)
            return y

        broken = states.through(run)
        if broken is not None:
            row = int((~torch.isfinite(states[broken]).flatten(1).all(1)).nonzero()[0])
            first = sum(len(ids) for ids in self.ids[:broken]) + row
            raise PointError(
                f"{whose} gives NaN or Inf in window {first}, first in the output of {self.names[i].prefix[:-1]}"
            )

    def _blocks(self, bar: tqdm) -> Iterator[tuple[int, nn.Module]]:
        if self.stream.resident:
            yield from ((i, self.stream.block(i)) for i in range(len(self.stream)))
            return
        numbers = range(len(self.stream))
        started, read = time.perf_counter(), 0
        for i, block in ahead(self.stream.block, numbers, self.device):
            read += self.stream.bytes_of_block(i)
            bar.set_description(f"pass, {read / 1e9 / (time.perf_counter() - started):.1f} GB/s read")
            yield i, block

    @torch.no_grad()
    def read(self, readings: Sequence[Reading], original: States | None) -> Iterator[Reading]:
        """Hands every row's logits to the readers; yields those that failed, each when it does.

        `original` are the original's states after the last block; None where no reader wants its logits.
        """
        with tqdm(total=sum(len(ids) for ids in self.ids), desc="logits", unit="row") as bar:
            for b, ids in enumerate(self.ids):
                first = None if original is None else original[b]
                states = {id(r): r.states[b] for r in readings if r.states is not None and r.error is None}
                for row in range(len(ids)):
                    logits = None if first is None else self._logits(first, ids, row)
                    for reading in readings:
                        if reading.error is not None:
                            continue
                        started = time.perf_counter()
                        try:
                            own = logits
                            if reading.states is not None:
                                own = self._logits(states[id(reading)], ids, row, reading.chain)
                            reading.reader.see(b, row, own, logits if reading.compares else None)
                            del own
                        except Exception as error:
                            reading.error = error
                            yield reading
                        reading.seconds += time.perf_counter() - started
                    bar.update()

    def _logits(self, states: Tensor, ids: Tensor, row: int, chain: Chain | None = None) -> Tensor:
        return (chain or self.chain).finish(states[row : row + 1], ids[row : row + 1])[0]

    def original(self) -> Any:
        """The original as a whole: the model, or where that is here without its blocks, a copy with all of them."""
        if self.stream.resident:
            return self.model
        read = tqdm(range(len(self.stream)), desc="loading", unit="block")
        return self._with(self.model, map(self.stream.block, read))

    def assembled(self, variant: Variant) -> Any:
        """The whole model with the variant's packed blocks, which it must have kept."""
        return self._with(variant.model or self.model, variant.kept)

    def _with(self, model: Any, blocks: Iterable[nn.Module]) -> Any:
        """A copy of the model over the same tensors, but for its blocks."""
        model = sharing(model)
        places = model.get_submodule(self.stream.prefix)
        for i, block in enumerate(blocks):
            places[i] = block
        return model.eval().requires_grad_(False)

    def _names(self, prefix: str) -> Names:
        layers, experts = (
            [name for name in part if name.startswith(prefix)] for part in (self.found.layers, self.found.experts)
        )
        return Names(prefix, layers, experts)


@dataclass
class Reading:
    """A reader with what it reads: the states of a variant after the last block, or, None, those of the original."""

    reader: Reader
    states: States | None
    compares: bool  # whether it is shown the original's logits beside its own
    chain: Chain | None = None  # of a variant with a norm or a head of its own
    error: Exception | None = None
    seconds: float = 0.0


def without_storage(model: Any) -> Any:
    """The model on the meta device, with its linears marked that are not to be quantized (readers.py)."""
    memo = {id(t): torch.empty_like(t, device="meta") for t in model.buffers()}
    memo |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    skeleton = copy.deepcopy(model, memo | configs)
    mark_without_storage(skeleton)
    return skeleton


def _untie(model: Any) -> None:
    """Lets the configuration say that head and embedding are two now: a checkpoint is loaded as it says."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    config = model.config.get_text_config()
    if getattr(config, "tie_word_embeddings", False) and head is not None and head.weight is not embedding.weight:
        model.config = copy.deepcopy(model.config)
        for each in (model.config, model.config.get_text_config()):
            each.tie_word_embeddings = False


@contextmanager
def _seconds(variant: Variant, phase: str, device: torch.device) -> Iterator[None]:
    started = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    variant.seconds[phase] += time.perf_counter() - started
