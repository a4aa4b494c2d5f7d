"""The built-in quantizers pass the conformance suite, their YAML mirrors them, and the suite can fail."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any, ClassVar

import pytest
import torch
from omegaconf import OmegaConf

from qbench.format.aux import Aux
from qbench.format.packing import PLANES
from qbench.quant.quantizer import Quantizer, Statistic
from qbench.quant.rounding import round_to_nearest
from qbench.registry import quantizer_class, quantizer_names
from qbench.testing import QuantizerConformance, gaussian

# a third party's quantizer may be installed beside ours; it has tests of its own
SHIPPED = [n for n in quantizer_names() if quantizer_class(n).__module__.startswith("qbench.plugins.")]
# official packages are optional, and accept less than the suite asks for: see test_upstream_oracle.py and test_gguf.py
BUILT_IN = [n for n in SHIPPED if not n.startswith(("upstream/", "gguf/"))]
# what the bit-widths of a method with its other settings at their defaults leave out
SETTINGS = [
    ("sinq", {"codebook": "nf4"}),
    ("sinq", {"codebook": "nf4", "aux_dtype": "int8"}),
    *(("sinq", {"inner": "hqq", "nbits": nbits}) for nbits in (2, 3, 4)),
    ("sinq", {"inner": "hqq", "aux_dtype": "int8"}),
    *(("higgs", {"nbits": nbits, "grid_dim": 1}) for nbits in (2, 4)),
    ("higgs", {"group_size": 1024, "aux_dtype": "int8"}),
    ("sinq", {"shared_t": True, "t_dtype": "fp8"}),
    ("sinq", {"t_dtype": "int8", "rotation": "hadamard"}),
    *((name, {"rotation": "hadamard", "rotation_block": 32}) for name in ("rtn", "hqq", "gptq", "nf4")),
    *(("fp8", {"scale": scale}) for scale in ("tensor", "block")),
    *((name, {"exponent": rule}) for name in ("mxfp4", "mxfp8") for rule in ("even", "ceil")),
]
# a float of 3 bits of mantissa is 2.6 % off wherever it lies, 8 bits or not
FLOATS = {"max_error": {4: 0.2, 8: 0.04}}


def bit_widths(name: str) -> list[int]:
    """The bit-widths that `name` accepts."""
    accepted = []
    for nbits in PLANES:
        try:
            replace(quantizer_class(name)(), nbits=nbits)
        except (ValueError, TypeError):  # TypeError: the method has no field nbits
            continue
        accepted.append(nbits)
    return accepted


def conformance(name: str, settings: dict[str, Any]) -> type[QuantizerConformance]:
    def make(self) -> Quantizer:
        return quantizer_class(name)(**settings)

    title = "".join(f"{value}bit" if key == "nbits" else f"_{value}" for key, value in settings.items())
    bounds = FLOATS if name in ("fp8", "mxfp8") else {}
    return type(f"Test{name.upper()}{title}", (QuantizerConformance,), {"make": make, **bounds})


for _name in BUILT_IN:
    SETTINGS += [(_name, {"nbits": nbits}) for nbits in bit_widths(_name)] or [(_name, {})]
for _name, _settings in SETTINGS:
    _suite = conformance(_name, _settings)
    globals()[_suite.__name__] = _suite


@pytest.mark.parametrize("name", SHIPPED)
def test_yaml_mirrors_the_dataclass(name):
    text = (resources.files("qbench.conf") / "quantizer" / f"{name}.yaml").read_text(encoding="utf-8")
    given = OmegaConf.to_container(OmegaConf.create(text))
    expected = {"name": name} | {field.name: field.default for field in fields(quantizer_class(name))}
    assert given == expected
    assert {k: type(v) for k, v in given.items()} == {k: type(v) for k, v in expected.items()}
    first, *rest = text.splitlines()
    assert first.startswith("# "), "the first line tells python -m qbench.catalog what the method is"
    for line in rest:
        is_key = line.strip() and not line.startswith(("#", " ", "name:"))
        assert not is_key or "# " in line, f"say what it means: {line}"


@dataclass(frozen=True)
class Calibrated(Quantizer):
    """Gives channels with larger inputs a finer grid: the calibrated half of the suite, before any such built-in."""

    needs: ClassVar[frozenset[Statistic]] = frozenset(Statistic)
    nbits: int = 3
    group_size: int = 64

    def quantize_one(self, weight, stats=None):
        if stats is None:
            raise ValueError("Calibrated needs statistics of the layer's input; choose a calibration text")
        sizes = stats.absmean.clamp_min(1e-4)
        t = (sizes / sizes.mean()).pow(-0.25)
        return round_to_nearest(weight, nbits=self.nbits, group_size=self.columns(weight), input_scale=t)


class TestCalibrated(QuantizerConformance):
    def make(self):
        return Calibrated()


# Quantizers that are broken in one way each, and the contract that must notice.


@dataclass(frozen=True)
class Sound(Quantizer):
    nbits: int = 4
    group_size: int = 64

    def quantize_one(self, weight, stats=None):
        return round_to_nearest(weight, nbits=self.nbits, group_size=self.columns(weight))


@dataclass(frozen=True)
class WrongShape(Sound):
    def quantize_one(self, weight, stats=None):
        return super().quantize_one(weight.T)


@dataclass(frozen=True)
class NaNScale(Sound):
    def quantize_one(self, weight, stats=None):
        result = super().quantize_one(weight)
        return replace(result, scale=Aux(torch.full_like(result.scale.stored, torch.nan)))


@dataclass(frozen=True)
class ModifiesInput(Sound):
    def quantize_one(self, weight, stats=None):
        return super().quantize_one(weight.mul_(0.99))


@dataclass(frozen=True)
class RandomCodes(Sound):
    def quantize_one(self, weight, stats=None):
        result = super().quantize_one(weight)
        return replace(result, planes=tuple(torch.randint_like(p, 256) for p in result.planes))


@dataclass(frozen=True)
class ReversedGroup(Sound):
    def quantize(self, weights, stats):
        return super().quantize(weights, stats)[::-1]


@dataclass(frozen=True)
class MoreBitsThanAsked(Sound):
    def quantize_one(self, weight, stats=None):
        return round_to_nearest(weight, nbits=8, group_size=self.columns(weight))


@dataclass(frozen=True)
class UsesWhatItDoesNotName(Sound):
    def quantize_one(self, weight, stats=None):
        return super().quantize_one(weight if stats is None else weight * 0.9)


@dataclass(frozen=True)
class ForgetsItsNeeds(Sound):
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.INPUT_ABSMEAN})


@dataclass(frozen=True)
class DampsTheHessian(Sound):
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.HESSIAN})

    def quantize_one(self, weight, stats=None):
        stats.hessian.diagonal().add_(1.0)
        return super().quantize_one(weight)


@dataclass(frozen=True)
class RefusesRaggedGroups(Sound):
    def quantize_one(self, weight, stats=None):
        if weight.shape[1] % self.columns(weight):
            raise ValueError("the group size must divide the input channels")
        return super().quantize_one(weight)


@dataclass
class Thawed:
    nbits: int = 4


BROKEN = [
    (WrongShape, "keeps_the_shape", "shape"),
    (NaNScale, "degenerate_weights", "finite"),
    (NaNScale, "error_on_gaussian_weights", "finite"),
    (ModifiesInput, "leaves_its_input_alone", "must not modify"),
    (RandomCodes, "is_deterministic", "bit for bit"),
    (RandomCodes, "ignores_the_global_random_state", "random state"),
    (RandomCodes, "error_on_gaussian_weights", "relative error"),
    (ReversedGroup, "linear_group", "shape"),
    (MoreBitsThanAsked, "counts_its_bytes", "4 bits must cost"),
    (UsesWhatItDoesNotName, "calibration_is_asked_for", "does not name"),
    (ForgetsItsNeeds, "calibration_is_asked_for", "accepts stats=None"),
    (DampsTheHessian, "leaves_its_input_alone", "hessian changed"),
    (DampsTheHessian, "calibration_is_asked_for", "must raise ValueError"),
    (RefusesRaggedGroups, "ragged_groups", "must accept it"),
    (Thawed, "is_a_frozen_dataclass", "must derive from"),
]


def suite_for(cls) -> QuantizerConformance:
    return type("Suite", (QuantizerConformance,), {"make": lambda self: cls()})()


@pytest.mark.parametrize(("cls", "contract", "message"), BROKEN, ids=lambda v: getattr(v, "__name__", None))
def test_a_broken_quantizer_fails(cls, contract, message):
    with pytest.raises(AssertionError, match=message):
        getattr(suite_for(cls), f"test_{contract}")()


def test_zeros_are_no_quantizer():
    """An answer of zeros is finite, deterministic and small; only the error bound refuses it."""

    @dataclass(frozen=True)
    class Zeros(Sound):
        def quantize_one(self, weight, stats=None):
            return super().quantize_one(torch.zeros_like(weight))

    suite = suite_for(Zeros)
    suite.test_is_deterministic()
    with pytest.raises(AssertionError, match="no better than returning zeros"):
        suite.test_error_on_gaussian_weights()


def test_suite_without_make_says_so():
    with pytest.raises(NotImplementedError, match=r"must define make\(\)"):
        QuantizerConformance().make()


def test_synthetic_weights_are_seeded():
    assert torch.equal(gaussian(3, 5), gaussian(3, 5))
    assert not torch.equal(gaussian(3, 5), gaussian(3, 5, seed=1))
