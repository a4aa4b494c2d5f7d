"""Unit upper factors of Hessians, as GPTQ uses them: of one, and of a batch on a GPU.

H = R R^T with an upper R, the Cholesky factor of H read backwards; R~ is R with its columns divided by its diagonal.
With w what a row holds and q what it is rounded to, the squared error of the output is then

    (w - q) H (w - q)^T = sum over k of R[k, k]^2 ((w - q)[k] + sum over i < k of (w - q)[i] R~[i, k])^2

so column k is rounded from w[k] plus the inner sum. GPTQ's own form corrects by the error of the column as corrected,
times the inverse of R~. The columns are the same (QuIP, arXiv 2307.13304, shows it), and no inverse is needed.

The libraries factor one matrix after the other, or a batch of small ones. A layer may have 128 experts with Hessians
of 2,048 columns: here the blocks on all their diagonals are factored together, and batched products do the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING_TRIES = 4
LEAST_RETRY = 1e-3  # damping of the first retry at least: ten times zero would change nothing
BLOCK = 256  # on the diagonal, left to the library
WIDE = 512  # columns that are corrected at a time: what lies above the diagonal in them is computed for nothing


def unit_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """U / diag(U), fp32 `[in, in]`, for (H + damping * I)^-1 = U^T U, H scaled to a mean diagonal of 1.

    It is the inverse of R~; this way H^-1 is never formed. Returns the damping that worked too; each failure multiplies
    it by ten, and the last raises ValueError.
    """
    share = damping
    for _ in range(DAMPING_TRIES):
        damped = hessian.flip(0, 1)  # a copy
        damped.diagonal().add_(share)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            # cheaper than scaling afterwards: R with its columns divided by its diagonal has a unit inverse
            upper = lower.flip(0, 1)
            del lower  # these are the largest things a layer needs: no more of them at once than must be
            upper /= upper.diagonal().clone()
            unit = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            torch.linalg.solve_triangular(upper, unit, upper=True, unitriangular=True, out=unit)
            return unit.float(), share
        tried, share = share, max(10 * share, LEAST_RETRY)
    raise ValueError(_hopeless(tried))


def unit_factors(backwards: Tensor, damping: float, inverse: bool = False) -> tuple[Tensor, list[float]]:
    """R~ `[n, in, in]` of Hessians that are given read backwards, rows and columns, each of a mean diagonal of 1.

    Below the diagonal R~ means nothing. With `inverse`, of each its inverse instead. Damping as in `unit_factor`, each
    Hessian's own; it is added to `backwards`.
    """
    shares, diagonals = [damping] * len(backwards), backwards.diagonal(dim1=1, dim2=2)
    diagonals.add_(damping)
    for _ in range(DAMPING_TRIES):
        lower, failed = cholesky(backwards)
        if not failed.any():
            upper = lower.flip(1, 2).contiguous()  # the library's factors are stored by columns
            del lower  # as above
            upper /= upper.diagonal(dim1=1, dim2=2).clone()[:, None]
            return _inverse(upper) if inverse else upper, shares
        tried, shares = shares, [
            max(10 * share, LEAST_RETRY) if bad else share for share, bad in zip(shares, failed.tolist(), strict=True)
        ]  # fmt: skip
        more = [new - old for new, old in zip(shares, tried, strict=True)]
        diagonals.add_(diagonals.new_tensor(more)[:, None])
    raise ValueError(_hopeless(max(share for share, new in zip(tried, shares, strict=True) if new != share)))


def cholesky(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factors of `[n, in, in]`, of which the lower halves are read, and whether each failed, bool `[n]`.

    What is above a factor's diagonal means nothing. A single matrix goes to the library whole.
    """
    if len(matrices) == 1:
        lower, info = torch.linalg.cholesky_ex(matrices)
        return lower, info != 0
    lower, columns = matrices.clone(), matrices.shape[-1]
    failed = torch.zeros(len(matrices), dtype=torch.bool, device=matrices.device)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        corner, info = torch.linalg.cholesky_ex(lower[:, start:stop, start:stop])
        failed |= info != 0
        lower[:, start:stop, start:stop] = corner
        if stop == columns:
            break
        unit = torch.eye(stop - start, dtype=lower.dtype, device=lower.device).expand_as(corner)
        inverse = torch.linalg.solve_triangular(corner, unit, upper=False)
        panel = lower[:, stop:, start:stop] @ inverse.mT
        lower[:, stop:, start:stop] = panel
        for left in range(0, columns - stop, WIDE):
            part = panel[:, left : left + WIDE]
            lower[:, stop + left :, stop + left : stop + left + WIDE].baddbmm_(panel[:, left:], part.mT, alpha=-1)
    return lower, failed


def _inverse(units: Tensor) -> Tensor:
    """Of unit upper factors `[n, in, in]`."""
    identity = torch.eye(units.shape[-1], dtype=units.dtype, device=units.device)
    return torch.stack([torch.linalg.solve_triangular(one, identity, upper=True, unitriangular=True) for one in units])


def _hopeless(share: float) -> str:
    return f"the Hessian is not positive definite, not even damped by {share:g} of its mean diagonal"
