"""GGUF's block types decode to the reference decoder's numbers, to the bit, and both formats pass the suite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from qbench.format.gguf import GGUFBlocks, GGUFLatent, of_blocks, row_bytes
from qbench.format.gguf_blocks import FLOATS, TYPES
from qbench.testing import FormatConformance


def random_blocks(type: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes whose fp16 scales are small numbers, uint8 `[rows, bytes]`."""
    generator, block = np.random.default_rng(seed), TYPES[type]
    blocks = generator.integers(0, 256, (rows * columns // block.weights, block.nbytes), dtype=np.uint8)
    for at in block.halves:
        scales = generator.normal(0, 0.01, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    if type == "MXFP4":  # exponents, among them those of the smallest numbers
        blocks[:, 0] = np.where(blocks[:, 0] < 8, blocks[:, 0] % 3, 100 + blocks[:, 0] % 40)
    if type == "IQ1_M":  # the top nibbles of four words
        blocks[:, 49::2] = blocks[:, 49::2] & 0x0F | np.array([0x10, 0x20, 0x30, 0x20], dtype=np.uint8)
    return blocks.reshape(rows, -1)


def blocks_of(type: str, shape: tuple[int, int], generator: torch.Generator) -> GGUFBlocks:
    """Of this type where its blocks fit the shape, else single fp16 numbers, as llama.cpp keeps such a weight."""
    type = type if shape[1] % TYPES[type].weights == 0 else "F16"
    seed = int(torch.randint(2**31, (), generator=generator))
    return of_blocks(type, torch.from_numpy(random_blocks(type, *shape, seed)), method=type)


class TestQ8(FormatConformance):
    def make(self, generator, shape):
        return blocks_of("Q8_0", shape, generator)


class TestIQ4(FormatConformance):
    def make(self, generator, shape):
        return blocks_of("IQ4_NL", shape, generator)


class TestLatent(FormatConformance):
    def make(self, generator, shape):
        nope = shape[0] // 2
        key = blocks_of("F16", (shape[1], nope), generator).blocks[None]
        value = blocks_of("Q5_1", (shape[0] - nope, shape[1]), generator)
        return GGUFLatent(shape, "F16", value.type, key, value.blocks[None], method="split").checked()


@pytest.mark.parametrize("type", [type for type in TYPES if type not in FLOATS])
def test_a_type_decodes_as_the_reference_does_to_the_bit(type):
    kind, columns = GGMLQuantizationType[type], 4 * TYPES[type].weights
    assert (int(kind), *GGML_QUANT_SIZES[kind]) == TYPES[type][:3]
    stored = random_blocks(type, 40, columns, seed=1)
    expected = quants.dequantize(stored, kind)
    weight = of_blocks(type, torch.from_numpy(stored))
    found = weight.dequantize().numpy()
    assert weight.shape == found.shape == (40, columns)
    assert np.isfinite(expected).all()
    assert len(np.unique(expected)) > 4
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_the_types_are_all_that_the_reference_decodes():
    assert {type.name for type in quants._type_traits} == TYPES.keys() - {"F32", "F16"}


def test_decoding_in_parts_changes_no_bit(monkeypatch):
    weight = of_blocks("Q4_K", torch.from_numpy(random_blocks("Q4_K", 16, 512)))
    whole = weight.dequantize()
    monkeypatch.setattr("qbench.format.gguf.AT_ONCE", 1024)
    assert torch.equal(weight.dequantize(), whole)
    assert torch.equal(weight.dequantize(torch.bfloat16), whole.bfloat16())


def test_rows_change_places_without_decoding():
    weight, order = of_blocks("Q6_K", torch.from_numpy(random_blocks("Q6_K", 6, 256))), torch.tensor([5, 0, 3, 2, 1, 4])
    assert torch.equal(weight.rows(order).dequantize(), weight.dequantize()[order])


def test_a_scale_that_is_no_number_is_found():
    stored = torch.from_numpy(random_blocks("Q2_K", 2, 256))
    assert of_blocks("Q2_K", stored).finite()
    stored[1, 83] = 0x7D  # the exponent of NaN, in dmin
    assert not of_blocks("Q2_K", stored).finite()


def test_what_cannot_be_blocks_is_a_sentence():
    with pytest.raises(ValueError, match="unknown GGUF type Q9_K; known are F32"):
        row_bytes("Q9_K", 256)
    with pytest.raises(ValueError, match="a row of 100 weights is no multiple of the 32 in a block of Q4_0"):
        row_bytes("Q4_0", 100)
    described = {"shape": [2, 64], "type": "Q4_0", "method": "", "diagnostics": {}}
    with pytest.raises(ValueError, match=r"are uint8 \[2, 36\]"):
        GGUFBlocks.rebuild(described, {"blocks": torch.zeros(2, 35, dtype=torch.uint8)})
    described = {"shape": [9, 32], "key_type": "F16", "value_type": "Q8_0", "method": "", "diagnostics": {}}
    key, value = torch.zeros(1, 32, 8, dtype=torch.uint8), torch.zeros(1, 4, 34, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"keys \[1, 32, 4\] and values \[1, 4, 32\] make no \[9, 32\]"):
        GGUFLatent.rebuild(described, {"key": key, "value": value})
