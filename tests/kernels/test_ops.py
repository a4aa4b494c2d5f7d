"""The registered ops: their CPU implementations, and what torch asks of an op."""

from __future__ import annotations

import pytest
import torch

from qbench.kernels import ops
from qbench.kernels.tiles import to_tiles
from qbench.layers.linear import QuantLinear
from tests.kernels.cases import FORMATS, random_weight, relative_error


@pytest.mark.parametrize(("nbits", "codebook"), FORMATS)
def test_cpu_implementation(generator, nbits, codebook):
    weight = random_weight((40, 200), nbits, 64, generator, codebook=codebook, permuted=True)
    bias = torch.randn(40, generator=generator)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        x = torch.randn(2, 3, 200, generator=generator).to(dtype)
        y = ops.linear(x, to_tiles(weight), bias.to(dtype))
        assert y.dtype == dtype
        assert y.shape == (2, 3, 40)
        assert relative_error(y.flatten(0, 1), x.flatten(0, 1), weight, bias.to(dtype)) < limit


def test_wrong_width(generator):
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 200\], got \[3, 100\]"):
        ops.linear(torch.randn(3, 100), to_tiles(random_weight((40, 200), 4, 64, generator)))


def test_experts(generator):
    weight = random_weight((4, 24, 200), 4, 64, generator)
    x, index = torch.randn(3, 200, generator=generator), torch.tensor([[0, 3], [2, 0], [1, 2]])
    y = ops.linear_experts(x, index, to_tiles(weight))
    expected = torch.einsum("tkoi,ti->tko", weight.dequantize()[index], x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_opcheck(generator):
    tiles = to_tiles(random_weight((40, 200), 4, 64, generator, permuted=True))
    x, bias = torch.randn(3, 200, generator=generator), torch.randn(40, generator=generator)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.dual_linear, (x, *tiles.flat(), bias), test_utils=tests)
    stack = to_tiles(random_weight((2, 24, 200), 3, 64, generator))
    index = torch.tensor([[0], [1], [1]])
    torch.library.opcheck(ops.dual_linear_experts, (x, index, *stack.flat()), test_utils=tests)
    both = (x, index, *stack.flat(), *stack.flat())
    torch.library.opcheck(ops.dual_linear_both_experts, both, test_utils=tests)


def test_whole_graph_compilation(generator):
    layer = QuantLinear(random_weight((40, 200), 4, 64, generator), torch.randn(40, generator=generator))
    layer.lay_out()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 200, generator=generator)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
