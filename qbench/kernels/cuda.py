"""Launching the CUDA C++ kernels that multiply, and dequantize.cu, and with which arguments.

KERNELS says which run on which compute capability, `refusal` why one of them cannot run on a device or a machine;
ops.py then takes another.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from qbench.kernels import nvrtc
from qbench.kernels.blocks import AnyPlan, Plan, PromptPlan, WidePlan, x_record_bytes
from qbench.kernels.tiles import COLUMNS, Tiles

log = logging.getLogger(__name__)
Defines = tuple[tuple[str, int], ...]

EARLY_START = True  # let a kernel fetch its first weights while the kernel in front of it ends


def _fields(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


class _Problem(ctypes.Structure):  # of dual_linear.cu
    _fields_ = [
        *_fields(ctypes.c_void_p, "tiles", "x", "t", "permutation", "signs", "codebook", "bias", "experts", "y"),
        *_fields(ctypes.c_uint64, "x_stride", "expert_bytes"),
        ("expert_t", ctypes.c_int),
        *_fields(ctypes.c_int64, "next_tiles", "next_t", "next_permutation", "next_y"),
        *_fields(ctypes.c_float, "t_down", "t_up"),
        *_fields(ctypes.c_int, "M", "N", "K", "strips", "chunks", "per", "log_splits_in_block"),
        *_fields(ctypes.c_int, "stages", "pairs", "pairs_per_row", "last_expert", "log_warps_of_row"),
        *_fields(ctypes.c_void_p, "factors", "scores"),
        ("scores_in_fp32", ctypes.c_int),
        ("epsilon", ctypes.c_float),
    ]


class _WideProblem(ctypes.Structure):  # of wide_linear.cu
    _fields_ = [
        *_fields(ctypes.c_void_p, "tiles", "x", "codebook", "bias", "y"),
        ("t_up", ctypes.c_float),
        *_fields(ctypes.c_int, "M", "N", "strips", "chunks", "per", "stages"),
    ]


@cache
def refusal(device: int, kernel: str = "dual_linear") -> str | None:
    """Why `kernel` (a key of KERNELS) cannot run on CUDA device `device`; None if it can."""
    capability = torch.cuda.get_device_capability(device)
    lowest, highest, launches = KERNELS[kernel]
    if not lowest <= capability[0] <= highest:
        return f"{kernel} does not run on compute capability {capability[0]}.{capability[1]}"
    _compile_tried(device)
    try:
        for entry, defines in launches:
            nvrtc.load(entry, device, _for(device, defines))
    except nvrtc.KernelError as error:
        log.warning("another kernel takes the place of %s: %s", kernel, error)  # once: the answer is kept
        return str(error)
    return None


@cache
def _compile_tried(device: int) -> None:
    """All that `refusal` tries, at once: one answer is hardly ever asked for without the others."""
    major = torch.cuda.get_device_capability(device)[0]
    launches = [each for lowest, highest, some in KERNELS.values() if lowest <= major <= highest for each in some]
    nvrtc.compile_side_by_side(device, [(entry, _for(device, defines)) for entry, defines in launches])


@cache
def _plain(device: int | None) -> bool:
    """Whether the device has neither clusters nor bulk copies nor the early start: those came with 9.0."""
    return device is not None and torch.cuda.get_device_capability(device)[0] < 9


def _early(device: torch.device) -> bool:
    return EARLY_START and not _plain(device.index)


def _for(device: int | None, defines: Defines) -> Defines:
    """The switches on this device: before Hopper dual_linear.cu is compiled without what came with it."""
    if not _plain(device):
        return defines
    return tuple(sorted((dict(defines) | {"PLAIN": 1, "RING": 0}).items()))


def linear(x: Tensor, tiles: Tiles, bias: Tensor | None, chosen: AnyPlan) -> Tensor:
    """y `[M, N]` for x `[M, K]`, fp16 or bf16; of rotated tiles, those that cuda_rotate.takes.

    One pass over the weight per 8 * batch_blocks rows of x.
    """
    if isinstance(chosen, PromptPlan):
        from qbench.kernels import cuda_prompt

        return cuda_prompt.linears(x, [tiles], chosen, bias)[0]
    y = x.new_empty(len(x), tiles.shape[-2])
    if isinstance(chosen, WidePlan):
        _launch_wide(x, tiles, bias, y, chosen)
    else:
        _launch(x, tiles, bias, y, chosen, blocks_m=-(-len(x) // (8 * chosen.batch_blocks)))
    return y


def own_matrices(x: Tensor, tiles: Tiles, chosen: Plan) -> Tensor:
    """y `[rows, N]`: row i of x `[rows, K]` times matrix i of a stack, whose matrices may lie apart."""
    y = x.new_empty(len(x), tiles.shape[-2])
    _launch(x, tiles, None, y, chosen, 1, pairs=len(x))
    return y


def experts(x: Tensor, index: Tensor, stacks: Sequence[Tiles], chosen: Plan, up: Tensor | None = None) -> list[Tensor]:
    """For each of one or two stacks of one form, y `[tokens * k, N]`, in one launch.

    Row p is x[p // k] times the matrix index[p // k, p % k] of the stack; if there is none, the row holds anything.
    With `up`, which lies in memory as x does, silu(x) * up takes the place of x.
    """
    ys = [x.new_empty(index.numel(), tiles.shape[-2]) for tiles in stacks]
    index, second = index.long().contiguous(), (stacks[1], ys[1]) if len(stacks) > 1 else None
    _launch(x, stacks[0], None, ys[0], chosen, 1, index, index.numel() // len(x), second, up)
    return ys


def summed_experts(
    x: Tensor, up: Tensor, index: Tensor, scores: Tensor, tiles: Tiles, chosen: Plan, more: Tensor | None = None
) -> Tensor:
    """y `[tokens, N]`: over a token's pairs the sum of its scores `[tokens, k]` times what `experts` gives, in fp32.

    x and up are `[tokens * k, K]`; `more` `[tokens, N]` in their dtype is added. The plan's warps along K are those of
    all pairs of a token, as many for each.
    """
    y = x.new_empty(len(index), tiles.shape[-2])
    scores = scores.contiguous() if scores.dtype in (x.dtype, torch.float32) else scores.float().contiguous()
    _launch(x, tiles, more, y, chosen, 1, index.contiguous(), index.shape[1], None, up, scores)
    return y


def _launch(
    x: Tensor,
    tiles: Tiles,
    bias: Tensor | None,
    y: Tensor,
    chosen: Plan,
    blocks_m: int,
    index: Tensor | None = None,
    pairs_per_row: int = 1,
    second: tuple[Tiles, Tensor] | None = None,
    up: Tensor | None = None,
    scores: Tensor | None = None,
    pairs: int = 0,
) -> None:
    N, K = tiles.shape[-2:]
    pairs = pairs if index is None else index.numel()
    M = 1 if pairs else len(x)
    strips, chunks = tiles.data.shape[-3:-1]
    device, stream = x.device.index, _stream(x.device)
    depth = {"RING": 1} if chosen.ring else {"DEPTH": chosen.stages}
    shape = {"MB": 1 if M == 1 else chosen.batch_blocks, "RT": chosen.strips_per_warp, "ONE": int(M == 1)}
    kind = (
        ({"EXPERTS": 1} if pairs else {})
        | ({} if up is None else {"GATED": 1})
        | ({} if scores is None else {"SUMMED": 1})
    )
    defines = _for(device, _linear_defines(tiles, x.dtype, **shape, **depth, **kind))
    down = _down(x.dtype, tiles)
    source = x
    if M > 1:  # x * t once for all blocks; a single row each block scales while its weights are on their way
        record = x_record_bytes(chosen.batch_blocks, tiles.group_size)
        source = torch.empty(blocks_m * chunks * record, dtype=torch.uint8, device=x.device)
        _launch_input("scale_input", x, tiles, source, defines)
    next_tiles, next_y = (tiles, y) if second is None else second
    launched = max(pairs, 1) * (1 if second is None else 2)
    log_warps, rows = chosen.splits_in_block.bit_length() - 1, 1
    log_warps_of_row = log_warps
    if scores is not None:
        rows, launched = pairs_per_row, len(index)  # of x in a block; a block is a token's
        log_warps_of_row -= (pairs_per_row - 1).bit_length()
    problem = _Problem(
        *map(_address, (tiles.data, source, tiles.input_scale, tiles.permutation, _signs(tiles), tiles.codebook)),
        *map(_address, (bias, index, y)),
        x.stride(0),
        *_steps(tiles),
        _apart(tiles.data, next_tiles.data),
        _apart(tiles.input_scale, next_tiles.input_scale),
        _apart(tiles.permutation, next_tiles.permutation),
        _apart(y, next_y),
        down,
        1 / down,
        *(M, N, K, strips, chunks, -(-chunks // chosen.splits), log_warps),
        *(chosen.stages, max(pairs, 1), pairs_per_row, tiles.data.shape[0] - 1 if pairs else 0, log_warps_of_row),
        *map(_address, (up, scores)),
        int(scores is not None and scores.dtype == torch.float32),
        0.0,
    )
    blocks_n = -(-strips // (chosen.strips_per_warp * chosen.strips))
    nvrtc.launch(
        nvrtc.load("dual_linear", device, defines),
        (blocks_n * chosen.splits, blocks_m, launched),
        32 * chosen.strips * chosen.splits_in_block,
        chosen.shared_bytes(M, rows * chunks, tiles.nbits, tiles.group_size, tiles.has_zero),
        stream,
        [problem],
        chosen.splits,
        early=_early(x.device),
    )


def _launch_wide(x: Tensor, tiles: Tiles, bias: Tensor | None, y: Tensor, chosen: WidePlan) -> None:
    M, N = y.shape
    strips, chunks = tiles.data.shape[-3:-1]
    device, blocks_m = x.device.index, -(-M // (8 * chosen.batch_blocks))
    shape = {"NB": chosen.batch_blocks, "GROUPS": chosen.warpgroups, "WK": chosen.splits_in_block}
    defines = _linear_defines(tiles, x.dtype, **shape)
    image = x.new_empty(blocks_m * 8 * chosen.batch_blocks * chunks * COLUMNS)
    _launch_input("tile_input", x, tiles, image, defines)
    problem = _WideProblem(
        *map(_address, (tiles.data, image, tiles.codebook, bias, y)),
        1 / _down(x.dtype, tiles),
        *(M, N, strips, chunks, -(-chunks // chosen.splits), chosen.stages),
    )
    nvrtc.launch(
        nvrtc.load("wide_linear", device, defines),
        (-(-strips // (4 * chosen.warpgroups)) * chosen.splits, blocks_m, 1),
        128 * chosen.warpgroups * chosen.splits_in_block + 32,
        chosen.shared_bytes(M, chunks, tiles.nbits, tiles.group_size, tiles.has_zero),
        _stream(x.device),
        [problem],
        chosen.splits,
        early=_early(x.device),
    )


def _launch_input(entry: str, x: Tensor, tiles: Tiles, to: Tensor, defines: Defines) -> None:
    """x * t for all blocks at once, a thread per 8 columns, or per 8 of each 256 columns of a rotation's block."""
    chunks, turns, shared_bytes = tiles.data.shape[-2], 1, 0
    arguments = [ctypes.c_void_p(_address(part)) for part in (x, tiles.input_scale, tiles.permutation, to)]
    arguments += [ctypes.c_uint64(x.stride(0)), ctypes.c_int(x.shape[1]), ctypes.c_int(chunks)]
    arguments.append(ctypes.c_float(_down(x.dtype, tiles)))
    if tiles.rotation is not None:
        turns = max(1, tiles.rotation.block // 256)
        shared_bytes = 2048 * turns
        arguments.append(ctypes.c_void_p(_address(_signs(tiles))))
    nvrtc.launch(
        nvrtc.load(entry, x.device.index, defines),
        (-(-chunks // (8 * turns)), len(x), 1),
        128,
        shared_bytes,
        _stream(x.device),
        arguments,
        early=_early(x.device),
    )


def _signs(tiles: Tiles) -> Tensor | None:
    return None if tiles.rotation is None else tiles.rotation.signs


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _down(dtype: torch.dtype, tiles: Tiles) -> float:
    """What t is multiplied with so that x * t stays finite; bf16 has fp32's range."""
    return 1.0 if dtype == torch.bfloat16 else 2.0**-tiles.exponent


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _steps(tiles: Tiles) -> tuple[int, int]:
    """From one matrix of a stack to the next: bytes of its data, numbers of its t."""
    if tiles.data.dim() == 3:
        return 0, 0
    return tiles.data.stride(0), 0 if tiles.input_scale is None else tiles.input_scale.stride(0)


def _apart(first: Tensor | None, second: Tensor | None) -> int:
    """Bytes from one to the other."""
    return 0 if first is None or second is None else second.data_ptr() - first.data_ptr()


def dequantize(tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """W `[..., N, K]` in fp16, bf16 or fp32, in stored column order, t included, a rotation undone (cuda_rotate.py)."""
    N, K = tiles.shape[-2:]
    strips, chunks = tiles.data.shape[-3:-1]
    w = torch.empty(tiles.shape, dtype=dtype, device=tiles.data.device)
    out = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}[dtype]
    warps, shared_bytes, rotation = min(8, chunks), 0, {}
    arguments = [ctypes.c_void_p(_address(part)) for part in (tiles.data, tiles.input_scale, tiles.codebook, w)]
    arguments += [ctypes.c_int(value) for value in (N, K, strips, chunks)]
    arguments += [kind(value) for kind, value in zip((ctypes.c_uint64, ctypes.c_int), _steps(tiles), strict=True)]
    if tiles.rotation is not None:
        rotation, shared_bytes = {"ROTATE": tiles.rotation.block}, 64 * (64 * warps + 4)
        arguments.append(ctypes.c_void_p(_address(_signs(tiles))))
    defines = _defines(tiles.nbits, tiles.group_size, tiles.has_zero, tiles.codebook is not None, OUT=out, **rotation)
    function = nvrtc.load("dequantize", w.device.index, defines)
    grid = (tiles.data.shape[:-2].numel(), -(-chunks // warps), 1)
    nvrtc.launch(function, grid, 32 * warps, shared_bytes, _stream(w.device), arguments)
    return w


def _defines(nbits: int, group_size: int, has_zero: bool, codebook: bool, **others: int) -> Defines:
    found = {"BITS": nbits, "GROUP": min(group_size, COLUMNS), "ZERO": int(has_zero), "CODEBOOK": int(codebook)}
    return tuple(sorted((found | others).items()))


def _linear_defines(tiles: Tiles, dtype: torch.dtype, **others: int) -> Defines:
    form = (tiles.nbits, tiles.group_size, tiles.has_zero, tiles.codebook is not None)
    rotation = {} if tiles.rotation is None else {"ROTATE": tiles.rotation.block}
    return _defines(*form, BF16=int(dtype == torch.bfloat16), **rotation, **others)


_ROW = _defines(4, 64, True, False, BF16=1, MB=1, RT=1, ONE=1, DEPTH=2)
_BATCH = _defines(4, 64, True, False, BF16=1, MB=1, RT=1, ONE=0, RING=1)
_WIDE = _defines(4, 64, True, False, BF16=1, NB=2, GROUPS=1, WK=1)
_PROMPT = _defines(4, 64, True, False, BF16=1, INPUT_SCALE=1, GROUPS=2, NB=16, X_STAGES=8, W_STAGES=4)
KERNELS = {  # the compute capabilities, lowest and highest, and each of its kernels, small, for the default format
    "dequantize": (8, 99, [("dequantize", _defines(4, 64, True, False, OUT=1))]),
    "rotate_input": (8, 99, [("rotate_input", _defines(4, 64, True, False, BF16=1, ROTATE=1024))]),
    "dual_linear": (8, 99, [("dual_linear", _ROW), ("scale_input", _BATCH), ("dual_linear", _BATCH)]),
    "wide_linear": (9, 9, [("tile_input", _WIDE), ("wide_linear", _WIDE)]),  # wgmma is Hopper's alone
    "prompt_linear": (9, 9, [("prompt_linear", _PROMPT)]),
}
