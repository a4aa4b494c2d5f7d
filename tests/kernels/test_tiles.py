"""The kernels' layout: exact both ways, no bit more than the packed format."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qbench.format.aux import Aux
from qbench.kernels import tiles as layout
from qbench.kernels.tiles import from_tiles, to_tiles, unsupported
from qbench.layers.linear import PackedWeight, QuantLinear, backend
from tests.kernels.cases import FORMATS, random_weight


@pytest.mark.parametrize(("nbits", "codebook"), FORMATS)
def test_round_trip(generator, nbits, codebook):
    for shape, group_size in (((40, 200), 32), ((16, 128), 64), ((33, 577), 128), ((3, 20, 300), 256), ((5, 96), 1000)):
        for zero in (True, False):
            for aux_dtype in ("fp16", "int8"):
                weight = random_weight(
                    shape,
                    nbits,
                    group_size,
                    generator,
                    codebook=codebook,
                    zero=zero,
                    permuted=zero,
                    aux_dtype=aux_dtype,
                )
                again = from_tiles(to_tiles(weight), weight)
                for name, tensor in weight.tensors().items():
                    assert torch.equal(tensor, again.tensors()[name]), (name, shape, group_size)
                if aux_dtype == "fp16":
                    assert torch.equal(layout.dequantize(to_tiles(weight)), weight.dequantize())


def test_a_file_s_own_types(generator):
    """Zero points that a file stores in 8 bits come back as such; scales that fp16 might not hold are refused."""
    weight = random_weight((33, 128), 4, 32, generator, zero=True)
    whole = replace(weight, zero=Aux(weight.zero.dense().round().clamp(0, 15).to(torch.uint8)))
    again = from_tiles(to_tiles(whole), whole)
    assert again.zero.stored.dtype == torch.uint8
    assert torch.equal(again.zero.stored, whole.zero.stored)
    assert torch.equal(layout.dequantize(to_tiles(whole)), whole.dequantize())
    wide = replace(weight, scale=Aux(weight.scale.dense().bfloat16()))
    assert unsupported(wide) == "scales in bfloat16"
    assert backend(wide, torch.float16) == "dequantize + matmul"


@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
def test_as_small_as_the_packed_format(generator, nbits):
    weight = random_weight((64, 512), nbits, 64, generator)
    assert to_tiles(weight).nbytes == weight.nbytes


def test_every_code_bit_has_one_place():
    for nbits in (2, 3, 4, 8):
        places = [p for code in layout.fields(nbits, False) for p in code]
        bits = {(word, bit + i) for word, bit, _, width in places for i in range(width)}
        assert bits == {(word, bit) for word in range(nbits) for bit in range(32)}
        assert all(sum(width for *_, width in code) == nbits for code in layout.fields(nbits, False))


def test_refusals(generator):
    assert unsupported(random_weight((8, 96), 4, 64, generator)) is None
    odd = random_weight((8, 96), 4, 48, generator)
    assert "groups of 48" in unsupported(odd)
    with pytest.raises(ValueError, match="groups of 48"):
        to_tiles(odd)
    module = PackedWeight(odd)
    assert not module.lay_out()
    assert module.layout is None
    assert backend(odd, torch.float16) == "dequantize + matmul"


@pytest.mark.parametrize("aux_dtype", ["fp16", "int8"])
def test_a_layer_there_and_back(generator, aux_dtype):
    weight = random_weight((40, 200), 4, 64, generator, permuted=True, aux_dtype=aux_dtype)
    layer = QuantLinear(weight, torch.randn(40, generator=generator))
    x = torch.randn(5, 200, generator=generator)
    before, nbytes = layer(x), weight.nbytes
    assert layer.lay_out()
    assert layer.format.nbytes == nbytes
    assert "codes_0" not in dict(layer.named_buffers())
    assert (layer(x) - before).norm() / before.norm() < 2e-3  # an int8 aux becomes fp16
    for name, tensor in layer.quantized.tensors().items():
        assert torch.equal(tensor, weight.tensors()[name]), name
    layer.restore()
    assert torch.equal(layer(x), before)
    assert dict(layer.named_buffers()).keys() == weight.tensors().keys()
