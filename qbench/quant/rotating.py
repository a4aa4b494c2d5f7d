"""Quantizing in a rotated basis: what `rotation=hadamard` does for any method that makes a weight of dual-scale.

An orthogonal R on the input channels changes nothing before rounding, W x = (W R)(R^T x), and gives every weight of a
block a share of its outliers, so that min/max grids are stretched less (QuIP, arXiv 2307.13304; QuaRot, arXiv
2404.00456). The method is shown W R `[out, in]`, and R^T H R `[in, in]` where it needs the Hessian of the input; the
format stores R and gives the weight back in its own basis. The block is the largest power of two that divides the
input channels, up to `rotation_block`; a weight with an odd number of them is quantized as it is, which the method in
effect then says. All linears with as many input channels share the signs that `rotation_seed` draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from qbench.format.rotation import Rotation, largest_block
from qbench.format.weight import QuantizedWeight
from qbench.quant import gpu
from qbench.quant.quantizer import InputStatistics, Quantizer

ROTATIONS = ("hadamard",)


@dataclass(frozen=True)
class RotatingQuantizer(Quantizer):
    """Base of a method that writes `quantize_basis`; ValueError for a rotation that there is not."""

    rotation: str | None = None
    rotation_block: int = 1024
    rotation_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotation is not None and self.rotation not in ROTATIONS:
            raise ValueError(f"rotation must be null or {', '.join(ROTATIONS)}, got {self.rotation!r}")
        if self.rotation_block < 2 or self.rotation_block & (self.rotation_block - 1):
            raise ValueError(f"rotation_block must be a power of two from 2 on, got {self.rotation_block}")
        if not 0 <= self.rotation_seed < 2**63:
            raise ValueError(f"rotation_seed must lie in 0 .. 2**63 - 1, got {self.rotation_seed}")

    @property
    def seed_field(self) -> str | None:
        return "rotation_seed" if self.rotation is not None else None

    def quantize_basis(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[QuantizedWeight]:
        """Quantizes the weights `[out, in]` of one linear group in the basis that they are given in."""
        raise TypeError(f"{type(self).__name__} must define quantize_basis")

    def quantize(self, weights: Sequence[Tensor], stats: InputStatistics | None) -> list[QuantizedWeight]:
        """Quantizes the weights `[out, in]` of one linear group, rotated if that is asked for."""
        columns = weights[0].shape[-1]
        block = 1 if self.rotation is None else largest_block(columns, self.rotation_block)
        if block == 1:
            return self.quantize_basis(weights, stats)
        rotation = Rotation.seeded(columns, block, self.rotation_seed, weights[0].device)
        if stats is not None and stats.hessian is not None and len(stats.hessian) == columns:
            stats = replace(stats, hessian=rotation(rotation(stats.hessian.to(weights[0].device)).T))
        found = self.quantize_basis([rotated(weight, rotation) for weight in weights], stats)
        # signs of its own for each weight: what a layer holds is its own, and counted there
        rotations = [replace(rotation, signs=rotation.signs.clone()) for _ in found]
        return [
            replace(one, rotation=own, method=f"{one.method}-hadamard{block}")
            for one, own in zip(found, rotations, strict=True)
        ]

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> QuantizedWeight:
        return self.quantize([weight], stats)[0]


def rotated(weight: Tensor, rotation: Rotation) -> Tensor:
    """W R, fp32 `[out, in]`: to the bit the same by the kernel, which reads and writes a weight once."""
    if not gpu.enabled(weight):
        return rotation(weight)
    from qbench.kernels import hadamard

    return hadamard.rotate(weight.float(), rotation) if rotation.block <= hadamard.LARGEST_BLOCK else rotation(weight)
