"""Names of parts, the knapsack, and the quantizers that treat parts of a model differently."""

from __future__ import annotations

from dataclasses import fields
from fnmatch import fnmatchcase
from itertools import product

import numpy as np
import pytest
import torch
import yaml

from qbench.format.mixed import Mixed
from qbench.format.plain import Plain
from qbench.layers.expert_form import expert_weights
from qbench.model.linears import coverage, find_linears
from qbench.parts.allocate import Anatomy, by_bits
from qbench.parts.composed import in_16_bit
from qbench.parts.knapsack import choose
from qbench.parts.mixed import Mixed as MixedBits
from qbench.parts.mixed import written
from qbench.parts.partly import Partly, linears_of_experts
from qbench.passes.quantize import quantize_model
from qbench.record.parts import EACH, Part, cells, part_of, patterns, place
from qbench.registry import make_quantizer
from qbench.sources.tiny import build
from qbench.testing import gaussian
from tests.conftest import ROOT

NAMES = [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("self_attn.q_proj", "mlp.down_proj")]
EXPERTS = [
    f"model.layers.{i}.mlp.experts.{e}.{p}" for i in range(2) for e in range(12) for p in ("up_proj", "down_proj")
]


@pytest.mark.parametrize("names", [NAMES, EXPERTS])
@pytest.mark.parametrize("each", EACH)
def test_patterns_divide_the_model_and_say_which_part_they_are(names, each):
    found = patterns(names, each)
    parts = [part_of(pattern) for pattern in found]
    assert {part.level for part in parts} == {each.removesuffix("s")}
    assert len(set(parts)) == len(parts)
    for name in names:
        taken = [p for p in found if Partly(only=p).for_layer(name) is not None]
        assert len(taken) == 1
        kind, block = part_of(taken[0])
        assert (kind or place(name).kind, place(name).block if block is None else block) == place(name)


@pytest.mark.parametrize("pattern", ["*.q?", "model.layers.*.mlp.up_proj", "*proj", "model.[01].*", "*.mlp.*", ""])
def test_other_patterns_are_no_parts(pattern):
    assert part_of(pattern) is None


def test_the_knapsack_finds_what_trying_all_finds():
    rng = np.random.default_rng(0)
    for _ in range(20):
        losses = rng.random((6, 3)).tolist()
        costs = (rng.integers(1, 30, (6, 3)) * 7).tolist()
        least, most = sum(map(min, costs)), sum(map(max, costs))
        capacity = int(rng.integers(least, most + 1))
        affordable = [c for c in product(range(3), repeat=6) if sum(costs[i][j] for i, j in enumerate(c)) <= capacity]
        best = min(sum(losses[i][j] for i, j in enumerate(c)) for c in affordable)
        chosen = choose(losses, costs, capacity)
        assert sum(costs[i][j] for i, j in enumerate(chosen)) <= capacity
        assert sum(losses[i][j] for i, j in enumerate(chosen)) == pytest.approx(best)
    with pytest.raises(ValueError, match="cheapest"):
        choose([[0.0, 1.0]], [[5, 9]], 4)


def test_large_costs_are_rounded_up_and_still_fit():
    rng = np.random.default_rng(1)
    costs = rng.integers(10**8, 10**9, (50, 3))
    costs.sort(axis=1)
    losses = -np.log(costs) + rng.normal(0, 0.01, costs.shape)
    capacity = int(costs.mean(1).sum())
    spent = sum(costs[i, j] for i, j in enumerate(choose(losses.tolist(), costs.tolist(), capacity)))
    assert 0.99 * capacity < spent <= capacity


def test_cells_are_measured_or_put_together_from_margins():
    wanted = [Part(k, b) for k in ("q", "down") for b in (0, 1)]
    margins = {Part("q", None): 1.0, Part("down", None): 3.0, Part(None, 0): 2.0, Part(None, 1): 2.0}
    found, measured = cells(margins, wanted)
    assert not measured
    assert found == {Part("q", 0): 0.5, Part("q", 1): 0.5, Part("down", 0): 1.5, Part("down", 1): 1.5}
    single = dict.fromkeys(wanted, 0.1)
    assert cells(margins | single, wanted) == (single, True)
    assert cells({Part("q", None): 1.0}, wanted) is None


def test_a_margin_alone_is_shared_equally_and_all_bits_are_judged_alike():
    sizes = {Part(kind, block): 8 for kind in ("q", "down") for block in range(4)}
    kinds = {Part("q", None): 1.0, Part("down", None): 2.0}
    blocks = {Part(None, block): block / 2 for block in range(4)}
    both, alone = Anatomy(kl=kinds | blocks, bytes=sizes), Anatomy(kl=kinds, bytes=sizes)
    assert by_bits({3: both})[3][Part("down", 3)] == pytest.approx(1.0)
    found = by_bits({3: both, 4: alone})  # what both can be judged by
    assert found[3] == found[4]
    assert (found[4][Part("q", 3)], found[4][Part("down", 0)]) == (0.25, 0.5)
    assert by_bits({3: Anatomy(kl=blocks, bytes=sizes)})[3][Part("q", 2)] == 0.5
    assert by_bits({3: Anatomy(kl={Part("q", None): 1.0}, bytes=sizes)}) == {}


def test_partly_quantizes_what_it_names_and_leaves_the_rest():
    weights = [gaussian(16, 64), gaussian(8, 64)]
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    one, other = Partly(method="sinq", nbits=3, only="*.k_proj").quantize_layers(names, weights, None)
    assert isinstance(one, Plain)
    assert torch.equal(one.dequantize(), weights[0])
    (alone,) = make_quantizer({"name": "sinq", "nbits": 3}).quantize(weights[1:], None)
    assert torch.equal(other.dequantize(), alone.dequantize())


@pytest.mark.parametrize("only", ["*.experts.[01].*", "*.experts.[23].up_proj"])
def test_of_a_stack_of_experts_the_others_stay_as_they_were(only):
    model = build("moe", 0)[0]
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as a model of 16 bit is that is run in 32
    found = find_linears(model)
    before = {name: expert_weights(module, 2) for name, module in found.experts.items()}
    taken = [name for name in linears_of_experts(found.experts) if fnmatchcase(name, only)]
    rows, _ = quantize_model(model, Partly(nbits=4, group_size=32, only=only))
    assert [row.name for row in rows] == taken
    weights = sum(row.shape[0] * row.shape[1] for row in rows)
    assert coverage(model) == pytest.approx(weights / found.weights)
    for name, originals in before.items():
        stacks = model.get_submodule(name).packed()
        for (projection, stack), original in zip(stacks.items(), originals, strict=True):
            if f"{name}.2.{projection}"[:-1] not in taken:
                left = stack.select(2)
                assert torch.equal(left.dequantize().squeeze(0), original)
                assert left.bits_per_weight == 16
            assert isinstance(stack, Mixed if any(f".{projection[:-1]}" in one for one in taken) else Plain)


def test_numbers_that_16_bits_do_not_hold_stay_in_32():
    assert in_16_bit(torch.tensor([1 / 3])).dtype == torch.float32
    assert in_16_bit(torch.tensor([1 / 3]).half().float()).dtype == torch.float16
    assert in_16_bit(torch.tensor([3e38])).dtype == torch.float32


def test_the_identity_holds_every_setting_of_the_method():
    spelled = Partly(method="rtn", nbits=3, options={"symmetric": False})
    assert spelled.settings() == Partly(method="rtn", nbits=3).settings()
    assert spelled.settings()["aux_dtype"] == "fp16"
    assert Partly(method="rtn", options={"symmetric": True}).settings()["symmetric"] is True


@pytest.mark.parametrize("cls", [Partly, MixedBits])
def test_yaml_mirrors_the_dataclass(cls):
    name = cls.__name__.lower()
    given = yaml.safe_load((ROOT / "conf" / "quantizer" / f"{name}.yaml").read_text(encoding="utf-8"))
    made = cls()
    assert given == {"name": name} | {field.name: getattr(made, field.name) for field in fields(cls)}


def test_it_asks_for_what_its_method_asks_for():
    assert Partly(method="sinq", options={"shared_t": True}).joint
    assert not Partly(method="sinq").joint
    assert Partly(method="gptq").needs == make_quantizer({"name": "gptq"}).needs


def test_mixed_gives_each_linear_its_bits():
    mixed = MixedBits(method="rtn", assignment="self_attn.q_proj=342 mlp.down_proj=-83")
    assert written(mixed.bits) == mixed.assignment
    assert [mixed.for_layer(name).nbits for name in NAMES if place(name) in mixed.bits] == [3, 4, 8, 2, 3]
    assert "budget_bits" not in mixed.settings()
    packed = mixed.quantize_layers([NAMES[0], NAMES[2]], [gaussian(16, 64)] * 2, None)
    assert [weight.nbits for weight in packed] == [3, 4]
    with pytest.raises(ValueError, match=r"says nothing of model\.layers\.0\.mlp\.down_proj"):
        mixed.for_layer("model.layers.0.mlp.down_proj")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "partly", "method": "partly"}, "has no weights of its own"),
        ({"name": "partly", "method": "rtm"}, "did you mean 'rtn'"),
        ({"name": "partly", "only": "kinds"}, "add -m"),
        ({"name": "partly", "method": "nf4"}, "quantizer.nbits"),
        ({"name": "partly", "options": {"nbits": 3}}, "say quantizer.nbits"),
        ({"name": "partly", "options": {"sym": 3}}, "quantizer.symmetric"),
        ({"name": "mixed", "assignment": "q_proj=35"}, "KIND=DIGITS"),
        ({"name": "mixed", "method": "higgs", "assignment": "q_proj=8"}, "nbits"),
        ({"name": "mixed", "budget_bits": 0.0}, "budget_bits must be positive"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        make_quantizer(settings)
    assert "\n" not in str(raised.value)
