"""The conformance suite that any transform, ours or a third party's, must pass.

    from qbench.testing import TransformConformance

    class TestMine(TransformConformance):          # pytest finds it by its name
        def make(self):
            return Mine()

The models are small random ones of a dense decoder and of a mixture of experts with shared queries.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qbench.passes.states import States
from qbench.passes.transformed import Transformed
from qbench.passes.variant import Variant
from qbench.passes.walk import Walk
from qbench.quant.original import Original
from qbench.record.transform import TransformRecord
from qbench.registry import TRANSFORM, make, names
from qbench.sources import tiny
from qbench.sources.stream import Whole
from qbench.transforms.transform import LIMIT, Transform


class TransformConformance:
    """Subclass it under a name that starts with `Test` and define `make`."""

    changes_nothing = False  # True for a transform that leaves every weight as it is

    def make(self) -> Transform:
        raise NotImplementedError(f"{type(self).__name__} must define make(), which returns the transform to test")

    def test_is_a_frozen_dataclass_that_is_registered(self) -> None:
        transform = self.make()
        cls = type(transform)
        assert is_dataclass(cls), f"{cls.__name__} must be a dataclass: its fields are its settings"
        assert vars(cls)["__dataclass_params__"].frozen, f"{cls.__name__} must be a frozen dataclass"
        assert replace(transform) == transform == self.make(), f"equal settings must make equal {cls.__name__}s"
        settings = {field.name: getattr(transform, field.name) for field in fields(transform) if field.init}
        assert transform.settings() == settings, "settings() must be the fields: they are the point's identity"
        made = [make(TRANSFORM, {"name": name}) for name in names(TRANSFORM)]
        name = {type(each): name for name, each in zip(names(TRANSFORM), made, strict=True)}.get(cls)
        assert name, f"{cls.__name__} must be registered under the entry-point group {TRANSFORM.group}"
        assert make(TRANSFORM, settings | {"name": name}) == transform

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_the_function_stays(self, architecture: str) -> None:
        before, after, record, _ = transformed(built(architecture), self.make())
        moved = float((after - before).norm() / before.norm())
        assert moved <= LIMIT, f"the logits moved by {moved:.1e} relative, more than {LIMIT:g}"
        refused = [row for row in record.alone if row.reason.startswith("folding ")]
        assert not refused, f"a fold that moves its block is no fold: {refused[0]}"

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_what_it_changed_is_in_the_record_and_nothing_of_the_originals(self, architecture: str) -> None:
        model = built(architecture)
        kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
        _, _, record, new = transformed(model, self.make())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, kept[name]), f"{name} of the original was written into"
        other = {n for n, p in new.named_parameters() if n in kept and not torch.equal(p, kept[n])}
        assert bool(other) != self.changes_nothing, "changes_nothing says whether any weight becomes another"
        assert bool(record.folds) == bool(other), "what is changed must be a fold, and a fold must change something"
        for row in record.folds:
            for linear in row.linears:
                assert {linear, f"{linear}.weight"} & other, f"{linear} is said to be covered and is as it was"
        assert 0 <= record.coverage <= 1

    def test_the_same_settings_do_the_same(self) -> None:
        one, two = (transformed(built("dense"), self.make())[3] for _ in range(2))
        for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
            assert torch.equal(first, second), f"{name} differs from one time to the next"

    def test_every_choice_is_one_without_a_choice(self) -> None:
        for choice in self.make().choices("rtn"):
            assert isinstance(choice, type(self.make()))
            assert list(choice.choices("rtn")) == [choice], "what is chosen must leave nothing to choose"


def built(architecture: str) -> Any:
    """A model whose norms have gains that differ, as no fresh one has."""
    model, _ = tiny.build(architecture, 0)
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.rand(parameter.shape, generator=random)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def transformed(model: Any, transform: Transform) -> tuple[Tensor, Tensor, TransformRecord, Any]:
    """Logits of the original and of the model after the transform, the record, and that model, whole."""
    ids = torch.randint(model.config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(2))
    walk = Walk(Whole(model), torch.device("cpu"))
    begun = walk.begin([ids.numpy()], on_host=False)
    original, variant = States.like(begun), Variant("transformed", Original(), None, keep=True)
    variant.transformed = Transformed(transform, walk)
    walk.begin_own(variant, begun)
    for dropped in walk.run([variant], original):
        assert dropped.error is not None
        raise dropped.error
    new = walk.assembled(variant)
    record = variant.transformed.record("it", walk.found.weights, {})
    return model(ids).logits, new(ids).logits, record, new
