"""Routes: the (token, expert) pairs of a mixture's layer, sorted by expert without asking the GPU what they are.

    route(index [tokens, k], experts, rows) -> Routes

Every shape follows from the number of pairs, so that a CUDA graph may hold what is made here. The pairs of an expert
stand one after the other; `slots` cut them into tiles of at most `rows` pairs, which is how a product over experts is
launched: expert e has the slots from starts[e] // rows + e up to starts[e + 1] // rows + e, which are always enough, so
that a slot is found from its expert's start alone and some slots are empty. Indices of `experts` and above mark experts
that live elsewhere (transformers); their pairs come last and belong to no slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SLOT_ROWS = (16, 32, 64, 128, 192)
SCANNED_PAIRS = 2**15  # up to as many, one launch in which every expert looks through all pairs; above it, a sort


@dataclass(frozen=True)
class Routes:
    """All tensors int32. A place is a position in the sorted order."""

    token: Tensor  # [pairs] of the pair at a place
    expert: Tensor  # [pairs] of the pair at a place; of those that live elsewhere, the last one
    row: Tensor  # [pairs] slot * rows + the place within the slot; -1 for those that live elsewhere
    place: Tensor  # [pairs] of a pair, token by token
    starts: Tensor  # [experts + 1] the first place of each expert; the last number is how many pairs are here
    slots: Tensor  # [slots, 3] expert, first place, pairs
    rows: int  # of a slot

    def flat(self) -> list[Tensor]:
        """Its tensors, which is how they pass through the ops."""
        return [self.token, self.expert, self.row, self.place, self.starts, self.slots]

    @staticmethod
    def over(tensors: Sequence[Tensor], rows: int) -> Routes:
        """What `flat` took apart."""
        return Routes(*tensors, rows)

    @property
    def experts(self) -> int:
        return len(self.starts) - 1


def slot_rows(pairs: int, experts: int) -> int:
    """Rows of a slot that holds most experts' pairs whole, if they are sent to all experts alike."""
    return next((rows for rows in SLOT_ROWS if 4 * pairs <= 3 * rows * experts), SLOT_ROWS[-1])


def route(index: Tensor, experts: int, rows: int | None = None) -> Routes:
    """Sorts the pairs of index `[tokens, k]`; equal experts keep the order of their tokens."""
    rows = slot_rows(index.numel(), experts) if rows is None else rows
    return Routes.over(routes(index, experts, rows), rows)


def _sorted(index: Tensor, experts: int, rows: int) -> list[Tensor]:
    flat, per_token, device = index.flatten().clamp_max(experts), index.shape[-1], index.device
    found, order = torch.sort(flat, stable=True)
    starts = torch.searchsorted(found, torch.arange(experts + 1, device=device))
    places = torch.arange(len(flat), device=device)
    expert = found.clamp_max(experts - 1)
    first_slot = starts[:-1] // rows + torch.arange(experts, device=device)
    row = torch.where(found < experts, rows * first_slot[expert] + places - starts[expert], -1)
    slots = torch.arange(_slots(len(flat), experts, rows), device=device)
    owner = torch.searchsorted(first_slot, slots, right=True) - 1
    first = starts[owner] + rows * (slots - first_slot[owner])
    held = (starts[owner + 1] - first).clamp(0, rows)
    made = [order // per_token, expert, row, torch.empty_like(order).scatter_(0, order, places), starts]
    return [part.int() for part in [*made, torch.stack([owner, first, held], -1)]]


@torch.library.custom_op("qbench::routes", mutates_args=())
def routes(index: Tensor, experts: int, rows: int) -> list[Tensor]:
    """The op behind `route`; what `Routes.flat` gives."""
    return _sorted(index, experts, rows)


@routes.register_fake
def _(index, experts, rows):
    return _empty(index, experts, rows)


@routes.register_kernel("cuda")
def _(index, experts, rows):
    if index.numel() > SCANNED_PAIRS or not has_triton():
        return _sorted(index, experts, rows)
    from qbench.kernels import triton_experts

    made = _empty(index, experts, rows)
    triton_experts.route(index, experts, rows, made)
    return made


def _slots(pairs: int, experts: int, rows: int) -> int:
    return pairs // rows + experts


def _empty(index: Tensor, experts: int, rows: int) -> list[Tensor]:
    pairs = index.numel()
    shapes = [(pairs,)] * 4 + [(experts + 1,), (_slots(pairs, experts, rows), 3)]
    return [index.new_empty(shape, dtype=torch.int32) for shape in shapes]


def has_triton() -> bool:
    from torch.utils._triton import has_triton_package

    return has_triton_package()
