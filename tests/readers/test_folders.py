"""The suite for readers over folders of integers and lookups, rounded from the model's own weights."""

import json
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from qbench.readers.awq import AWQ
from qbench.readers.bitsandbytes import BitsAndBytes
from qbench.readers.compressed import CompressedTensors
from qbench.readers.gptq import GPTQ
from qbench.readers.hqq import HQQ
from qbench.readers.sinq import SINQ
from qbench.testing import ReaderConformance
from tests.readers.cases import write
from tests.readers.test_bitsandbytes import four_bits
from tests.readers.test_gptq import bits_of
from tests.readers.test_hqq import packed, spelled

GROUP = 32
INTERLEAVED = [0, 2, 4, 6, 1, 3, 5, 7]


def rounded(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes `[out, in]` of 4 bits, zero points and fp16 scales `[out, groups]`, and what they stand for in fp16."""
    blocks = weight.float().unflatten(1, (-1, GROUP))
    low, high = blocks.amin(2).clamp_max(0), blocks.amax(2).clamp_min(0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale).round().clamp(0, 15).int()
    codes = (blocks / scale.unsqueeze(2) + zero.unsqueeze(2)).round().clamp(0, 15).int().flatten(1)
    spread = [part.repeat_interleave(GROUP, 1) for part in (zero, scale)]
    return codes, zero, scale, (codes - spread[0]) * spread[1]


def gptq(weight):
    codes, zero, scale, dense = rounded(weight)
    return dense, {"qweight": bits_of(codes.T, 4), "qzeros": bits_of((zero - 1) & 15, 4).T, "scales": scale.T}


def awq(weight):
    codes, zero, scale, dense = rounded(weight)
    mixed = [part.unflatten(0, (-1, 8))[:, INTERLEAVED].flatten(0, 1) for part in (codes, zero)]
    return dense, {"qweight": bits_of(mixed[0], 4).T, "qzeros": bits_of(mixed[1], 4).T, "scales": scale.T}


def compressed(weight):
    codes, zero, scale, dense = rounded(weight)
    parts = {"weight_packed": bits_of(codes.T, 4).T, "weight_zero_point": bits_of(zero, 4), "weight_scale": scale}
    return dense, parts | {"weight_shape": torch.tensor(weight.shape)}


def nf4(weight):
    parts, dense = four_bits(weight, nested=True)
    return dense, parts


def int8(weight):
    absmax = weight.float().abs().amax(1)
    codes = (weight.float() * 127 / absmax[:, None]).round().to(torch.int8)
    return codes * absmax[:, None] * 7.874015718698502e-3, {"weight": codes, "SCB": absmax}


def hqq(weight):
    codes, zero, scale, dense = rounded(weight)
    numbers = {"nbits": 4, "group_size": GROUP, "axis": 1, "view_as_float": 0}
    parts = {name: torch.tensor(number, dtype=torch.int32) for name, number in numbers.items()}
    parts |= {"shape": torch.tensor(weight.shape), "compute_dtype": spelled("torch.float16")}
    table = {"W_q": packed(codes.view(-1, GROUP), 4), "scale": scale.view(-1, 1), "zero": zero.half().view(-1, 1)}
    return dense, parts | table


def sinq(weight):
    t = (torch.arange(weight.shape[1]) % 3 + 1).half()
    codes, zero, scale, dense = rounded(weight / t)
    parts = {"meta.scale": scale.view(-1, 1), "meta.zero": zero.half().view(-1, 1), "meta.scale2": t[None]}
    return dense * t, parts | {"W_q": packed(codes.view(-1, GROUP), 4)}


class Folders(ReaderConformance):
    damaged: ClassVar[int] = 8  # test_damaged.py makes 300
    reader: ClassVar[type]
    pack: ClassVar[Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]
    settings: ClassVar[dict]

    def make(self):
        return self.reader()

    def write(self, model, folder):
        decoded, beside = {}, {}

        def pack(module, weight):
            decoded[f"{module}.weight"], parts = type(self).pack(weight)
            told = {"nbits": 4, "axis": 1, "group_size": GROUP, "shape": list(weight.shape), "method": "sinq_nogemlite"}
            beside[module] = {"meta": told | {"compute_dtype": "torch.float16"}}
            return parts

        path = write(folder / "q", pack, self.settings, self.kind)
        if self.reader is SINQ:
            (path / "model.safetensors.index.json.meta.json").write_text(json.dumps(beside))
        name = "model.norm.weight"
        return path, decoded | {name: model.get_parameter(name).half()}


class TestGPTQ(Folders):
    reader, pack, settings = GPTQ, staticmethod(gptq), {"quant_method": "gptq", "bits": 4, "group_size": GROUP}


class TestGPTQExperts(TestGPTQ):
    kind = "moe"


class TestAWQ(Folders):
    reader, pack, settings = AWQ, staticmethod(awq), {"quant_method": "awq", "group_size": GROUP, "version": "gemm"}


class TestCompressed(Folders):
    reader, pack = CompressedTensors, staticmethod(compressed)
    settings: ClassVar[dict] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "symmetric": False, "type": "int"}}},
    }


class TestNF4(Folders):
    reader, pack, settings = BitsAndBytes, staticmethod(nf4), {"quant_method": "bitsandbytes"}


class TestInt8Experts(Folders):
    kind = "moe"
    reader, pack, settings = BitsAndBytes, staticmethod(int8), {"quant_method": "bitsandbytes"}


class TestHQQ(Folders):
    reader, pack, settings = HQQ, staticmethod(hqq), {"quant_method": "hqq"}


class TestSINQ(Folders):
    reader, pack, settings = SINQ, staticmethod(sinq), {"quant_method": "sinq"}
