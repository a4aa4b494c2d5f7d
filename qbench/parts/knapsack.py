"""The multiple-choice knapsack: one choice for each item, so that the costs fit and the losses are least.

By dynamic programming over the cost, which is exact: costs are counted in their greatest common divisor, or, where that
makes more than MOST_UNITS of them, in units that are rounded up, so that what is chosen never costs more than allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MOST_UNITS = 50_000


def choose(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], capacity: int) -> list[int]:
    """The place of the choice for each item; `losses[i][j]` and `costs[i][j]` are those of choice `j` of item `i`.

    Raises ValueError when the cheapest choices cost more than `capacity`.
    """
    least = sum(min(each) for each in costs)
    if least > capacity:
        raise ValueError(f"the cheapest choices cost {least}, the capacity is {capacity}")
    unit = math.gcd(*(cost for each in costs for cost in each))
    unit = max(unit, math.ceil((capacity - least) / MOST_UNITS), 1)
    # beyond the cheapest choice of each item, which is paid for anyway
    extra = [[math.ceil((cost - min(each)) / unit) for cost in each] for each in costs]
    room = (capacity - least) // unit
    best = np.zeros(room + 1)  # of the items so far, by what may be spent on them
    taken = np.zeros((len(losses), room + 1), np.int8)
    for i, (loss, cost) in enumerate(zip(losses, extra, strict=True)):
        options = np.full((len(loss), room + 1), np.inf)
        for j, (lost, spent) in enumerate(zip(loss, cost, strict=True)):
            if spent <= room:
                options[j, spent:] = best[: room + 1 - spent] + lost
        taken[i] = options.argmin(0)
        best = options.min(0)
    left, chosen = room, []
    for i in reversed(range(len(losses))):
        chosen.append(int(taken[i, left]))
        left -= extra[i][chosen[-1]]
    return chosen[::-1]
