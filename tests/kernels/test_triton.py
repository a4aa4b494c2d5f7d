"""The Triton kernels, in Triton's interpreter where there is no GPU (fp16: it does not know bf16)."""

from __future__ import annotations

import os

import pytest
import torch

from qbench.kernels.tiles import to_tiles
from tests.kernels.cases import FORMATS, random_weight, relative_error

pytest.importorskip("triton", reason="Triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)


@pytest.mark.parametrize(("nbits", "codebook"), FORMATS)
def test_linear_and_dequantize(generator, nbits, codebook):
    from qbench.kernels import triton_linear

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for group_size, columns, permuted in ((32, 130, True), (256, 160, False)):
        weight = random_weight((40, columns), nbits, group_size, generator, codebook=codebook, permuted=permuted)
        weight = weight.with_tensors({name: tensor.to(device) for name, tensor in weight.tensors().items()})
        tiles, x = to_tiles(weight), torch.randn(3, columns, generator=generator).half().to(device)
        assert relative_error(triton_linear.linear(x, tiles), x, weight) < 1e-3
        expected = weight.dequantize()
        if permuted:
            expected = expected[:, weight.permutation.long()]
        assert torch.equal(triton_linear.dequantize(tiles, torch.float32), expected)
