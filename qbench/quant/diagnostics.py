"""What a weight looks like to a quantizer: how uneven its rows and columns are, how heavy its tails."""

from __future__ import annotations

import torch
from torch import Tensor


def std(values: Tensor, dim: int) -> Tensor:
    """Sample standard deviation (n - 1) along `dim`; 0, not NaN, where there is a single value."""
    return values.std(dim, correction=1 if values.shape[dim] > 1 else 0)


def imbalance(tiles: Tensor) -> Tensor:
    """SINQ's proxy of quantization difficulty (arXiv 2509.22944, section 2): `[..., rows, columns]` -> `[...]`.

    The largest standard deviation of a row or a column over the smallest; 1 is perfectly balanced.
    """
    rows, columns = std(tiles, -1), std(tiles, -2)
    high = torch.maximum(rows.amax(-1), columns.amax(-1))
    low = torch.minimum(rows.amin(-1), columns.amin(-1))
    return high / low.clamp_min(1e-12)


def column_tiles(weight: Tensor, width: int) -> list[Tensor]:
    """Cuts `[out, in]` into tiles of all rows x `width` columns: `[tiles, out, width]`, then the ragged one."""
    full = weight.shape[1] // width * width
    blocks = []
    if full:
        blocks.append(weight[:, :full].unflatten(1, (-1, width)).transpose(0, 1).contiguous())
    if full < weight.shape[1]:
        blocks.append(weight[:, full:].unsqueeze(0).contiguous())
    return blocks


def mean_imbalance(weight: Tensor, width: int) -> Tensor:
    """Geometric mean of the imbalance over the weight's tiles of `width` columns; one element."""
    return torch.cat([imbalance(t) for t in column_tiles(weight.float(), width)]).log().mean().exp()


def kurtosis(weight: Tensor) -> Tensor:
    """Pearson kurtosis over all values (3 for a Gaussian); 0 for a constant weight; one element."""
    wide = weight.float()
    squares = (wide - wide.mean()).square()
    variance = squares.mean()
    return torch.where(variance > 0, squares.square().mean() / variance.square(), 0.0)
