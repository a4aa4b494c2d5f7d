"""What a result's rows say of a weight and of what it was quantized to, as numbers that are still on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.format.aux import dense_input_scale
from qbench.format.format import Format
from qbench.format.weight import QuantizedWeight
from qbench.layers.linear import relative_error
from qbench.quant import gpu
from qbench.quant.diagnostics import kurtosis, mean_imbalance


def measured(weight: Tensor, quantized: Format) -> dict[str, Tensor]:
    """By field of a row, `[matrices]`, for a weight `[out, in]` or a stack, which the kernels take as one."""
    if gpu.fused(weight, quantized.group_size):
        return _by_kernels(weight, quantized)
    if weight.ndim == 3:
        each = [measured(one, quantized.select(i)) for i, one in enumerate(weight)]
        return {key: torch.cat([one[key] for one in each]) for key in each[0]}
    t, wide = quantized.tensors().get("input_scale"), weight.float()
    rotation = getattr(quantized, "rotation", None)
    basis = wide if rotation is None else rotation(wide)
    basis = basis if t is None else basis / dense_input_scale(t)
    numbers = {
        "relative_error": relative_error(wide, quantized),
        "imbalance_before": mean_imbalance(wide, quantized.group_size),
        "kurtosis_before": (tails := kurtosis(wide)),
        "kurtosis_after": tails if t is None and rotation is None else kurtosis(basis),
    }
    return {key: number.view(1) for key, number in numbers.items()}


def _by_kernels(weight: Tensor, quantized: Format) -> dict[str, Tensor]:
    from qbench.kernels import packed as kernels

    stack, width = weight if weight.ndim == 3 else weight.unsqueeze(0), quantized.group_size
    stored, rotation = quantized.tensors().get("input_scale"), getattr(quantized, "rotation", None)
    t = None if stored is None else dense_input_scale(stored).view(len(stack), -1)
    readable = isinstance(quantized, QuantizedWeight) and kernels.readable(quantized)
    numbers = kernels.describe(stack, width, t if rotation is None else None, quantized if readable else None)
    if not readable:
        error = (weight - quantized.dequantize()).view(stack.shape)  # in fp32
        error, norm = (torch.linalg.vector_norm(values.float(), dim=(1, 2)) for values in (error, stack))
        numbers["relative_error"] = torch.where(norm > 0, error / norm, error)
    if rotation is not None:
        numbers["kurtosis_after"] = kernels.describe(rotation(stack).contiguous(), width, t, None)["kurtosis_after"]
    return numbers
