"""One variant on its way through a pass: it quantizes block after block, and runs as what its packed weights stand for.

The packed weights of a block are really made, and counted. Then each is dequantized once, in the precision of the run,
into a copy of the block that shares all else with the original: transformers' own modules, which multiply as in 16 bit.
So a block is dequantized once for all windows, experts run as fast as the original's, and the packed weights are let go
unless somebody needs the whole variant (`keep`): an export, a measurement of speed, a task that generates.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qbench.errors import PointError
from qbench.evaluate.memory import Peak
from qbench.format.format import Format
from qbench.format.mixed import quantized_numel
from qbench.layers.dense import write
from qbench.layers.expert_form import expert_slice, form, stack_views, stacked_parameters
from qbench.layers.experts import QuantExperts
from qbench.layers.linear import PackedWeight
from qbench.passes.chain import Calls, Chain
from qbench.passes.experts import quantize_experts
from qbench.passes.own import configs_of, sharing, take_own
from qbench.passes.quantize import UNREACHED, quantize_linears, takes, takes_experts
from qbench.passes.shown import Collected, Group, Shown
from qbench.passes.states import States
from qbench.passes.transformed import Transformed
from qbench.quant.quantizer import Quantizer
from qbench.record.quantization import LayerRow, OtherRow, SkippedRow


@dataclass(frozen=True)
class Names:
    """Of one block: where it is in the model, and the linears and fused experts that are quantized, by full name."""

    prefix: str  # as in `model.layers.3.`
    layers: list[str]
    experts: list[str]

    def inside(self, block: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        layers, experts = (
            {name: block.get_submodule(name.removeprefix(self.prefix)) for name in names}
            for names in (self.layers, self.experts)
        )
        return layers, experts

    def weights(self, block: nn.Module) -> set[str]:
        """Full names of the parameters that are quantized."""
        layers, experts = self.inside(block)
        stacks = {f"{name}.{key}" for name, module in experts.items() for key in stacked_parameters(module)}
        return stacks | {f"{name}.weight" for name in layers}


@dataclass
class Variant:
    """What quantizing has taken so far, and what it has made."""

    label: str
    quantizer: Quantizer
    states: States | None  # None: nothing is scored in the pass
    shown: Shown | None = (
        None  # of a calibrated method on its own states; None: it needs none, or shares the original's
    )
    shares: Shown | None = None  # of a calibrated method on the original's states
    keep: bool = False
    transformed: Transformed | None = None  # what is done to its weights before they are quantized
    model: Any = None  # all but the blocks, where the variant has an embedding, a norm or a head of its own
    chain: Chain | None = None  # of that model, with what it hands its blocks, a tuple a batch; None: the original's
    calls: list[Calls] = field(default_factory=list)
    rows: list[LayerRow] = field(default_factory=list)
    others: list[OtherRow] = field(default_factory=list)
    unreached: list[SkippedRow] = field(default_factory=list)
    stored: Counter[str] = field(default_factory=Counter)  # bytes by component
    weights: int = 0  # that are packed
    covered: int = 0  # of these, that take fewer bits than the original's
    replaced_bytes: int = 0  # of the linears that were packed, in the run's precision
    kept: list[nn.Module] = field(default_factory=list)  # the packed blocks
    seconds: Counter[str] = field(default_factory=Counter)  # quantize, evaluate
    peak_alloc_bytes: int | None = None
    peak_rss_bytes: int | None = None
    untouched: bool = True  # as far as it has come, it is the original
    error: Exception | None = None  # it has dropped out

    def quantize(
        self, i: int, block: nn.Module, names: Names, shared: Collected | None, groups: Sequence[Group] | None = None
    ) -> nn.Module:
        """Block `i` as this variant has it, to be run; `shared` are statistics that other variants use as well.

        `groups` are the block's linear groups, for a method that is shown no text and quantizes a group as one.
        """
        peak = Peak(next(block.parameters()).device, tidy=False)
        new = sharing(block)
        if self.transformed is not None:
            self.others += self.transformed.take(i, new, names)
        layers, experts = names.inside(new)
        layers = {name: layer for name, layer in layers.items() if takes(self.quantizer, name)}
        experts = {name: module for name, module in experts.items() if takes_experts(self.quantizer, name, module)}
        packed: dict[str, nn.Module] = {}
        self.others += take_own(new, self.quantizer, names.prefix, names.weights(new))
        whole = not (layers or experts or self.others or self.model is not None or self.transformed is not None)
        self.untouched = self.untouched and whole

        def take(name: str, module: nn.Module, rows: list[LayerRow]) -> None:
            self.rows += rows
            for weight in _formats(module):
                self.weights += weight.numel
                self.covered += quantized_numel(weight)
                self.stored.update(weight.stored_bytes())
            if self.keep:
                packed[name] = module
            old = layers.get(name)
            self.replaced_bytes += sum(p.nbytes for p in _packed_parameters(layers.get(name), experts.get(name)))
            if old is not None:
                _run_as(old, module.format)
            else:
                run_experts_as(experts[name], module)

        found = shared
        if self.shown is not None:
            found = self.shown.collect(i, new, layers, experts)
        if found is None:
            together = groups if groups is not None and self.quantizer.joint else [[name] for name in layers]
            for group in together:
                named = {name: layers[name] for name in group if name in layers}
                for made, (module, row) in quantize_linears(named, self.quantizer).items() if named else ():
                    take(made, module, [row])
            for name, module in experts.items():
                take(name, *quantize_experts(name, module, self.quantizer))
        else:
            self.unreached += [SkippedRow(name, weights, UNREACHED) for name, weights in found.unreached.items()]
            for group, collector in _each(found.groups, found is not shared):
                named = {name: layers[name] for name in group if name in layers}
                if not named:
                    continue
                stats = collector.statistics(next(iter(named)))
                del collector
                for made, (module, row) in quantize_linears(named, self.quantizer, stats).items():
                    take(made, module, [row])
            for name, module in experts.items():
                inputs = found.experts[name].all_seen(name).serving(self.quantizer.needs)
                take(name, *quantize_experts(name, module, self.quantizer, inputs))
        if self.shown is not None:
            self.shown.go_on(i, new)
        if self.keep:
            self.kept.append(_with(new if self.others or self.transformed is not None else block, names, packed))
        self.peak_alloc_bytes = _most(self.peak_alloc_bytes, peak.alloc_bytes)
        self.peak_rss_bytes = _most(self.peak_rss_bytes, peak.rss_bytes)
        return new

    def drop_out(self, error: Exception) -> None:
        """Lets go of all that it holds on the device."""
        self.error, self.states, self.shown, self.shares, self.kept = error, None, None, None, []
        self.model = self.chain = None

    @property
    def alive(self) -> bool:
        return self.error is None


def _each(groups: list, drain: bool) -> Iterator:
    """The groups in order; with `drain`, none outlives its turn."""
    while drain and groups:
        yield groups.pop(0)
    yield from groups


def _formats(module: nn.Module) -> list[Format]:
    return [part.format for part in module.modules() if isinstance(part, PackedWeight)]


def _packed_parameters(layer: nn.Module | None, experts: nn.Module | None) -> list[nn.Parameter]:
    return [layer.weight] if layer is not None else list(stacked_parameters(experts).values())


def _run_as(layer: nn.Module, weight: Format) -> None:
    """The linear multiplies with what the packed weight stands for; GPT-2's Conv1D holds its weight transposed."""
    dense = torch.empty(weight.shape, dtype=layer.weight.dtype, device=layer.weight.device)
    write(weight, dense)
    layer.weight = nn.Parameter(dense if isinstance(layer, nn.Linear) else dense.T, requires_grad=False)


def run_experts_as(module: Any, packed: QuantExperts) -> None:
    for key, old in stacked_parameters(module).items():
        setattr(module, key, nn.Parameter(torch.empty_like(old), requires_grad=False))
    views = stack_views(module, expert_slice(module, slice(None)))
    for name, view in zip(form(module).projections, views, strict=True):
        write(getattr(packed, name).format, view)


def _with(block: nn.Module, names: Names, packed: dict[str, nn.Module]) -> nn.Module:
    """The block with packed layers in their places; all else of it is copied, since the block will be let go."""
    layers, experts = names.inside(block)
    replaced = [module for name, module in (*layers.items(), *experts.items()) if name in packed]
    memo = {id(p): p for module in replaced for p in module.parameters()}
    new = copy.deepcopy(block, memo | configs_of(block))
    for name, module in packed.items():
        parent, _, child = name.removeprefix(names.prefix).rpartition(".")
        setattr(new.get_submodule(parent), child, module)
    return new


def _most(one: int | None, other: int | None) -> int | None:
    return max(filter(None, (one, other)), default=None)


def too_large(error: Exception) -> PointError:
    """What a variant says that the device or the host had no room for."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return PointError(f"out of memory: {first_line}")
