"""A stack of experts is quantized to the bits that its matrices have when they are quantized one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qbench.format.stack import concat
from qbench.layers.dense import write
from qbench.plugins.fp8 import FP8
from qbench.plugins.hqq import HQQ
from qbench.plugins.mxfp4 import MXFP4, MXFP8
from qbench.plugins.nf4 import FP4, NF4
from qbench.plugins.nvfp4 import NVFP4
from qbench.plugins.rtn import RTN
from qbench.plugins.sinq import SINQ
from qbench.quant.quantizer import Quantizer
from qbench.testing import same

METHODS = [
    RTN(),
    RTN(nbits=3, symmetric=True, aux_dtype="int8"),
    RTN(group_size=-1, rotation="hadamard"),
    NF4(group_size=32, aux_dtype="int8"),
    FP4(),
    HQQ(nbits=3),
    HQQ(aux_dtype="int8", group_size=32),
    SINQ(),
    SINQ(nbits=2, symmetric=True, aux_dtype="int8", group_size=32),
    SINQ(inner="hqq", t_dtype="fp8"),
    SINQ(codebook="nf4", t_dtype="int8", rotation="hadamard"),
    SINQ(shared_t=True, nbits=3),
    FP8(),
    FP8(scale="tensor"),
    FP8(scale="block"),
    MXFP4(),
    MXFP8(exponent="ceil"),
    NVFP4(),
]


def told(quantizer: Quantizer) -> str:
    own = {key: value for key, value in quantizer.settings().items() if value != getattr(type(quantizer), key, None)}
    return "-".join([type(quantizer).__name__, *(f"{key}={value}" for key, value in own.items())])


def stacks(experts: int, rows: int, columns: int, device: str = "cpu") -> list[Tensor]:
    """gate and up as views of one parameter, as a mixture holds them; matrices of very different sizes."""
    generator = torch.Generator().manual_seed(rows)
    sizes = [
        (0.7 * torch.randn(*size, generator=generator)).exp() for size in ((experts, 1, 1), (2 * rows, 1), (columns,))
    ]
    both = torch.randn(experts, 2 * rows, columns, generator=generator) * 0.05 * sizes[0] * sizes[1] * sizes[2]
    both[0, 3] = 0
    both[-1, 4, : columns // 2] = 0.7
    return list(both.bfloat16().to(device).chunk(2, 1))


def check_equal(quantizer: Quantizer, weights: list[Tensor]) -> None:
    assert quantizer.stacks
    names = [[f"{e}.{projection}" for e in range(len(weights[0]))] for projection in ("gate", "up")]
    made = quantizer.quantize_stacks(names, weights)
    for e in range(len(weights[0])):
        alone = quantizer.quantize_layers([of[e] for of in names], [weight[e] for weight in weights], None)
        for stack, one in zip(made, alone, strict=True):
            assert stack.shape == (len(weights[0]), *one.shape)
            assert same(stack.select(e), one), f"matrix {e}"
            assert stack.method == one.method
            assert {key: float(value[e]) for key, value in stack.diagnostics.items()} == one.diagnostics
    whole, parts = (
        made[0],
        [quantizer.quantize_stacks(names, [w[at] for w in weights])[0] for at in (slice(2), slice(2, None))],
    )
    assert same(concat(parts), whole)
    assert concat(parts).shape == whole.shape


@pytest.mark.parametrize("quantizer", METHODS, ids=told)
def test_every_matrix_is_what_it_is_alone(quantizer):
    check_equal(quantizer, stacks(3, 40, 96))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantizer", METHODS, ids=told)
@pytest.mark.parametrize(("experts", "rows", "columns"), [(5, 1536, 1024), (9, 768, 2048), (4, 200, 100)])
def test_every_matrix_is_what_it_is_alone_on_a_gpu(quantizer, experts, rows, columns):
    if columns == 100 and getattr(quantizer, "rotation", None):
        pytest.skip("a tail of groups is tested without a rotation")
    check_equal(quantizer, stacks(experts, rows, columns, "cuda"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("quantizer", [RTN(nbits=3), SINQ(), NF4(), MXFP4(), RTN(rotation="hadamard")], ids=told)
def test_a_stack_is_written_out_as_it_dequantizes(quantizer, device):
    for weight in stacks(3, 40, 96, device):
        stack = quantizer.quantize([weight], None)[0]
        transposed = torch.empty(3, 96, 80, dtype=torch.bfloat16, device=device)
        write(stack, transposed.mT[:, ::2])  # as gpt-oss holds gate and up
        assert torch.equal(transposed.mT[:, ::2], stack.dequantize(torch.bfloat16))
