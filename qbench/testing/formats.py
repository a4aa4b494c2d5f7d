"""The conformance suite that any format of quantized weights, ours or a third party's, must pass.

    from qbench.testing import FormatConformance

    class TestMine(FormatConformance):             # pytest finds it by its name
        def make(self, generator, shape):
            return MyQuantizer().quantize_one(torch.randn(shape, generator=generator))

Every method tests one contract of qbench.format.format.Format and says in its failure which one is broken. A fused
kernel that is registered for the format is tested with it, on the CPU.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from qbench import registry
from qbench.errors import RequestError
from qbench.format.format import Format
from qbench.layers.linear import QuantLinear

SHAPE = (48, 160)
ODD = (7, 33)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_same(weight: Format, other: Format, how: str) -> None:
    """Equal bit for bit in every stored buffer, and in what is said of it."""
    mine, its = weight.tensors(), other.tensors()
    assert mine.keys() == its.keys(), f"{how} must keep the buffers: {sorted(mine)} became {sorted(its)}"
    for name, tensor in mine.items():
        assert tensor.dtype == its[name].dtype, f"{how} must keep the dtype of {name}"
        assert torch.equal(tensor.cpu(), its[name].cpu()), f"{how} must keep {name} bit for bit"
    assert weight.describe() == other.describe(), f"{how} must keep what describe() says"
    assert torch.equal(weight.dequantize(), other.dequantize()), f"{how} must dequantize bit for bit the same"


class FormatConformance:
    """Subclass it under a name that starts with `Test` and define `make`."""

    def make(self, generator: torch.Generator, shape: tuple[int, int]) -> Format:
        """A weight `[out, in]` of this shape in the format under test, of seeded values, on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} must define make(), which returns the weight to test")

    def one(self, shape: tuple[int, int] = SHAPE, seed: int = 0) -> Format:
        return self.make(seeded(seed), shape)

    def test_is_a_frozen_dataclass(self) -> None:
        weight = self.one()
        cls = type(weight).__name__
        assert isinstance(weight, Format), f"{cls} lacks a part of qbench.format.format.Format"
        assert dataclasses.is_dataclass(weight), f"{cls} must be a dataclass"
        assert type(weight).__dataclass_params__.frozen, f"{cls} must be frozen"
        for name, value in (("shape", (1, *weight.shape)), ("method", "other"), ("diagnostics", {"x": 1.0})):
            changed = dataclasses.replace(weight, **{name: value})
            assert getattr(changed, name) == value, f"{name} must be a field, which dataclasses.replace can change"

    def test_is_registered(self) -> None:
        weight = self.one()
        try:
            found = registry.find(registry.FORMAT, weight.name)
        except RequestError as error:
            raise AssertionError(f"a checkpoint finds the format by its name, but: {error}") from None
        assert found is type(weight), f"'{weight.name}' must be registered for {type(weight).__name__}, not {found}"

    def test_shapes(self) -> None:
        for shape in (SHAPE, ODD, (1, 64), (5, 1)):
            weight = self.one(shape)
            assert weight.shape == shape, f"shape must be {shape}, got {weight.shape}"
            assert weight.numel == shape[0] * shape[1], f"numel counts weights: {shape} has not {weight.numel}"
            assert weight.dequantize().shape == shape, f"dequantize() must give {shape}"
            assert weight.group_size >= 1, f"group_size counts input channels, got {weight.group_size}"

    def test_dequantizes_to_every_dtype(self) -> None:
        weight = self.one()
        full = weight.dequantize()
        assert full.dtype == torch.float32, f"dequantize() must give float32, got {full.dtype}"
        assert torch.isfinite(full).all(), "the weights must be finite"
        assert full.device == weight.device == next(iter(weight.tensors().values())).device, "devices must agree"
        for dtype in (torch.float16, torch.bfloat16):
            cast = weight.dequantize(dtype)
            assert cast.dtype == dtype, f"dequantize({dtype}) must return that type"
            assert torch.equal(cast, full.to(dtype)), f"dequantize({dtype}) must be computed in fp32 and then cast"

    def test_dequantizing_changes_nothing(self) -> None:
        weight = self.one()
        before = {name: tensor.clone() for name, tensor in weight.tensors().items()}
        first = weight.dequantize()
        first.zero_()
        for name, tensor in weight.tensors().items():
            assert torch.equal(tensor, before[name]), f"what dequantize() gave must not be {name} itself"

    def test_tensors_are_stored_buffers(self) -> None:
        weight = self.one()
        tensors = weight.tensors()
        assert tensors, "tensors() must name at least one buffer"
        for name, tensor in weight.tensors().items():
            assert tensor is tensors[name], f"{name} must be a buffer that is held, not one computed anew"
            assert "." not in name, f"{name!r} cannot name a buffer of a module"

    def test_other_tensors_of_the_same_names(self) -> None:
        weight = self.one()
        copies = {name: tensor.clone() for name, tensor in weight.tensors().items()}
        again = weight.with_tensors(copies)
        check_same(weight, again, "with_tensors(copies)")
        for name, tensor in again.tensors().items():
            assert tensor is copies[name], f"with_tensors must hold the very {name} that it is given"
        described = weight.with_tensors({name: tensor.to("meta") for name, tensor in weight.tensors().items()})
        assert described.nbytes == weight.nbytes, "on the meta device, the bytes must still be countable"
        assert described.describe() == weight.describe(), "on the meta device, describe() must say the same"

    def test_bytes(self) -> None:
        weight = self.one((256, 1024))
        stored = sum(tensor.numel() * tensor.element_size() for tensor in weight.tensors().values())
        assert weight.nbytes == stored, f"nbytes must count the stored buffers: {weight.nbytes} against {stored}"
        parts = weight.stored_bytes()
        assert sum(parts.values()) == stored, f"stored_bytes must sum up to nbytes: {parts} against {stored}"
        assert parts.get("codes", 0) > stored / 2, f"what holds the numbers themselves is called codes, got {parts}"
        assert weight.bits_per_weight == 8 * stored / weight.numel, "bits_per_weight is 8 x nbytes / numel"

    def test_a_file_and_back(self) -> None:
        for shape in (SHAPE, ODD):
            weight = dataclasses.replace(self.one(shape), method="some", diagnostics={"x": 0.5})
            try:
                described = json.loads(json.dumps(weight.describe()))
            except (TypeError, ValueError) as error:
                raise AssertionError(f"describe() must be JSON, but: {error}") from None
            assert not {"format", "buffers"} & described.keys(), "a checkpoint says `format` and `buffers` itself"
            tensors = safetensors.torch.load(safetensors.torch.save(weight.tensors()))
            again = type(weight).rebuild(described, tensors)
            check_same(weight, again, "a file")
            facts = (again.shape, again.method, dict(again.diagnostics), again.group_size)
            assert facts == (shape, "some", {"x": 0.5}, weight.group_size), (
                f"a file must keep all that is said: {facts}"
            )

    def test_a_stack(self) -> None:
        ones = [dataclasses.replace(self.one(seed=seed), diagnostics={"x": 1.0}) for seed in range(3)]
        ones[1] = dataclasses.replace(ones[1], method="other")
        whole = type(ones[0]).stack(ones)
        assert whole.shape == (3, *SHAPE), f"a stack of 3 must have the shape {(3, *SHAPE)}, got {whole.shape}"
        assert whole.nbytes <= sum(one.nbytes for one in ones), "a stack must not take more than its matrices"
        assert {*whole.method.split("+")} == {ones[0].method, "other"}, f"a stack names its methods: {whole.method}"
        dense = whole.dequantize()
        held = [tensor.untyped_storage().data_ptr() for tensor in whole.tensors().values()]
        for i, one in enumerate(ones):
            part = whole.select(i)
            assert part.shape == SHAPE, f"select must give one matrix {SHAPE}, got {part.shape}"
            assert torch.equal(part.dequantize(), one.dequantize()), "select must give the matrix bit for bit"
            assert torch.equal(dense[i], one.dequantize()), "a stack must dequantize to its matrices bit for bit"
            for name, tensor in part.tensors().items():
                assert tensor.untyped_storage().data_ptr() in held, f"{name} of a selected matrix must be a view"
        described = json.loads(json.dumps(whole.describe()))
        check_same(whole, type(whole).rebuild(described, whole.tensors()), "a stack's rebuild")
        with pytest.raises(ValueError, match=r"\w"):
            type(ones[0]).stack([ones[0], self.one(ODD)])

    def test_serves_a_linear_layer(self) -> None:
        weight, x = self.one(), torch.randn(2, 3, SHAPE[1], generator=seeded(2))
        bias = torch.randn(SHAPE[0], generator=seeded(3))
        expected = F.linear(x, weight.dequantize(), bias)
        layer = QuantLinear(weight, bias)
        assert torch.equal(layer(x), expected), "QuantLinear must equal F.linear"
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        assert state.keys() - {"bias"} == weight.tensors().keys(), "a layer's state is the format's tensors"
        assert sum(layer.held_bytes().values()) == weight.nbytes, "a packed layer holds what is stored"
        half = QuantLinear(weight, bias).to(torch.float16)
        check_same(weight, half.quantized, "to(float16)")
        assert half(x.half()).dtype == torch.float16, "a layer in float16 must return float16"
        if layer.lay_out():
            self.check_laid_out(layer, weight, x, state)

    def check_laid_out(self, layer: QuantLinear, weight: Format, x: Tensor, state: dict[str, Tensor]) -> None:
        """The contracts of a qbench.kernels.kernel.Kernel, for the layer whose weight is laid out for it."""
        near = F.linear(x, weight.dequantize(), layer.bias)
        error = float((layer(x) - near).norm() / near.norm())
        assert error < 5e-3, f"the kernel must multiply with the same weights: relative difference {error:.1e}"
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layer.buffers()}
        counted = layer.held_bytes()
        assert sum(counted.values()) == sum(held.values()), f"held_bytes must count what is held: {counted}"
        assert counted.keys() == weight.stored_bytes().keys(), f"held_bytes must name the format's parts: {counted}"
        assert layer.format.nbytes == weight.nbytes, "the stored bytes must not depend on the layout"
        check_same(weight, layer.quantized, "a kernel's layout")
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, state[name]), f"the state of a laid out layer must be as stored, {name} is not"
        layer.restore()
        check_same(weight, layer.quantized, "restore()")
        assert layer.state_dict().keys() == state.keys(), "restore() must bring the buffers back"
