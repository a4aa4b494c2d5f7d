"""X^T X of a layer's input `[tokens, in]`, on tensor cores where the activations have 16 bits.

The product of two numbers of 16 bits is exact in fp32, so what is lost is lost in the sums, which are fp32. For 16,384
rows and 2,048, 4,096 and 12,288 columns the error of an entry H_ij reached 1.0e-4 of sqrt(H_ii H_jj) against fp64 on an
H100, and 8.6e-6 without tensor cores. Sums come out low, the lower the longer: the diagonal by 1.2e-5 on average for
4,096 rows of one product, 6.2e-5 for 16,384, 3.0e-4 for 65,536. So products are of ROWS rows at most; GPTQ damps H by a
hundred times as much.

H is symmetric: of the 16-bit product only the blocks on and above the diagonal are computed, a panel of rows of H at a
time, and `complete` fills in the others. All else (fp32 activations, a CPU) is one plain product in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 2048  # rows of H at a time: 7/12 of the product at 12288 columns, 3/4 at 4096
ROWS = 16384  # of X at a time
LARGEST_ERROR = 2e-4  # of H_ij, as above; tested
NARROW = (torch.bfloat16, torch.float16)


def narrow(rows: Tensor) -> bool:
    """Whether X^T X of these rows is taken on tensor cores."""
    return rows.is_cuda and rows.dtype in NARROW


def add(gram: Tensor, rows: Tensor) -> None:
    """Adds X^T X to fp32 `gram` `[in, in]`, for rows X `[tokens, in]`; `complete` makes whole what narrow rows gave."""
    if not narrow(rows):
        gram.addmm_(rows.float().T, rows.float())
        return
    for some in rows.split(ROWS):
        for start in range(0, len(gram), PANEL):
            panel = some[:, start : start + PANEL].T
            sums = gram[start : start + PANEL, start:]
            torch.addmm(sums, panel, some[:, start:], out_dtype=torch.float32, out=sums)


def complete(gram: Tensor) -> Tensor:
    """Itself, with what is below the panels' diagonal blocks copied from above; of a whole one nothing changes."""
    for start in range(PANEL, len(gram), PANEL):
        gram[start : start + PANEL, :start] = gram[:start, start : start + PANEL].T
    return gram
