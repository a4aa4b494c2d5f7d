"""The layout that the GPU kernels read: one contiguous stream of codes, scales and zero points per 16 output rows.

`data` is uint8 `[..., strips, chunks, bytes]`; a chunk holds 16 rows x 128 stored columns: first the codes, in the
order in which the 32 lanes of a warp feed them to `mma.m16n8k16`, then scale and zero point per group and row in fp16.

    lane = 4 * (row % 8) + (column % 32) // 8       owns 8 adjacent columns of each unit of 32, in rows g and g + 8
    pairs of columns (2i, 2i + 1) sit at the same bit of the two halves of a 32-bit word, so that one shift and one
    mask give both; 3 bits: five such pairs per word, the sixteenth in the spare bits of three words, nothing wasted

As many bits as the packed format: rows and columns are only padded to 16 and 128. An int8 aux becomes fp16 here.
Everything in this file is plain torch and runs on any device; `from_tiles` is the exact inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qbench.format.aux import Aux, dense_input_scale
from qbench.format.packing import pack
from qbench.format.rotation import Rotation
from qbench.format.weight import QuantizedWeight

ROWS, COLUMNS = 16, 128
# Words [strip, r, g, chunk, tig, word] to the order in memory; dimensions of a word's index are split first.
WORD_SPLIT = {2: (2,), 3: (3,), 4: (2, 2), 8: (4, 2)}
# dims after the split: 0 strip, 1 r, 2 g, 3 chunk, 4 tig, 5.. word
ORDER = {2: (0, 3, 2, 4, 5, 1), 3: (0, 3, 5, 2, 4, 1), 4: (0, 3, 5, 2, 4, 6, 1), 8: (0, 3, 5, 2, 4, 1, 6)}


@dataclass(frozen=True)
class Tiles:
    """A weight `[..., out, in]` in the kernels' layout."""

    data: Tensor  # uint8 [..., strips, chunks, bytes]
    shape: tuple[int, ...]  # [..., out, in]
    nbits: int
    group_size: int  # of the kernels: 32, 64, or a multiple of 128
    has_zero: bool
    input_scale: Tensor | None = None  # t, fp16 [..., 128 * chunks], in stored column order, padded with zeros
    codebook: Tensor | None = None  # fp32 [16]
    permutation: Tensor | None = None  # int32 [..., in]
    exponent: int = 0  # t is used as t * 2**-exponent, at most 1, so that x * t stays finite in fp16
    rotation: Rotation | None = None  # of the input channels: data, t and permutation are in the rotated basis

    def flat(self) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
        """Its tensors and its numbers, which is how a weight passes through the ops; `over` puts them together."""
        block, signs = (0, None) if self.rotation is None else (self.rotation.block, self.rotation.signs)
        tensors = (self.data, self.input_scale, self.codebook, self.permutation, signs)
        numbers = (*self.shape[-2:], self.nbits, self.group_size, int(self.has_zero), self.exponent, block)
        return tensors, numbers

    @staticmethod
    def over(tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> Tiles:
        """What `flat` took apart."""
        data, *parts, signs = tensors
        rows, columns, nbits, group_size, has_zero, exponent, block = numbers
        assert data is not None
        shape = (*data.shape[:-3], rows, columns)
        rotation = Rotation(block, signs) if block else None
        return Tiles(data, shape, nbits, group_size, bool(has_zero), *parts, exponent, rotation)

    def select(self, index: int) -> Tiles:
        """Matrix `index` of a stack, as views."""
        return replace(
            self,
            data=self.data[index],
            shape=self.shape[1:],
            input_scale=None if self.input_scale is None else self.input_scale[index],
            permutation=None if self.permutation is None else self.permutation[index],
        )

    def span(self, first: int, last: int) -> Tiles:
        """Matrices `first` to `last` of a stack, as views."""
        return replace(
            self,
            data=self.data[first:last],
            shape=(last - first, *self.shape[1:]),
            input_scale=None if self.input_scale is None else self.input_scale[first:last],
            permutation=None if self.permutation is None else self.permutation[first:last],
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.flat()[0] if tensor is not None)

    def parts(self) -> dict[str, int]:
        """Bytes by what they hold, padding included: `data` is codes, scale and, where stored, zero."""
        chunks = self.data.shape[:-1].numel()
        codes = chunks * ROWS * COLUMNS * self.nbits // 8
        aux = self.data.numel() - codes
        found = {"codes": codes} | ({"scale": aux // 2, "zero": aux // 2} if self.has_zero else {"scale": aux})
        for name in ("input_scale", "codebook", "permutation"):
            if (tensor := getattr(self, name)) is not None:
                found[name] = tensor.nbytes
        if self.rotation is not None and self.rotation.signs is not None:
            found["signs"] = self.rotation.signs.nbytes
        return found


def unsupported(weight: QuantizedWeight) -> str | None:
    """Why the kernels cannot hold this weight; None if they can."""
    if _kernel_group(weight) is None:
        return f"groups of {weight.group_size} are neither 32, 64 nor a multiple of 128"
    if weight.codebook is not None and weight.codebook.ndim > 1:
        return "a codebook of vectors"
    if weight.codebook is not None and weight.nbits != 4:
        return f"a codebook of {weight.nbits} bits"
    if weight.codebook is not None and weight.zero is not None:
        return "a codebook and zero points"
    if weight.scale.step is None and weight.scale.stored.dtype != torch.float16:
        return f"scales in {str(weight.scale.stored.dtype).removeprefix('torch.')}"  # which fp16 might not hold
    if weight.zero is not None and weight.zero.stored.dtype not in (torch.float16, torch.uint8):
        return f"zero points in {str(weight.zero.stored.dtype).removeprefix('torch.')}"
    return None


def _kernel_group(weight: QuantizedWeight) -> int | None:
    columns, size = weight.shape[-1], weight.group_size
    if size >= columns:
        return COLUMNS * -(-columns // COLUMNS)
    return size if size in (32, 64) or size % COLUMNS == 0 else None


def chunk_bytes(nbits: int, group_size: int, has_zero: bool) -> int:
    return ROWS * COLUMNS * nbits // 8 + ROWS * _groups_per_chunk(group_size) * (4 if has_zero else 2)


def _groups_per_chunk(group_size: int) -> int:
    return COLUMNS // min(group_size, COLUMNS)


def fields(nbits: int, codebook: bool) -> list[list[tuple[int, int, int, int]]]:
    """Where the 32 codes of one lane and row go, column unit by unit: (word, bit in it, bit of the code, width)."""
    places: list[list[tuple[int, int, int, int]]] = []
    for unit in range(4):
        for j in range(8):
            half, pair = 16 * (j % 2), j // 2
            if nbits == 8:
                places.append([(2 * unit + j // 4, 8 * (j % 4), 0, 8)])
            elif nbits == 4:
                places.append([(unit, 4 * j if codebook else 4 * pair + half, 0, 4)])
            elif nbits == 2:
                places.append([(unit // 2, 2 * (4 * (unit % 2) + pair) + half, 0, 2)])
            elif 4 * unit + pair < 15:
                word, field = divmod(4 * unit + pair, 5)
                places.append([(word, 3 * field + half, 0, 3)])
            else:
                places.append([(bit, 15 + half, bit, 1) for bit in range(3)])
    return places


def to_tiles(weight: QuantizedWeight) -> Tiles:
    """Lays a weight `[..., out, in]` out for the kernels on its device; raises ValueError if they cannot hold it."""
    if reason := unsupported(weight):
        raise ValueError(f"the kernels cannot hold {reason}")
    *lead, rows, columns = weight.shape
    group = _kernel_group(weight)
    assert group is not None
    chunks = -(-columns // COLUMNS)
    t = None if weight.input_scale is None else dense_input_scale(weight.input_scale)
    exponent = 0
    if t is not None:
        top = float(t.abs().max()) if t.numel() else 0.0
        while top > 2.0**exponent:
            exponent += 1
        if weight.permutation is not None:
            t = t.gather(-1, weight.permutation.long())
        t = torch.nn.functional.pad(t.half(), (0, chunks * COLUMNS - columns)).contiguous()
    codes = weight.codes().reshape(-1, rows, columns)
    scale = weight.scale.dense().half().reshape(len(codes), rows, -1)
    zero = None if weight.zero is None else weight.zero.dense().half().reshape(len(codes), rows, -1)
    # one matrix of a stack after the other: the transient copies are those of one matrix
    data = torch.stack(
        [
            torch.cat(
                [
                    _lay_codes(codes[i], weight.nbits, weight.codebook is not None),
                    _lay_aux(scale[i], None if zero is None else zero[i], group, chunks),
                ],
                -1,
            )
            for i in range(len(codes))
        ]
    )
    return Tiles(
        data.view(*lead, *data.shape[1:]),
        tuple(weight.shape),
        weight.nbits,
        group,
        zero is not None,
        t,
        None if weight.codebook is None else weight.codebook.float().contiguous(),
        weight.permutation,
        exponent,
        weight.rotation,
    )


def _lay_codes(codes: Tensor, nbits: int, codebook: bool) -> Tensor:
    """uint8 `[out, in]` to uint8 `[strips, chunks, 256 * nbits]`."""
    rows, columns = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -columns % COLUMNS, 0, -rows % ROWS))
    strips, chunks = codes.shape[0] // ROWS, codes.shape[1] // COLUMNS
    parts = codes.view(strips, 2, 8, chunks, 4, 4, 8)  # strip, r, g, chunk, unit, tig, j
    words = torch.zeros(strips, 2, 8, chunks, 4, nbits, dtype=torch.int32, device=codes.device)
    for position, places in enumerate(fields(nbits, codebook)):
        values = parts[:, :, :, :, position // 8, :, position % 8].int()
        for word, bit, source, width in places:
            words[..., word] |= ((values >> source) & (2**width - 1)) << bit
    split = words.unflatten(-1, WORD_SPLIT[nbits])
    return split.permute(ORDER[nbits]).contiguous().view(strips, chunks, -1).view(torch.uint8)


def _lay_aux(scale: Tensor, zero: Tensor | None, group: int, chunks: int) -> Tensor:
    """fp16 `[out, groups]` to uint8 `[strips, chunks, bytes]`: per group of a chunk, g, r, (scale, zero)."""
    per_chunk = _groups_per_chunk(group)
    parts = torch.stack([scale] if zero is None else [scale, zero], -1)
    parts = torch.nn.functional.pad(parts, (0, 0, 0, 0, 0, -len(scale) % ROWS))
    first = torch.arange(chunks, device=scale.device)[:, None] * COLUMNS
    columns = first + torch.arange(per_chunk, device=scale.device) * (COLUMNS // per_chunk)
    index = (columns // group).clamp_max(scale.shape[1] - 1).flatten()
    parts = parts[:, index].view(-1, 2, 8, chunks, per_chunk, parts.shape[-1])  # strip, r, g, chunk, group, part
    return parts.permute(0, 3, 4, 2, 1, 5).contiguous().view(len(parts), chunks, -1).view(torch.uint8)


def unpack(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes uint8 `[..., out, in]`, scale and zero fp16 `[..., out, groups]`: what `to_tiles` was given."""
    *lead, rows, columns = tiles.shape
    strips, chunks, width = tiles.data.shape[-3:]
    data = tiles.data.reshape(-1, strips, chunks, width)
    cut = ROWS * COLUMNS * tiles.nbits // 8
    raw = data[..., :cut].contiguous().view(torch.int32)
    order, split = ORDER[tiles.nbits], WORD_SPLIT[tiles.nbits]
    sizes = (strips, 2, 8, chunks, 4, *split)
    words = raw.view(len(data), *(sizes[dim] for dim in order))
    inverse = [0, *(1 + order.index(dim) for dim in range(len(order)))]
    words = words.permute(inverse).flatten(6)  # matrix, strip, r, g, chunk, tig, word
    codes = torch.zeros(len(data), strips, 2, 8, chunks, 4, 4, 8, dtype=torch.uint8, device=data.device)
    for position, places in enumerate(fields(tiles.nbits, tiles.codebook is not None)):
        value = sum(((words[..., word] >> bit) & (2**size - 1)) << target for word, bit, target, size in places)
        codes[:, :, :, :, :, position // 8, :, position % 8] = value.to(torch.uint8)
    codes = codes.view(len(data), strips * ROWS, chunks * COLUMNS)[:, :rows, :columns].reshape(tiles.shape)

    per_chunk = _groups_per_chunk(tiles.group_size)
    parts = data[..., cut:].contiguous().view(torch.float16)
    parts = parts.view(len(data), strips, chunks, per_chunk, 8, 2, -1).permute(0, 1, 5, 4, 2, 3, 6)
    parts = parts.reshape(len(data), strips * ROWS, chunks * per_chunk, -1)[:, :rows]
    step = max(1, tiles.group_size // COLUMNS)  # one group may span several chunks
    groups = -(-columns // tiles.group_size)
    parts = parts[:, :, ::step][:, :, :groups].reshape(*lead, rows, groups, -1)
    return codes, parts[..., 0].contiguous(), parts[..., 1].contiguous() if tiles.has_zero else None


def from_tiles(tiles: Tiles, form: QuantizedWeight) -> QuantizedWeight:
    """The weight in its own format; `form` gives what the tiles do not hold: t and aux tables as stored."""
    codes, scale, zero = unpack(tiles)
    if zero is not None and form.zero is not None:  # integers of 8 bits where a file has stored them so
        zero = form.zero if form.zero.step is not None else Aux(zero.to(form.zero.stored.dtype))
    return replace(
        form,
        planes=pack(codes, tiles.nbits),
        scale=form.scale if form.scale.step is not None else Aux(scale),
        zero=zero if form.zero is not None else None,
        codebook=tiles.codebook,
        permutation=tiles.permutation,
        rotation=tiles.rotation,
    )


def dequantize(tiles: Tiles, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights `[..., out, in]` as QuantizedWeight.dequantize gives them (in their own basis and order)."""
    codes, scale, zero = unpack(tiles)
    t = None if tiles.input_scale is None else tiles.input_scale[..., : tiles.shape[-1]]
    if t is not None and tiles.permutation is not None:
        t = torch.empty_like(t).scatter_(-1, tiles.permutation.long(), t)
    plain = QuantizedWeight(
        tiles.shape,
        tiles.nbits,
        tiles.group_size,
        pack(codes, tiles.nbits),
        Aux(scale),
        None if zero is None else Aux(zero),
        t,
        tiles.codebook,
        tiles.permutation,
        rotation=tiles.rotation,
    )
    return plain.dequantize(dtype)
