"""The residual stream in another basis, x Q: what of a block, and of what lies around the blocks, has to change.

What reads the stream does so through norms that divide by the root mean square, which a rotation does not change. Their
gains go into the readers, W diag(gain) Q, since a gain acts on channels of the old basis. What writes to the stream
writes in the new one, Q^T W. All linears and fused experts that give out as many channels as the stream has, and read
no norm, are taken for writers; that this is so is verified.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qbench.layers.expert_form import stacked_parameters
from qbench.model.linears import matrix
from qbench.transforms.block import Tensors, on_inputs, on_outputs, transposed, upright
from qbench.transforms.observe import Observed


def readers(observed: Observed, module: nn.Module, channels: int) -> dict[str, tuple[str, ...]]:
    """Norm of the residual stream -> what reads it."""
    return {n.name: n.readers for n in observed.norms if module.get_submodule(n.name).weight.numel() == channels}


def turned_block(block: nn.Module, observed: Observed, basis: Tensor) -> Tensors:
    """The parameters of a block, in fp32, that reads and writes x Q, `basis` being Q `[channels, channels]`."""
    channels, reading = len(basis), {reader for norm in observed.norms for reader in norm.readers}
    tensors = without_gains(block, observed, basis)
    for name, module in block.named_modules():
        if name in reading and not stacked_parameters(module):
            continue
        if stacked_parameters(module):
            down = upright(module, module.down_proj.detach())
            tensors[f"{name}.down_proj"] = upright(module, basis.T @ down).contiguous()
            if getattr(module, "down_proj_bias", None) is not None:
                tensors[f"{name}.down_proj_bias"] = module.down_proj_bias @ basis
        elif (isinstance(module, nn.Linear) or transposed(module)) and len(matrix(module)) == channels:
            tensors |= on_outputs(block, name, lambda weight: basis.T @ weight)
    return tensors


def without_gains(part: nn.Module, observed: Observed, basis: Tensor) -> Tensors:
    """Norms of the stream without their gains, which their readers have instead, in the new basis."""
    tensors: Tensors = {}
    for norm in observed.norms:
        weight = part.get_submodule(norm.name).weight.detach()
        if len(weight) != len(basis):
            continue
        tensors[f"{norm.name}.weight"] = torch.full_like(weight, 1 - norm.shift)
        for name in norm.readers:
            tensors |= on_inputs(part, name, lambda w, gain=weight + norm.shift: (w * gain) @ basis)
    return tensors
