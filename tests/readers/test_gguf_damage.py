"""GGUF files that lie: one sentence for each, before anything is allocated for what they claim."""

from __future__ import annotations

import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from qbench.readers import gguf_file
from qbench.readers.gguf import GGUF
from qbench.readers.reader import ReadError
from tests.passes.architectures import build
from tests.readers.gguf_files import converted, meta, settings_of, write

SIZES = dict(num_hidden_layers=1, vocab_size=32, hidden_size=32, intermediate_size=32, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=1, bos_token_id=0, eos_token_id=1)


@pytest.fixture(scope="module")
def small():
    """A small Llama, its skeleton and its tensors as in a file."""
    model = build("Llama", **SIZES)
    return model, meta(model), converted(model, "llama")


@pytest.fixture
def path(small, tmp_path):
    model, _, tensors = small
    matrices = [name for name, value in tensors.items() if name.startswith("blk") and value.ndim == 2]
    types = {name: "Q8_0" if "ffn" in name else "Q4_0" for name in matrices}
    return write(tmp_path / "m.gguf", "llama", tensors, settings_of(model.config), types)


def read_all(path, skeleton) -> None:
    held = GGUF().open(path, skeleton)
    for name in held.entries:
        held.read(name)


def refused(path, skeleton) -> str:
    with pytest.raises(ReadError) as caught:
        read_all(path, skeleton)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 500
    return sentence


def test_300_damaged_copies_are_a_sentence_or_a_model(small, path):
    generator, whole = random.Random(0), path.read_bytes()
    data_at = min(tensor.data_offset for tensor in GGUFReader(path).tensors)
    taken = []
    for number in range(300):
        copy = bytearray(whole)
        if number < 100:  # cut off, in every region
            copy = copy[: generator.randrange(data_at) if number % 2 else generator.randrange(data_at, len(whole) - 64)]
        elif number < 250:
            for _ in range(1 + number % 3):
                copy[generator.randrange(data_at)] ^= 1 << generator.randrange(8)
        else:
            copy[generator.randrange(data_at, len(whole))] ^= 0xFF
        path.write_bytes(copy)
        try:
            read_all(path, small[1])
        except ReadError as error:
            taken += [number % 100] * ("\n" in str(error))
        else:
            taken.append(number)
    assert min(taken) >= 100, "a file that is cut off was taken for whole, or its sentence has two lines"
    assert len(taken) < 100


def field_at(path, marker: bytes) -> int:
    """Where the bytes after a name begin in the file's header."""
    return path.read_bytes().index(marker) + len(marker)


def overwrite(path, at: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[at : at + len(content)] = content
    path.write_bytes(whole)


Q = struct.Struct("<Q").pack
TABLE = b"blk.0.ffn_up.weight"  # then: dimensions uint32, two sizes uint64, type uint32, offset uint64


@pytest.mark.parametrize(
    ("at", "content", "sentence"),
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, struct.pack("<I", 1), "is GGUF version 1; read are little-endian 2 and 3"),
        (4, struct.pack(">I", 3), "is GGUF version 3 in big-endian order"),
        (8, Q(2**60), "a table of 1152921504606846976 tensors needs"),
        (16, Q(2**62), "a list of 4611686018427387904 settings needs"),
        ("blk.0.ffn_up.weight", struct.pack("<I", 2**31), "has 2147483648 dimensions"),
        ("blk.0.ffn_up.weight+4", Q(2**40), r"takes \d+ bytes and the file has"),
        ("blk.0.ffn_up.weight+4", Q(31), "no whole blocks of Q8_0"),
        ("blk.0.ffn_up.weight+4", Q(0), "no whole blocks of Q8_0"),
        ("blk.0.ffn_up.weight+20", struct.pack("<I", 99), "is stored as type 99; read are F32"),
        ("blk.0.ffn_up.weight+20", struct.pack("<I", 31), "type Q4_0_4_4, which llama.cpp gave up"),
        ("blk.0.ffn_up.weight+24", Q(2**63), "is said to begin at 9223372036854775808, where"),
        ("blk.0.ffn_up.weight+24", Q(0), "is said to begin at 0, where"),
        ("llama.block_count", struct.pack("<I", 77), "is of the unknown type 77"),
        ("llama.block_count+4", struct.pack("<I", 5), "is of a model with 5 blocks, and this one has 1"),
        ("llama.attention.head_count+4", struct.pack("<I", 8), "with 8 attention heads, and this one has 2"),
        ("general.architecture+4", Q(2**50), "setting 'general.architecture' needs 1125899906842624 bytes"),
        ("general.architecture+12", b"qwen2", "holds a model of architecture 'qwen2', and this one is llama"),
    ],
)
def test_what_a_header_claims_is_checked(at, content, sentence, small, path):
    if isinstance(at, str):
        name, _, more = at.partition("+")
        at = field_at(path, name.encode()) + int(more or 0)
    overwrite(path, at, content)
    tracemalloc.start()
    with pytest.raises(ReadError, match=sentence):
        GGUF().open(path, small[1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_names_are_not_believed(small, path):
    whole = path.read_bytes()
    for name in (b"../../etc/passwd.wei", b"blk.0.ffn_up\nweight\0", b"\xff\xfe.0.ffn_up.weight"):
        path.write_bytes(whole.replace(TABLE, name[: len(TABLE)]))
        assert "m.gguf" in refused(path, small[1])
    path.write_bytes(whole.replace(b"blk.0.ffn_up.weight", b"blk.0.attn_q.weight"))
    assert "blk.0.attn_q.weight is there twice" in refused(path, small[1])
    path.write_bytes(whole.replace(b"llama.attention.head_count_kv", b"llama.attention.head_countXkv"))
    assert "is of a model with 2 key and value heads" in refused(path, small[1])


def test_lists_in_settings_are_bounded(tmp_path, small):
    """A list of lists, and a list of texts that claims more than there is."""
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + Q(1) + b"k" + struct.pack("<I", 9)
    for content, sentence in (
        (struct.pack("<IQ", 9, 2**40), "is a list of the type 9, which none holds"),
        (struct.pack("<IQ", 8, 2**40) + b"x" * 64, "setting 'k' needs 8796093022208 bytes"),
        (struct.pack("<IQ", 4, 2**61) + b"x" * 64, "setting 'k' needs"),
        (struct.pack("<IQ", 8, 2) + Q(2**60) + b"x" * 64, "setting 'k' needs 1152921504606846976 bytes"),
    ):
        (path := tmp_path / "lists.gguf").write_bytes(start + content)
        assert sentence in refused(path, small[1])


def test_a_missing_or_foreign_tensor_is_named(small, tmp_path):
    model, skeleton, tensors = small
    less = {name: value for name, value in tensors.items() if name != "blk.0.attn_k.weight"}
    path = write(tmp_path / "less.gguf", "llama", less, settings_of(model.config))
    assert "lacks 1 of the model's tensors: model.layers.0.self_attn.k_proj.weight" in refused(path, skeleton)
    more = tensors | {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    path = write(tmp_path / "more.gguf", "llama", more, settings_of(model.config))
    assert "holds 1 tensors that the model has no place for, the first is blk.0.attn_q.bias" in refused(path, skeleton)
    other = tensors | {"token_embd.weight": np.zeros((40, 32), np.float32)}
    path = write(tmp_path / "other.gguf", "llama", other, settings_of(model.config))
    assert "a model of another vocabulary" in refused(path, skeleton)
    other = tensors | {"blk.0.ffn_up.weight": np.zeros((64, 32), np.float32)}
    path = write(tmp_path / "shape.gguf", "llama", other, settings_of(model.config))
    assert "a model of another shape" in refused(path, skeleton)


def test_numbers_that_are_none_are_named(small, path):
    places = {tensor.name: tensor.data_offset for tensor in GGUFReader(path).tensors}
    whole = path.read_bytes()
    overwrite(path, places["blk.0.ffn_up.weight"], b"\x00\x7e")  # NaN in fp16
    assert "blk.0.ffn_up.weight has scales that are no numbers" in refused(path, small[1])
    path.write_bytes(whole)
    overwrite(path, places["output_norm.weight"], struct.pack("<f", float("inf")))
    assert "output_norm.weight holds what is no number" in refused(path, small[1])


def test_a_model_that_is_not_known_is_a_sentence(path):
    assert "which GGUF tensors make a gpt_neox model is not known" in refused(path, meta(build("GPTNeoX")))


def test_a_file_that_shrinks_after_it_was_opened(small, path):
    held = GGUF().open(path, small[1])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ReadError, match="it was cut off after it was opened"):
        held.read("model.norm.weight")
    path.unlink()
    with pytest.raises(ReadError, match="No such file"):
        held.read("model.norm.weight")


def test_the_whole_file_is_read_as_the_reference_reads_it(path):
    header, reference = gguf_file.read(path), GGUFReader(path)
    assert list(header.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        mine = header.tensors[tensor.name]
        assert (mine.type, mine.offset, mine.nbytes) == (tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes)
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert torch.equal(mine.read().flatten(), torch.from_numpy(tensor.data.copy()).view(torch.uint8).flatten())
