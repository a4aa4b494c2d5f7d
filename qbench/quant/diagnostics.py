"""What a weight looks like to a quantizer: how uneven its rows and columns are, how heavy its tails."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 19  # tiles worked on together on a CPU: in double precision they stay in cache


def std(values: Tensor, dim: int) -> Tensor:
    """Sample standard deviation (n - 1) along `dim`; 0, not NaN, where there is a single value.

    torch.std of fp32 adds up in fp64 on a CPU, value by value; two passes over fp64 give the same fp32 numbers in a
    fifth of the time.
    """
    count = values.shape[dim]
    if values.device.type != "cpu" or values.dtype != torch.float32 or count < 2:
        return values.std(dim, correction=1 if count > 1 else 0)
    wide = values.double()
    return (wide - wide.mean(dim, keepdim=True)).square_().sum(dim).div_(count - 1).sqrt_().float()


def imbalance(tiles: Tensor) -> Tensor:
    """SINQ's proxy of quantization difficulty (arXiv 2509.22944, section 2): `[..., rows, columns]` -> `[...]`.

    The largest standard deviation of a row or a column over the smallest; 1 is perfectly balanced.
    """
    return spread(std(tiles, -1), std(tiles, -2))


def spread(rows: Tensor, columns: Tensor) -> Tensor:
    """The imbalance from the standard deviations of the rows `[..., rows]` and of the columns `[..., columns]`."""
    high = torch.maximum(rows.amax(-1), columns.amax(-1))
    low = torch.minimum(rows.amin(-1), columns.amin(-1))
    return high / low.clamp_min(1e-12)


def chunks(tiles: Tensor) -> tuple[Tensor, ...]:
    """Tiles `[n, rows, columns]`, as many at a time as one works on best: on a GPU all."""
    return tiles.split(len(tiles) if tiles.is_cuda else max(1, CHUNK_BYTES // tiles[0].nbytes))


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
    tiles = column_tiles(weight.float(), width)
    return torch.cat([imbalance(part) for t in tiles for part in chunks(t)]).log().mean().exp()


def kurtosis(weight: Tensor) -> Tensor:
    """Pearson kurtosis over all values (3 for a Gaussian); 0 for a constant weight; one element."""
    wide = weight.float()
    squares = (wide - wide.mean()).square()
    variance = squares.mean()
    return torch.where(variance > 0, squares.square().mean() / variance.square(), 0.0)
