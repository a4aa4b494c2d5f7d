"""HIGGS: after a Hadamard transform weights are close to Gaussian, so round them to the best grid for a Gaussian.

    W' = W H / scale,   scale[o, g] = root mean square of the group,   codes[o, j] = the grid point nearest to W'[o, j]

(arXiv 2411.17525.) H is a block Hadamard matrix on the input channels and j counts vectors of `grid_dim` adjacent ones,
p in the paper: for 2**(p nbits) points of p numbers each, a code of p nbits bits stands for p weights. With p = 2 the
points lie where pairs are, in a disk and not in a square, which no scalar grid can do. No data, no search, no zero
points; `scale` is `[out, groups]`. The grids are the published ones, minimizers of the mean square error on N(0, I_p),
and are read from transformers: codes mean the same to other software only if the grid is the same.

Follows transformers' `quantize_with_higgs`, without signs before H as there, and gives its codes where its Hadamard
size is our `group_size`. Where group_size does not divide the input channels, that code pads them with zeros, and
stores the padding; here H takes blocks of the largest power of two that divides the input channels, up to group_size,
and groups stay `group_size` wide, the last one ragged. That code repeats a scale for every 256 channels of a block of
1024; here it is stored once. A row that is constant becomes one spike per block, which no grid point is near.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.errors import none_of
from qbench.format.aux import FP16_TINY, Aux
from qbench.format.rotation import Rotation, largest_block
from qbench.format.weight import QuantizedWeight, per_group
from qbench.quant.quantizer import InputStatistics, Quantizer

NBITS, GRID_DIMS = (2, 3, 4), (1, 2)  # of the published grids
SCORES = {"cpu": 2**18, "cuda": 2**26}  # of vectors against grid points at a time: on a CPU they stay in the cache


@dataclass(frozen=True)
class HIGGS(Quantizer):
    nbits: int = 4
    group_size: int = 256
    grid_dim: int = 2
    aux_dtype: str = "fp16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nbits not in NBITS:
            raise none_of("nbits", self.nbits, NBITS)
        if self.grid_dim not in GRID_DIMS:
            raise none_of("grid_dim", self.grid_dim, GRID_DIMS)

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> QuantizedWeight:
        width, columns = self.columns(weight), weight.shape[-1]
        block = largest_block(columns, width)
        values = Rotation(block)(weight)
        energy = torch.stack([part.square().mean(-1) for part in values.split(width, -1)], -1)  # [out, groups]
        size = energy.sqrt().clamp_min(FP16_TINY)
        scale = Aux.compress(size, self.aux_dtype)
        # as in round_to_nearest: codes are fitted to scales stored in int8; those in fp16 are close enough
        divisor = size if self.aux_dtype == "fp16" else scale.dense().clamp_min(FP16_TINY)
        values = per_group(values, width, divisor, torch.Tensor.div_)
        points = published_grid(self.grid_dim, self.nbits).to(weight.device)
        values = torch.nn.functional.pad(values, (0, -columns % self.grid_dim)).unflatten(-1, (-1, self.grid_dim))
        return QuantizedWeight.build(
            nearest_point(values, points),
            scale,
            columns=columns,
            nbits=self.nbits,
            group_size=width,
            codebook=points.squeeze(-1).clone(),  # of its own: the grid is kept for the next weight
            method="higgs",
            rotation=Rotation(block) if block > 1 else None,
        )


@functools.cache
def published_grid(grid_dim: int, nbits: int) -> Tensor:
    """The grid for N(0, I), fp32 `[2**(grid_dim nbits), grid_dim]`; ValueError if this transformers has none."""
    try:
        from transformers.integrations.higgs import get_higgs_grid
    except ImportError as error:
        raise ValueError(f"higgs reads its grids from transformers, and this one has none: {error}") from None
    return get_higgs_grid(grid_dim, 2 ** (grid_dim * nbits)).float()


def nearest_point(vectors: Tensor, points: Tensor) -> Tensor:
    """For vectors `[..., p]` the index (uint8, `[...]`) of the nearest of points `[n, p]`, the first of equals."""
    norms, flat = points.square().sum(-1), vectors.reshape(-1, points.shape[1])
    step = SCORES["cuda" if vectors.is_cuda else "cpu"] // len(points)
    found = [(2 * part @ points.T - norms).argmax(-1).to(torch.uint8) for part in flat.split(step)]
    return torch.cat(found).view(vectors.shape[:-1])
