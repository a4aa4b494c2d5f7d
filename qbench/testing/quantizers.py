"""The conformance suite that any quantizer, ours or a third party's, must pass.

    from qbench.testing import QuantizerConformance

    class TestMine(QuantizerConformance):          # pytest finds it by its name
        def make(self):
            return Mine(nbits=4)

Every method below tests one contract and says in its failure which one is broken. Weights are synthetic
`[out, in]`, seeded, with the spread of real ones (0.05). A method with `needs` gets statistics of seeded, correlated
inputs, only those that it names, and its error is measured on the layer's output `X W^T`, which is what it minimizes.
The one GPU test carries the marker `gpu`; register it if you run pytest with `--strict-markers`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import ClassVar

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from qbench.format.format import Format
from qbench.layers.linear import QuantLinear, relative_error
from qbench.quant.quantizer import InputStatistics, Quantizer, Statistic

SPREAD = 0.05
PLAIN = (bool, int, float, str, type(None), list, tuple)  # what a YAML file can say


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Seeded Gaussian weights, fp32 `[rows, columns]`."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * SPREAD


@functools.lru_cache(maxsize=32)
def correlated_inputs(columns: int, tokens: int) -> Tensor:
    """Seeded input rows, fp32 `[tokens, columns]`: channels are correlated and differ widely in size."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = (0.7 * torch.randn(columns, generator=generator)).exp()
    return torch.randn(tokens, columns, generator=generator) @ mixing * sizes


def statistics_of(inputs: Tensor, needs: frozenset[Statistic]) -> InputStatistics | None:
    """What the harness would hand to a method with these `needs`; None for a calibration-free one."""
    if not needs:
        return None
    return InputStatistics(
        tokens=len(inputs),
        absmean=inputs.abs().mean(0) if Statistic.INPUT_ABSMEAN in needs else None,
        inputs=inputs.clone() if Statistic.INPUTS in needs else None,
        hessian=inputs.T @ inputs if Statistic.HESSIAN in needs else None,
        squares=inputs.square().mean(0) if Statistic.INPUT_SQUARES in needs else None,
    )


def same(a: Format, b: Format) -> bool:
    """Equal bit for bit in every stored buffer."""
    mine, other = a.tensors(), b.tensors()
    return mine.keys() == other.keys() and all(
        mine[k].dtype == other[k].dtype and torch.equal(mine[k], other[k]) for k in mine
    )


def nominal_bits(result: Format) -> int:
    """Bits of a code where the format says so, else the whole bits of what a weight takes."""
    return getattr(result, "nbits", max(1, int(result.bits_per_weight)))


def check_agreement(a: Format, b: Format, case: str) -> None:
    """Equal but for sums in another order, which can move a code that lies on a tie."""
    one, other = a.dequantize().cpu(), b.dequantize().cpu()
    error = float((one - other).norm() / other.norm())
    bound = 1e-3 * 2 ** max(0, 4 - nominal_bits(b))  # at 2 bits one such step in 256 x 1024 weights weighs 3e-3
    assert error < bound, f"{case} must agree: relative difference {error:.1e}, must be below {bound:.0e}"


class QuantizerConformance:
    """Subclass it under a name that starts with `Test` and define `make`."""

    # Relative error on Gaussian weights that no sound method exceeds: some 1.6 to 4 times that of RTN at group 64.
    max_error: ClassVar[dict[int, float]] = {2: 0.75, 3: 0.35, 4: 0.2, 8: 0.02}

    def make(self) -> Quantizer:
        """The quantizer under test, with the configuration under test."""
        raise NotImplementedError(f"{type(self).__name__} must define make(), which returns the quantizer to test")

    def statistics(self, quantizer: Quantizer, columns: int) -> InputStatistics | None:
        return statistics_of(correlated_inputs(columns, max(64, 2 * columns)), quantizer.needs)

    def quantize(self, weights: Sequence[Tensor], case: str, *, quantizer=None, stats=None) -> list[Format]:
        """Quantizes a linear group and checks what holds for every result; `case` goes into the failure."""
        quantizer = quantizer or self.make()
        stats = stats or self.statistics(quantizer, weights[0].shape[-1])
        try:
            results = quantizer.quantize(weights, stats)
        except Exception as error:
            raise AssertionError(f"{case}: quantize must accept it, but raised {error!r}") from error
        assert isinstance(results, list), f"{case}: quantize must return a list, got {type(results).__name__}"
        assert len(results) == len(weights), f"{case}: {len(weights)} weights in, {len(results)} results out"
        for weight, result in zip(weights, results, strict=True):
            assert isinstance(result, Format), f"{case}: {type(result).__name__} is not a qbench.format.format.Format"
            for shape in (list(result.shape), list(result.dequantize().shape)):
                assert shape == list(weight.shape), f"{case}: the shape must be kept: {list(weight.shape)} gave {shape}"
            elsewhere = {n: t.device for n, t in result.tensors().items() if t.device != weight.device}
            assert not elsewhere, f"{case}: buffers must stay on the weight's device {weight.device}: {elsewhere}"
            assert torch.isfinite(result.dequantize()).all(), f"{case}: the dequantized weight must be finite"
        return results

    def one(self, weight: Tensor, case: str, **kwargs) -> Format:
        return self.quantize([weight], case, **kwargs)[0]

    def error(self, weight: Tensor, result: Format) -> float:
        """Relative error of the weight, or of the layer's output for a method that is calibrated for it."""
        if not self.make().needs:
            return relative_error(weight, result)
        inputs = correlated_inputs(weight.shape[1], max(64, 2 * weight.shape[1]))
        reference = inputs @ weight.float().T
        return float((inputs @ result.dequantize().T - reference).norm() / reference.norm())

    def check_error(self, weight: Tensor, result: Format, case: str) -> None:
        error, nbits = self.error(weight, result), getattr(self.make(), "nbits", nominal_bits(result))
        assert error < 1, f"{case}: relative error {error:.3f}, no better than returning zeros"
        bound = self.max_error[max((known for known in self.max_error if known <= nbits), default=2)]
        assert error < bound, f"{case}: relative error {error:.3f} at {nbits} bits, must be below {bound}"

    def test_is_a_frozen_dataclass(self) -> None:
        quantizer = self.make()
        cls = type(quantizer)
        assert isinstance(quantizer, Quantizer), f"{cls.__name__} must derive from qbench.quant.quantizer.Quantizer"
        own = vars(cls).get("__dataclass_params__")  # an undecorated subclass would inherit its parent's
        assert own is not None, f"{cls.__name__} must itself be decorated as a dataclass"
        assert own.frozen, f"{cls.__name__} must be a frozen dataclass: its fields are its configuration"
        assert replace(quantizer) == quantizer == self.make(), f"equal fields must make equal {cls.__name__}s"
        for field in fields(quantizer):
            value = getattr(quantizer, field.name)
            assert isinstance(value, PLAIN), f"field {field.name} must hold a value that YAML can say, got {value!r}"

    def test_needs_names_statistics(self) -> None:
        needs = self.make().needs
        assert isinstance(needs, frozenset), f"needs must be a frozenset, got {type(needs).__name__}"
        assert all(isinstance(n, Statistic) for n in needs), f"needs must hold members of Statistic, got {needs}"

    def test_keeps_the_shape(self) -> None:
        for rows, columns in ((64, 128), (7, 33), (1, 64), (5, 1), (1, 1)):
            self.one(gaussian(rows, columns), f"weight of shape [{rows}, {columns}]")

    def test_accepts_float_types(self) -> None:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            weight = gaussian(48, 128).to(dtype)
            result = self.one(weight, f"{dtype} weight")
            self.check_error(weight, result, f"{dtype} weight")
            assert result.dequantize(dtype).dtype == dtype, f"dequantize({dtype}) must return that type"

    def test_accepts_non_contiguous_weights(self) -> None:
        views = {"transposed": gaussian(128, 48).T, "strided": gaussian(96, 256)[::2, ::2]}
        for name, view in views.items():
            result = self.one(view, f"{name} weight")
            twin = self.one(view.contiguous(), f"contiguous copy of the {name} weight")
            check_agreement(result, twin, f"a {name} weight and its contiguous copy")

    def test_ragged_groups(self) -> None:
        quantizer = self.make()
        if not hasattr(quantizer, "group_size"):
            pytest.skip("has no group_size")
        for group_size, columns in ((128, 576), (128, 100), (-1, 100)):
            case = f"{columns} input channels at group_size={group_size}"
            weight = gaussian(32, columns)
            self.check_error(weight, self.one(weight, case, quantizer=replace(quantizer, group_size=group_size)), case)

    def test_linear_group(self) -> None:
        weights = [gaussian(rows, 128, seed) for seed, rows in enumerate((96, 32, 32))]
        results = self.quantize(weights, "a group of three")
        for position, (weight, result) in enumerate(zip(weights, results, strict=True)):
            self.check_error(weight, result, f"result {position} must belong to weight {position}")

    def test_is_deterministic(self) -> None:
        first, second = (self.one(gaussian(64, 192), "the same weight twice") for _ in range(2))
        assert same(first, second), "the same weight must be quantized to the same buffers, bit for bit, every time"

    def test_leaves_its_input_alone(self) -> None:
        quantizer = self.make()
        weights, stats = [gaussian(64, 192), gaussian(32, 192, 1)], self.statistics(quantizer, 192)
        given = {"weight 0": weights[0], "weight 1": weights[1]}
        if stats is not None:
            given |= {f.name: v for f in fields(stats) if isinstance(v := getattr(stats, f.name), Tensor)}
        before = {name: tensor.clone() for name, tensor in given.items()}
        results = self.quantize(weights, "a group of two", quantizer=quantizer, stats=stats)
        for name, tensor in given.items():
            assert torch.equal(tensor, before[name]), f"quantize must not modify its input: {name} changed"
        own = {t.untyped_storage().data_ptr() for t in given.values()}
        for name, tensor in (item for result in results for item in result.tensors().items()):
            assert tensor.untyped_storage().data_ptr() not in own, f"{name} must not share memory with the input"

    def test_ignores_the_global_random_state(self) -> None:
        weight, results = gaussian(64, 192), []
        with torch.random.fork_rng(devices=[]):
            for seed in (1, 2):
                torch.manual_seed(seed)
                before = torch.get_rng_state()
                results.append(self.one(weight, f"global seed {seed}"))
                untouched = torch.equal(before, torch.get_rng_state())
                assert untouched, "quantize must not draw from the global random state; use a seeded torch.Generator"
        assert same(*results), "the result must not depend on the global random state"

    def large(self) -> tuple[Tensor, Format]:
        """A weight and what it becomes, quantized once for the tests that only look at it."""
        if "_large" not in vars(type(self)):
            weight = gaussian(128, 1024)
            type(self)._large = weight, self.one(weight, "weight of shape [128, 1024]")
        return type(self)._large

    def test_counts_its_bytes(self) -> None:
        quantizer, (_, result) = self.make(), self.large()
        stored = sum(t.nbytes for t in result.tensors().values())
        assert result.nbytes == stored, f"nbytes must count the stored buffers: {result.nbytes} against {stored}"
        nbits, bpw = getattr(quantizer, "nbits", nominal_bits(result)), result.bits_per_weight
        assert nbits <= bpw < nbits + 2, f"{nbits} bits must cost between {nbits} and {nbits + 2} stored, got {bpw:.3f}"

    def test_error_on_gaussian_weights(self) -> None:
        self.check_error(*self.large(), "Gaussian weights")

    def test_degenerate_weights(self) -> None:
        weight = gaussian(32, 128)
        constant, offset, outlier, spike = (weight.clone() for _ in range(4))
        constant[:8] = 0.7
        offset += 10
        outlier[3, 5] = 1000.0
        spike[:, 5] *= 1000
        cases = {
            "constant rows": constant,
            "one constant": torch.full_like(weight, -0.3),
            "values far from zero": offset,
            "one huge outlier": outlier,
            "one huge column": spike,
            "weights of 1e-6": weight / SPREAD * 1e-6,
        }
        for case, values in cases.items():
            self.one(values, case)  # which checks that the result is finite

    def test_zero_rows_stay_zero(self) -> None:
        rows, everything = gaussian(32, 128), torch.zeros(32, 128)
        rows[4:7] = 0
        for case, weight, dead in (("zero rows", rows, slice(4, 7)), ("an all-zero weight", everything, slice(None))):
            largest = float(self.one(weight, case).dequantize()[dead].abs().max())
            assert largest < SPREAD / 50, f"{case} must come back as zero, got values up to {largest:.2g}"

    def test_a_rotated_weight_comes_back_in_its_own_basis(self) -> None:
        if hasattr(quantizer := self.make(), "rotation"):
            weight, quantizer = gaussian(64, 128), replace(quantizer, rotation="hadamard")
            self.check_error(weight, self.one(weight, "rotated", quantizer=quantizer), "rotated and brought back")

    def test_buffers_round_trip(self) -> None:
        result = self.one(gaussian(48, 160), "weight of shape [48, 160]")
        try:
            loaded = safetensors.torch.load(safetensors.torch.save(result.tensors()))
        except Exception as error:
            raise AssertionError(f"tensors() must be storable as safetensors, but: {error}") from error
        for how, named in (("with_tensors(tensors())", result.tensors()), ("a safetensors file", loaded)):
            again = result.with_tensors(named).dequantize()
            assert torch.equal(again, result.dequantize()), f"{how} must dequantize bit for bit the same"

    def test_serves_a_linear_layer(self) -> None:
        weight = gaussian(48, 160)
        result = self.one(weight, "weight of shape [48, 160]")
        x, bias = gaussian(6, 160, 2).view(2, 3, 160), gaussian(1, 48, 3)[0]
        expected = F.linear(x, result.dequantize(), bias)
        layer = QuantLinear(result, bias)
        stored = {name: tensor.dtype for name, tensor in layer.named_buffers()}
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4, msg="QuantLinear must equal F.linear")
        layer = layer.to(torch.float16)
        kept = {name: tensor.dtype for name, tensor in layer.named_buffers()}
        assert kept == stored, f"to(float16) must leave the packed buffers as stored: {stored} became {kept}"
        half = layer(x.half())
        assert half.dtype == torch.float16, f"a layer in float16 must return float16, got {half.dtype}"
        torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=1e-2, msg="the float16 layer is off")

    def test_calibration_is_asked_for(self) -> None:
        quantizer, weight = self.make(), gaussian(48, 128)
        if quantizer.needs:
            try:
                quantizer.quantize([weight], None)
            except ValueError as error:
                message = str(error)
                one_sentence = message.strip() and "\n" not in message
                assert one_sentence, f"say in one sentence what is needed, not {message!r}"
            except Exception as error:
                raise AssertionError(f"without statistics it must raise ValueError, not {error!r}") from error
            else:
                raise AssertionError(f"needs {sorted(n.name for n in quantizer.needs)}, yet accepts stats=None")
            return
        stats = statistics_of(correlated_inputs(128, 256), frozenset(Statistic))
        informed = self.one(weight, "statistics it has no need for", stats=stats)
        assert same(informed, self.one(weight, "no statistics")), "it uses statistics that its `needs` does not name"

    def test_degenerate_calibration(self) -> None:
        """Fewer tokens than channels, and channels that are never active: a singular Hessian.

        Inputs that are zero throughout may be refused with a sentence; the harness then names the layer.
        """
        quantizer = self.make()
        if not quantizer.needs:
            pytest.skip("calibration-free")
        inputs = correlated_inputs(128, 40).clone()
        inputs[:, 10:20] = 0
        weight = gaussian(48, 128)
        few = statistics_of(inputs, quantizer.needs)
        self.one(weight, "dead channels and few tokens", quantizer=quantizer, stats=few)
        nothing = statistics_of(torch.zeros_like(inputs), quantizer.needs)
        try:
            quantizer.quantize([weight], nothing)
        except ValueError as refusal:
            if not str(refusal):
                raise AssertionError("a refusal of inputs of zero needs a sentence") from None
        else:
            self.one(weight, "inputs of zero", quantizer=quantizer, stats=nothing)

    @pytest.mark.gpu
    def test_gpu_equals_cpu(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        weight = gaussian(256, 1024)
        stats = moved = self.statistics(self.make(), 1024)
        if stats is not None:
            tensors = {f.name: v for f in fields(stats) if isinstance(v := getattr(stats, f.name), Tensor)}
            moved = replace(stats, **{name: tensor.cuda() for name, tensor in tensors.items()})
        cpu = self.one(weight, "on the CPU", stats=stats)
        gpu = self.one(weight.cuda(), "on the GPU", stats=moved)
        # two candidates of a search can be equally good, and one step of an int8 scale apart: what must agree is how
        # good the choice is
        gpu = gpu.with_tensors({name: tensor.cpu() for name, tensor in gpu.tensors().items()})
        errors = self.error(weight, gpu), self.error(weight, cpu)
        allowed = 0.02 if self.make().needs else 0.005
        assert abs(errors[0] / errors[1] - 1) < allowed, f"GPU and CPU have {errors}: must agree to {allowed:.1%}"
