"""Writes out what packed weights stand for: into the parameters of transformers' own modules, which then run as these.

On a GPU a kernel reads the codes once and writes the dense weights once; another format, or a device without kernels,
takes what `Format.dequantize` gives, a few experts at a time.
"""

from __future__ import annotations

from torch import Tensor

from qbench.format.format import Format
from qbench.format.stack import part
from qbench.format.weight import QuantizedWeight
from qbench.quant import gpu

PART_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}  # of a stack's weights in fp32 that are dequantized at a time


def write(weight: Format, out: Tensor) -> None:
    """Fills `out` `[..., out, in]`, of any strides, with the weights in its dtype, as `dequantize` gives them."""
    if gpu.enabled(out) and isinstance(weight, QuantizedWeight):
        from qbench.kernels import packed as kernels

        if kernels.readable(weight):
            kernels.restore(weight, out)
            return
    if out.ndim == 2:
        out.copy_(weight.dequantize(out.dtype))
        return
    step = max(1, PART_BYTES["cuda" if out.is_cuda else "cpu"] // (4 * out[0].numel()))
    for at in range(0, len(out), step):
        some = slice(at, min(at + step, len(out)))
        out[some].copy_(part(weight, some).dequantize(out.dtype))
