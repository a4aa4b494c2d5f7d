"""Damaged copies of folders in every format: one sentence or an honest reading, and never anything else."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from qbench.format.format import Format
from qbench.readers.awq import AWQ
from qbench.readers.bitsandbytes import BitsAndBytes
from qbench.readers.blockfloat import FP8
from qbench.readers.compressed import CompressedTensors
from qbench.readers.gptq import GPTQ
from qbench.readers.hqq import HQQ
from qbench.readers.mxfp4 import MXFP4
from qbench.readers.reader import ReadError
from qbench.readers.sinq import SINQ
from tests.model.test_layouts import gpt_oss
from tests.readers.cases import skeleton, write
from tests.readers.test_bitsandbytes import four_bits
from tests.readers.test_blockfloat import deepseek, modelopts_nvfp4, mxfp4_stacks
from tests.readers.test_gptq import bits_of, random_parts
from tests.readers.test_hqq import hqq_parts, sinq

COPIES = 50  # of each format
MUCH = 64 << 20  # bytes that no reading of such a small file may ask for at once


def gptq(folder):
    def pack(module, weight):
        codes, zero, scale = random_parts(module, weight, 4, 2)
        g_idx = (torch.arange(weight.shape[1]) // (weight.shape[1] // 2)).int()
        return {"qweight": bits_of(codes.T, 4), "qzeros": bits_of(zero, 4).T, "scales": scale.T, "g_idx": g_idx}

    return write(folder, pack, {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": -1})


def awq(folder):
    def pack(module, weight):
        codes, zero, scale = random_parts(module, weight, 4, 2)
        return {"qweight": bits_of(codes, 4).T, "qzeros": bits_of(zero, 4).T, "scales": scale.T}

    return write(folder, pack, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"})


def compressed(folder):
    def pack(module, weight):
        codes, zero, scale = random_parts(module, weight, 4, 2)
        packed = {"weight_packed": bits_of(codes.T, 4).T, "weight_zero_point": bits_of(zero, 4)}
        return packed | {"weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}

    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return write(
        folder, pack, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    )


def nf4(folder):
    return write(folder, lambda _, weight: four_bits(weight, nested=True)[0], {"quant_method": "bitsandbytes"})


def int8(folder):
    def pack(module, weight):
        largest = weight.float().abs().amax(1)
        codes = (weight.float() * 127 / largest[:, None]).round().to(torch.int8)
        return {"weight": codes, "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}

    return write(folder, pack, {"quant_method": "bitsandbytes"})


def hqq(folder):
    return write(folder, lambda _, weight: hqq_parts(weight, 4, 1, torch.float16, 0)[1], {"quant_method": "hqq"})


def fp8(folder):
    return write(folder, deepseek, {"quant_method": "fp8", "weight_block_size": [32, 32]})


KINDS = {
    "gptq": (GPTQ, gptq),
    "awq": (AWQ, awq),
    "compressed": (CompressedTensors, compressed),
    "nf4": (BitsAndBytes, nf4),
    "int8": (BitsAndBytes, int8),
    "hqq": (HQQ, hqq),
    "sinq": (SINQ, lambda folder: sinq(folder)[0]),
    "fp8": (FP8, fp8),
    "nvfp4": (FP8, modelopts_nvfp4),
    "mxfp4": (MXFP4, mxfp4_stacks),
}


def header_of(data: bytes) -> tuple[int, dict]:
    length = int.from_bytes(data[:8], "little")
    return length, json.loads(data[8 : 8 + length])


def with_header(data: bytes, length: int, header: dict) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def damage(folder: Path, rng: random.Random) -> str:
    """Damages one thing of a folder and says what."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length, header = header_of(data)
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.sample(names, 2)
    how = rng.choice(list(WAYS))
    if how == "settings":
        damage_json(folder, rng)
        return how
    if how == "a pickle":
        file.rename(folder / "pytorch_model.bin")
        return how
    file.write_bytes(WAYS[how](data, length, header, one, other, rng))
    return f"{how}: {one}, {other}"


def flipped(data: bytes, first: int, last: int, rng: random.Random) -> bytes:
    place = rng.randrange(first, last)
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def edited(field: str, value):
    def edit(data, length, header, one, other, rng):
        return with_header(data, length, header | {one: header[one] | {field: value(header, one, other, rng)}})

    return edit


WAYS = {
    "a bit of the header": lambda d, n, h, a, b, r: flipped(d, 0, 8 + n, r),
    "a bit of the length": lambda d, n, h, a, b, r: flipped(d, 0, 8, r),
    "a bit of the data": lambda d, n, h, a, b, r: flipped(d, 8 + n, len(d), r),
    "cut in the header": lambda d, n, h, a, b, r: d[: r.randrange(8 + n)],
    "cut in the data": lambda d, n, h, a, b, r: d[: r.randrange(8 + n, len(d))],
    "too long": lambda d, n, h, a, b, r: d + b"\0" * r.randrange(1, 100),
    "a tensor is missing": lambda d, n, h, a, b, r: with_header(d, n, {k: v for k, v in h.items() if k != a}),
    "a tensor twice": lambda d, n, h, a, b, r: with_header(d, n, {**h, f"model.{a}": h[a]}),
    "a path in a name": lambda d, n, h, a, b, r: with_header(
        d, n, {("../" + k if k == a else k): v for k, v in h.items()}
    ),
    "names exchanged": lambda d, n, h, a, b, r: with_header(d, n, h | {a: h[b], b: h[a]}),
    "another dtype": edited("dtype", lambda h, a, b, r: r.choice(["F32", "I32", "U8", "F64", "BOOL", "X", 3, None])),
    "another shape": edited(
        "shape", lambda h, a, b, r: r.choice([[], [2**62, 2**62], [-1, -1], [1.5], "x", h[b]["shape"]])
    ),
    "turned": edited("shape", lambda h, a, b, r: h[a]["shape"][::-1]),
    "offsets": edited(
        "data_offsets", lambda h, a, b, r: r.choice([[0, 2**60], [-8, 8], [5], h[b]["data_offsets"], None])
    ),
    "settings": None,
    "a pickle": None,
}


def damage_json(folder: Path, rng: random.Random) -> None:
    """Cuts a JSON file, or puts something else in the place of one of its values, however deep."""
    file = rng.choice(sorted(folder.glob("*.json")))
    text = file.read_text()
    if rng.random() < 0.2:
        file.write_text(text[: rng.randrange(len(text))])
        return
    content = json.loads(text)
    place = content.get("quantization_config", content) if rng.random() < 0.8 else content
    while True:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    place[key] = rng.choice([None, -1, 0, 2**70, 3.5, "x", [], {}, [[1]], True, "re:(" * 9])
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_copies(tmp_path, kind):
    reader, make = KINDS[kind]
    whole = make(tmp_path / "whole")
    rng, refused, said = random.Random(kind), 0, []
    model = gpt_oss().to("meta") if kind == "mxfp4" else skeleton()
    for copy in range(COPIES):
        folder = tmp_path / str(copy)
        shutil.copytree(whole, folder)
        what = damage(folder, rng)
        try:
            if not reader().recognizes(folder):
                refused += 1
                continue
            held = reader().open(folder, model)
            for name, entry in held.entries.items():
                read = held.read(name)
                assert tuple(read.shape) == tuple(entry.shape), what
                if isinstance(read, Format):
                    assert read.nbytes < MUCH
                    assert read.dequantize().shape == entry.shape, what
        except ReadError as error:
            refused += 1
            said.append(str(error))
        except Exception as error:
            raise AssertionError(f"copy {copy}, {what}: {type(error).__name__}: {error}") from error
        shutil.rmtree(folder)
    assert COPIES // 2 < refused < COPIES, refused
    assert all("\n" not in sentence and 10 < len(sentence) < 1000 for sentence in said)
