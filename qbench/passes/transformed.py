"""A variant's transform on its way through a pass: each block is observed, changed in fp32, verified, and put back.

A few tokens go through a copy of the block in fp32 (wide.py). Every fold is put in place there and the block is run
again: what moves its output by more than LIMIT is taken back, and the result says so. Then the changed parameters go
into the variant's block, rounded once to the precision of the run; the original's are not written. What has been
observed of one block holds for all that have parts of the same names, kinds and shapes.

A residual stream in another basis is decided before the first block, since the embedding is turned: the first block of
each kind is read ahead and verified, and the embedding and the head with their norm. A later block that does not follow
is the end of the variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qbench.errors import PointError
from qbench.layers.expert_form import stacked_parameters
from qbench.passes.chain import Chain
from qbench.passes.own import sharing, take_own
from qbench.passes.wide import Wide, get, put, relative
from qbench.quant.quantizer import Quantizer
from qbench.record.quantization import OtherRow
from qbench.record.transform import AloneRow, FoldRow, TransformRecord
from qbench.transforms.block import Block, Tensors
from qbench.transforms.observe import Observed, observe
from qbench.transforms.transform import LIMIT, Transform
from qbench.transforms.turned import turned_block, without_gains

if TYPE_CHECKING:
    from qbench.passes.variant import Names
    from qbench.passes.walk import Walk

TOKENS = 32
FOUND_NONE = "what it reads comes neither from a norm nor, channel by channel, from one linear"
NOT_MEANT = "this transform folds nothing into what it reads"
UNREACHED = "no token of the observation reached it"
MOVED = "it moved the block's output by {:.1e} relative in fp32, more than {:g}"


@dataclass(frozen=True)
class Replaced(Quantizer):
    """A variant's own parameters, by full name, for own.py."""

    tensors: Mapping[str, Tensor]

    def in_place_of(self, name: str, parameter: Tensor) -> Tensor | None:
        return self.tensors.get(name)


class Transformed:
    """What a transform has done to one variant so far."""

    def __init__(self, transform: Transform, walk: Walk) -> None:
        self.transform, self.walk = transform, walk
        vocabulary = walk.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(TOKENS, device=walk.device)[None] * (vocabulary // TOKENS or 1) % vocabulary
        self.ids = ids
        states, self.calls = walk.chain.begin(ids)
        self.states = states.float()
        self.basis: Tensor | None = None
        self.folds: dict[str, FoldRow] = {}
        self.alone: list[AloneRow] = []
        self.covered = 0  # weights

    @torch.no_grad()
    def begin(self) -> Tensors:
        """The parameters around the blocks that the variant has for its own, by full name; none for most transforms."""
        basis = self.transform.basis(self.states.shape[-1], self.walk.device)
        if basis is None:
            return {}
        around, reason = self._around(basis)
        if reason is None:
            reason = self._any_block_that_does_not_turn(basis)
        if reason is not None:
            self.alone.append(AloneRow("the residual stream", reason))
            return {}
        self.basis = basis
        return around

    @torch.no_grad()
    def take(self, i: int, block: nn.Module, names: Names) -> list[OtherRow]:
        """Changes the variant's block `i`, whose tensors it shares with the original: it has others afterwards."""
        layers, experts = names.inside(block)
        inside = {name.removeprefix(names.prefix) for name in (*layers, *experts)}
        run, states = Wide(block, self.calls[i], self.states), self.states
        wide = run.module
        try:
            found, expected = self._observed(run), run(states)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the block's own code, which need not be able to run in fp32
            reason = f"its block cannot be observed in fp32: {_first_line(error)}"
            if self.basis is not None:
                raise PointError(f"{names.prefix[:-1]} cannot follow the residual stream: {reason}") from error
            self.alone += [AloneRow(names.prefix + name, reason) for name in sorted(inside)]
            return []
        changed: set[str] = set()
        covered: set[str] = set()
        if self.basis is not None:
            tensors = turned_block(wide, found, self.basis)
            put(wide, tensors)
            states, expected = states @ self.basis, expected @ self.basis
            if not (moved := run.moved(run(states), expected, LIMIT)) <= LIMIT:
                raise PointError(f"{names.prefix[:-1]} cannot follow the residual stream: {MOVED.format(moved, LIMIT)}")
            changed |= tensors.keys()
            readers = {r for n in found.norms for r in n.readers if n.name + ".weight" in tensors} & inside
            covered |= (read := {_as_fold_says(wide, r) for r in readers})
            self._note(f"{names.prefix}{{}}", "the residual stream", sorted(read), moved)
        feeds = [feed for feed in found.feeds if feed.consumer in inside]
        expert_feeds = [feed for feed in found.expert_feeds if feed.experts in inside]
        view = Block(names.prefix[:-1], wide, inside, found.norms, feeds, expert_feeds)
        refused: dict[str, str] = {}
        for fold in self.transform.folds(view):
            before = {name: get(wide, name) for name in fold.tensors}
            put(wide, {name: tensor.float() for name, tensor in fold.tensors.items()})
            if not (moved := run.moved(run(states), expected, LIMIT)) <= LIMIT:
                put(wide, before)
                refused |= dict.fromkeys(fold.linears, f"folding {fold.where}: {MOVED.format(moved, LIMIT)}")
                continue
            changed |= fold.tensors.keys()
            covered |= set(fold.linears)
            self._note(f"{names.prefix}{{}}", fold.where, list(fold.linears), moved)
        self._account(wide, names.prefix, inside, covered, refused, found)
        new = {names.prefix + name: get(wide, name) for name in changed}
        packed = names.weights(block)
        for name in new.keys() & packed:
            key = name.removeprefix(names.prefix)
            put(block, {key: new[name].to(get(block, key).dtype)})
        return take_own(block, Replaced(new), names.prefix, without=packed)

    def record(self, name: str, weights: int, searched: Mapping[str, float]) -> TransformRecord:
        """`weights` are the model's linear weights that count for coverage."""
        folds = list(self.folds.values())
        return TransformRecord(
            name=name,
            settings=self.transform.settings(),
            coverage=self.covered / max(1, weights),
            folds=folds,
            alone=self.alone,
            residual=self.basis is not None,
            moved=max((fold.moved for fold in folds), default=0.0),
            searched=dict(searched),
        )

    def _observed(self, run: Wide) -> Observed:
        known, kind = self.walk.observed, _kind(run.module)
        if kind not in known:
            known[kind] = observe(run.module, lambda: run(self.states))
        return known[kind]

    def _note(self, prefix: str, where: str, linears: list[str], moved: float) -> None:
        full = prefix.format(where)
        old = self.folds.get(full, FoldRow(full, [prefix.format(name) for name in linears], 0.0, 0))
        self.folds[full] = replace(old, moved=max(old.moved, moved), times=old.times + 1)

    def _account(
        self,
        wide: nn.Module,
        prefix: str,
        inside: set[str],
        covered: set[str],
        refused: Mapping[str, str],
        found: Observed,
    ) -> None:
        """Counts the weights that are covered, and says of each other one why it is not."""
        consumers = {feed.consumer for feed in found.feeds} | {f"{f.experts}.down_proj" for f in found.expert_feeds}
        read = {_as_fold_says(wide, reader) for norm in found.norms for reader in norm.readers}
        for name in sorted(inside):
            module = wide.get_submodule(name)
            stacks = stacked_parameters(module)
            weights = {f"{name}.{key}": p for key, p in stacks.items()} or {name: module.weight}
            for one, weight in weights.items():
                if one in covered:
                    self.covered += weight.numel()
                    continue
                reason = UNREACHED if one in found.unreached else FOUND_NONE
                reason = NOT_MEANT if one in consumers | read else reason
                self.alone.append(AloneRow(prefix + one, refused.get(one, reason)))

    def _any_block_that_does_not_turn(self, basis: Tensor) -> str | None:
        """The reason of the first block of its kind that is not the same block in the other basis."""
        kinds: set[Any] = set()
        for i, skeleton in enumerate(self.walk.skeleton.get_submodule(self.walk.stream.prefix)):
            if (kind := _kind(skeleton)) in kinds:
                continue
            kinds.add(kind)
            run = Wide(self.walk.stream.block(i), self.calls[i], self.states)
            try:
                found, expected = self._observed(run), run(self.states) @ basis
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                return f"{self.walk.stream.prefix}.{i} cannot be observed in fp32: {_first_line(error)}"
            put(run.module, turned_block(run.module, found, basis))
            if not (moved := run.moved(run(self.states @ basis), expected, LIMIT)) <= LIMIT:
                return f"a rotation of it is none of {self.walk.stream.prefix}.{i}: {MOVED.format(moved, LIMIT)}"
        return None

    def _around(self, basis: Tensor) -> tuple[Tensors, str | None]:
        """Embedding, last norm and head in the other basis, and why that is not the same model, or None."""
        inside = f"{self.walk.stream.prefix}."
        model = sharing(self.walk.model)
        outside = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not n.startswith(inside)}
        put(model, {name: parameter.detach().float() for name, parameter in outside.items()})
        chain = Chain.of(model)
        states, _ = chain.begin(self.ids)
        last = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
        expected = chain.finish(last, self.ids)
        found = observe(model, lambda: chain.finish(last, self.ids), whole=False)
        embedding = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is embedding)
        if embedding.weight.shape[1] != len(basis):
            return {}, f"the embedding has {embedding.weight.shape[1]} channels, the residual stream {len(basis)}"
        tensors = {f"{name}.weight": embedding.weight.detach() @ basis} | without_gains(model, found, basis)
        put(model, tensors)
        turned = Chain.of(model)
        for moved, what in (
            (relative(turned.begin(self.ids)[0], states @ basis), "embedding"),
            (relative(turned.finish(last @ basis, self.ids), expected), "head"),
        ):
            if not moved <= LIMIT:
                return {}, f"turning the {what} moved what it gives out by {moved:.1e} relative in fp32"
        return tensors, None


def _as_fold_says(block: nn.Module, reader: str) -> str:
    module = block.get_submodule(reader)
    stacks = stacked_parameters(module)
    return f"{reader}.{next(key for key in stacks if key != 'down_proj')}" if stacks else reader


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _kind(block: nn.Module) -> Any:
    return tuple((n, type(m).__name__, *(p.shape for p in m.parameters(False))) for n, m in block.named_modules())
