"""The built-in format passes the conformance suite in each of its forms, and the suite can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qbench.format.aux import Aux, store_input_scale
from qbench.format.rotation import Rotation, largest_block
from qbench.format.weight import QuantizedWeight
from qbench.testing import FormatConformance
from tests.kernels.cases import random_weight


class TestFourBits(FormatConformance):
    def make(self, generator, shape):
        return replace(random_weight(shape, 4, 64, generator), method="random")


class TestThreeBitsWithoutZero(FormatConformance):
    def make(self, generator, shape):
        return replace(random_weight(shape, 3, 32, generator, zero=False, t=False), method="random")


class TestPermutedInt8Aux(FormatConformance):
    def make(self, generator, shape):
        return replace(random_weight(shape, 2, 128, generator, permuted=True, aux_dtype="int8"), method="random")


class TestGroupsThatNoKernelHolds(FormatConformance):
    def make(self, generator, shape):
        return replace(random_weight(shape, 8, 48, generator), method="random")


class TestCodebook(FormatConformance):
    codebook = torch.linspace(-1, 1, 16)

    def make(self, generator, shape):
        weight = random_weight(shape, 4, 64, generator, codebook=True)
        return replace(weight, codebook=self.codebook.clone(), method="random")


class TestCodebookOfPairs(FormatConformance):
    codebook = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))

    def make(self, generator, shape):
        rows, columns = shape
        scale = Aux.compress(torch.rand(rows, -(-columns // 32), generator=generator) + 0.1, "fp16")
        codes = torch.randint(0, 64, (rows, -(-columns // 2)), generator=generator)
        more = {"codebook": self.codebook.clone(), "columns": columns, "method": "random"}
        rotation = Rotation(block) if (block := largest_block(columns, 32)) > 1 else None
        return QuantizedWeight.build(codes, scale, nbits=3, group_size=32, rotation=rotation, **more)


class TestRotated(FormatConformance):
    def make(self, generator, shape):
        weight = random_weight(shape, 3, 64, generator, permuted=True)
        rotation = Rotation.seeded(shape[1], largest_block(shape[1], 32), 1)
        return replace(weight, rotation=rotation, method="random")


class TestInputScaleInFp8(FormatConformance):
    def make(self, generator, shape):
        weight = random_weight(shape, 4, 64, generator)
        return replace(weight, input_scale=store_input_scale(weight.input_scale.float(), "fp8"), method="random")


class TestInputScaleInInt8(FormatConformance):
    def make(self, generator, shape):
        weight = random_weight(shape, 4, 64, generator, permuted=True)
        return replace(weight, input_scale=store_input_scale(weight.input_scale.float(), "int8"), method="random")


class Forgetful(QuantizedWeight):
    def with_tensors(self, named):
        return self


class Generous(QuantizedWeight):
    nbytes = property(lambda self: sum(t.nbytes for t in self.tensors().values()) - 8)


class Speechless(QuantizedWeight):
    def describe(self):
        return {key: value for key, value in super().describe().items() if key != "method"}


class Careless(QuantizedWeight):
    def dequantize(self, dtype=torch.float32):
        return super().dequantize()


@pytest.mark.parametrize(
    ("broken", "contract", "sentence"),
    [
        (Forgetful, "test_other_tensors_of_the_same_names", "the very codes_0 that it is given"),
        (Generous, "test_bytes", "must count the stored buffers"),
        (Speechless, "test_a_file_and_back", "method"),
        (Careless, "test_dequantizes_to_every_dtype", "must return that type"),
        (Forgetful, "test_is_registered", "must be registered for Forgetful"),
    ],
)
def test_a_broken_format_is_told_what_is_wrong(broken, contract, sentence):
    class Suite(TestFourBits):
        def make(self, generator, shape):
            return broken(**vars(super().make(generator, shape)))

    with pytest.raises((AssertionError, KeyError), match=sentence):
        getattr(Suite(), contract)()
