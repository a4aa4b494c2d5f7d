"""How a problem is cut into blocks of dual_linear.cu, wide_linear.cu and prompt_linear.cu: tuned per GPU, else by rule.

`benchmarks/tune.py` writes plans/GPU.json; nothing is tuned while the library runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch

from qbench.kernels.tiles import COLUMNS, ROWS, Tiles, chunk_bytes

BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # batches that share a tuned entry: up to 1, 8, ...
NARROW = 16  # rows of x up to which the rule takes dual_linear.cu
WIDE = 512  # and up to which wide_linear.cu
PROMPT = 4096  # and, where 256 of them fill tiles, prompt_linear.cu; else writing W and cuBLAS
SUMMED = 8  # pairs of a token that a block adds up, two warps each
MULTIPROCESSORS = 132  # of an H100 or H200; for the rules alone
LARGEST_SHARED = 227 << 10  # bytes of a block on Hopper


def x_record_bytes(batch_blocks: int, group_size: int) -> int:
    """Of one chunk in dual_linear.cu: rows of x * t, padded so that they start in different banks, and their sums."""
    return 8 * batch_blocks * (2 * COLUMNS + 64) + COLUMNS // min(group_size, 64) * 8 * batch_blocks * 8


@dataclass(frozen=True)
class Plan:
    """Of dual_linear.cu. `strips * splits_in_block` warps a block; the blocks of one cluster share the same rows."""

    kernel: ClassVar[str] = "dual_linear"
    batch_blocks: int  # MB: 8 rows of x each
    strips_per_warp: int  # RT
    strips: int  # warps along the output rows
    splits_in_block: int  # warps along K
    splits: int  # blocks along K, one cluster
    stages: int  # chunks in flight per warp
    ring: bool = False  # in flight to shared memory by bulk copies, instead of to registers

    def __post_init__(self) -> None:
        if self.splits_in_block not in (1, 2, 4, 8, 16) or self.splits not in (1, 2, 4, 8):
            raise ValueError("splits_in_block must be 1, 2, 4, 8 or 16 and splits 1, 2, 4 or 8")
        if self.strips * self.splits_in_block > 16:
            raise ValueError("a block has at most 16 warps, strips * splits_in_block")

    def shared_bytes(self, batch: int, chunks: int, nbits: int, group_size: int, has_zero: bool) -> int:
        chunk = chunk_bytes(nbits, group_size, has_zero)
        warps = self.strips * self.splits_in_block
        per = -(-chunks // self.splits)
        rings = -(-warps * self.stages * (self.strips_per_warp * chunk + 8) // 128) * 128 if self.ring else 0
        one_row = 2 * COLUMNS + COLUMNS // min(group_size, 64) * 64
        x = per * (one_row if batch == 1 else x_record_bytes(self.batch_blocks, group_size))
        rows = ROWS * self.strips_per_warp * self.strips
        partial = self.splits_in_block * 8 * self.batch_blocks * (rows + 4) * 4
        return rings + max(x, partial) + (0 if batch == 1 else 8 * per)


@dataclass(frozen=True)
class WidePlan:
    """Of wide_linear.cu: `warpgroups * splits_in_block` warpgroups a block, and one more warp that fetches."""

    kernel: ClassVar[str] = "wide_linear"
    batch_blocks: int  # NB: 8 rows of x each
    warpgroups: int  # GROUPS: along the output rows, 64 each
    splits_in_block: int  # WK: as many warpgroups take turns at the chunks of K
    splits: int  # blocks along K, one cluster
    stages: int  # chunks of x and the weight in flight per block: 2, 3, ... times splits_in_block

    def __post_init__(self) -> None:
        """A warpgroup keeps to its own stages: a barrier's parity repeats every two phases, so that it could take an
        earlier phase of another's stage for the one that it waits for.
        """
        if self.stages % self.splits_in_block or self.stages < 2 * self.splits_in_block:
            raise ValueError(
                f"stages must be 2, 3, ... times splits_in_block ({self.splits_in_block}), got {self.stages}"
            )

    def shared_bytes(self, batch: int, chunks: int, nbits: int, group_size: int, has_zero: bool) -> int:
        weights = 4 * self.warpgroups * chunk_bytes(nbits, group_size, has_zero)
        stages = self.stages * (8 * self.batch_blocks * 2 * COLUMNS + -(-weights // 1024) * 1024)
        partial = self.splits_in_block * 8 * self.batch_blocks * (64 * self.warpgroups + 4) * 4
        return max(stages, partial) + 16 * self.stages


@dataclass(frozen=True)
class PromptPlan:
    """Of prompt_linear.cu: `warpgroups` warpgroups a block, and another that fetches and makes ready."""

    kernel: ClassVar[str] = "prompt_linear"
    batch_blocks: int  # NB: 8 rows of x each
    warpgroups: int  # GROUPS: along the output rows, 64 each
    share: int  # blocks of one cluster: the same rows of x, other rows of the weight

    def __post_init__(self) -> None:
        if self.batch_blocks not in (16, 24, 32) or self.share not in (1, 2, 4):
            raise ValueError("batch_blocks must be 16, 24 or 32 and share 1, 2 or 4")

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    def switches(self, nbits: int, group_size: int, has_zero: bool) -> dict[str, int]:
        """What it is compiled with, beyond its shape."""
        of_x, of_w = self.stages(nbits, group_size, has_zero)
        return {"X_STAGES": of_x, "W_STAGES": of_w}

    def stages(self, nbits: int, group_size: int, has_zero: bool) -> tuple[int, int]:
        """In flight: of 64 columns of x, as many as fit, and of 128 columns of the weight."""
        of_w = 3 if nbits == 8 else 4
        left = LARGEST_SHARED - 2048 * self.warpgroups - 1024 - of_w * self._weight_bytes(nbits, group_size, has_zero)
        return min(8, left // (8 * self.batch_blocks * COLUMNS)), of_w

    def _weight_bytes(self, nbits: int, group_size: int, has_zero: bool) -> int:
        """Of a stage: strips, t, and what is made of a strip's scales and zeros, 8 bytes a row and group, and of t."""
        made = max(1, COLUMNS // group_size) * ROWS * 8
        return 4 * self.warpgroups * (chunk_bytes(nbits, group_size, has_zero) + made) + 4 * COLUMNS

    def shared_bytes(self, batch: int, chunks: int, nbits: int, group_size: int, has_zero: bool) -> int:
        of_x, of_w = self.stages(nbits, group_size, has_zero)
        stages = of_x * 8 * self.batch_blocks * COLUMNS + of_w * self._weight_bytes(nbits, group_size, has_zero)
        return stages + 2048 * self.warpgroups + 16 * of_x + 24 * of_w


AnyPlan = Plan | WidePlan | PromptPlan


def plan(M: int, N: int, K: int, tiles: Tiles, device: int) -> AnyPlan | None:
    """For x `[M, K]` and W `[N, K]`, from the tuned table, else by rule; None where writing W and cuBLAS is the way."""
    properties = torch.cuda.get_device_properties(device)
    if M > NARROW and properties.major != 9:
        return None  # wide_linear.cu needs wgmma, which Hopper alone has
    form = (tiles.nbits, tiles.group_size, tiles.has_zero)
    limit, plain = properties.shared_memory_per_block_optin, properties.major < 9
    return _plan(min(M, BUCKETS[-1]), N, K, form, properties.name, limit, plain)


def prompt_plan(M: int, N: int, K: int, tiles: Tiles, device: int) -> PromptPlan | None:
    """For several weights of `N` rows together in one launch; None where each has its own."""
    properties = torch.cuda.get_device_properties(device)
    key = f"together {table_key(min(M, BUCKETS[-1]), N, K, 4)}"
    return _prompt(_table(properties.name).get(key), M, N, NARROW, 0.5) if properties.major == 9 else None


def _prompt(tuned: list[int] | None, M: int, N: int, least: int, busy: float) -> PromptPlan | None:
    """What a tuned entry says, or the rule: for more than `least` rows of x, whose tiles keep a share `busy` of the GPU
    at work. None where it is not for M rows: 256 are a tile, which is computed whole, and for very many W is written.
    """
    x_blocks = -(-M // 256)
    filled = M / (256 * x_blocks)
    if tuned == [] or filled < 0.75:
        return None
    if tuned:
        return PromptPlan(*tuned)
    tiles, clusters = x_blocks * -(-N // 256), MULTIPROCESSORS // 2  # of two blocks
    left = tiles % clusters  # two clusters take half the time for one of them, if there are as many
    waves = tiles // clusters + (0 if left == 0 else 0.5 if 2 * left <= clusters else 1)
    return PromptPlan(32, 2, 2) if least < M <= PROMPT and tiles >= busy * clusters * waves else None


def table_key(M: int, N: int, K: int, nbits: int) -> str:
    """The name of a tuned entry: batches share one up to each of BUCKETS."""
    bucket = next(size for size in BUCKETS if size >= M)
    return f"{nbits} bit {N}x{K} batch {bucket}"


@cache
def _table(gpu: str) -> dict[str, list[int]]:
    path = Path(__file__).with_name("plans") / f"{gpu.replace(' ', '-').lower()}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@cache
def _plan(
    M: int, N: int, K: int, form: tuple[int, int, bool], gpu: str, limit: int, plain: bool = False
) -> AnyPlan | None:
    table, own, key = _table(gpu), table_key(M, N, K, form[0]), table_key(M, N, K, 4)
    prompt = None if plain else _prompt(table.get(f"prompt {own if own in table else key}"), M, N, 256, 0.7)
    tuned = table.get(own, table.get(key))  # without its own, 4 bits' are nearer than a rule
    if prompt is None and (tuned == [] or (tuned is None and M > WIDE)):
        return None
    found: list[AnyPlan] = [prompt] if prompt else []
    if tuned:
        found.append(WidePlan(*tuned) if len(tuned) == 5 else Plan(*tuned[:6], bool(tuned[6])))
    found += _by_rule(M, N, K, plain) if M <= NARROW else _wide_by_rule(M, N, K)
    return next((plan for plan in found if plan.shared_bytes(M, -(-K // COLUMNS), *form) <= limit), None)


def pair_plan(rows: int) -> Plan:
    """For pairs of a mixture, a matrix each, of `rows` rows together, which make blocks enough by themselves."""
    if rows >= 32000:
        return Plan(1, 1, 4, 1, 1, 1)
    return Plan(1, 1, 8, 2, 1, 1) if rows >= 8 * ROWS * MULTIPROCESSORS else Plan(1, 1, 4, 2, 1, 2)


def summed_plan(pairs: int, tiles: Tiles, device: int) -> Plan | None:
    """For the sum over a token's pairs, warps along K for each; None where a block could not hold their rows of x."""
    limit, chunks = torch.cuda.get_device_properties(device).shared_memory_per_block_optin, tiles.data.shape[-2]
    if pairs > SUMMED:
        return None
    found = Plan(1, 1, 1, 2 << (pairs - 1).bit_length(), 1, 2)
    form = (tiles.nbits, tiles.group_size, tiles.has_zero)
    return found if found.shared_bytes(1, pairs * chunks, *form) <= limit else None


def _by_rule(M: int, N: int, K: int, plain: bool) -> list[Plan]:
    """Enough blocks for every multiprocessor; splits of K only where the rows are too few.

    `plain`: for a GPU before Hopper, without clusters and bulk copies.
    """
    chunks, strips = -(-K // COLUMNS), -(-N // ROWS)
    blocks = 1 if M <= 8 else 2
    if M == 1:
        shapes = [(1, 4, 4)] if strips >= 512 else [(1, 2, 8)] if strips >= 192 else [(1, 1, 16)]
    else:
        shapes = [(1, 4, 4), (1, 4, 2)] if strips >= 192 else [(1, 1, 8)]
    if plain:
        return [Plan(blocks, *shape, 1, 2) for shape in shapes]
    return [
        Plan(blocks, *shape, splits, stages, ring)
        for shape in shapes
        for splits in (1, 2, 4, 8)
        for stages, ring in ((2, True), (1, False))
        if -(-strips // (shape[0] * shape[1])) * splits >= 120 or splits == 8 or chunks < 4 * splits * shape[2]
    ]


def _wide_by_rule(M: int, N: int, K: int) -> list[WidePlan]:
    """What leaves the fewest multiprocessors idle: the last wave of blocks counts as much as a full one."""
    chunks, strips = -(-K // COLUMNS), -(-N // ROWS)
    blocks = next((size for size in (2, 4, 8, 16) if 8 * size >= M), 16)
    passes = -(-M // (8 * blocks))

    def cost(plan: WidePlan) -> float:
        waves = -(-(-(-strips // (4 * plan.warpgroups)) * plan.splits * passes) // MULTIPROCESSORS)
        start_and_sums = 8  # in chunks of one warpgroup
        return waves * (-(-chunks // plan.splits) * max(plan.warpgroups, 2) + start_and_sums)

    shapes = [WidePlan(blocks, groups, 1, splits, 4) for groups in (3, 2, 1, 4) for splits in (1, 2, 4, 8)]
    return [
        WidePlan(blocks, plan.warpgroups, turns, plan.splits, stages)
        for plan in sorted((plan for plan in shapes if plan.splits <= chunks), key=cost)
        for turns, stages in (((2, 6),) if plan.warpgroups == 1 and blocks < 16 else ((1, 4), (1, 2)))
    ]
