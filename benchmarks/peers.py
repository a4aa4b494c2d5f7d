"""Other 4-bit linears, groups of 64, bf16: name -> (package, largest batch, prepare(shape, copies) -> x -> calls)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from timing import DEVICE
from torch import Tensor

Prepare = Callable[[tuple[int, int], int], Callable[[Tensor], list[Callable]]]


def tinygemm(shape: tuple[int, int], count: int) -> Callable[[Tensor], list[Callable]]:
    """torch's own `_weight_int4pack_mm`."""
    out, columns = shape
    weights = []
    for _ in range(count):
        codes = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device=DEVICE)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        weights.append((packed, torch.rand(columns // 64, out, 2, dtype=torch.bfloat16, device=DEVICE)))
    return lambda x: [lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w[0], 64, w[1]) for w in weights]


def gemlite(shape: tuple[int, int], count: int) -> Callable[[Tensor], list[Callable]]:
    """gemlite as shipped; it knows no t."""
    return _gemlite(shape, count, with_t=False)


def gemlite_with_t(shape: tuple[int, int], count: int) -> Callable[[Tensor], list[Callable]]:
    """What the official SINQ package runs at 4 bits: `t * x`, then gemlite."""
    return _gemlite(shape, count, with_t=True)


def _gemlite(shape: tuple[int, int], count: int, with_t: bool) -> Callable[[Tensor], list[Callable]]:
    from gemlite.core import DType, GemLiteLinearTriton

    out, columns = shape
    layers = []
    for _ in range(count):
        layer = GemLiteLinearTriton(4, 64, columns, out, DType.BF16, DType.BF16)
        codes = torch.randint(0, 16, (out, columns), dtype=torch.uint8, device=DEVICE)
        aux = torch.rand(2, out * columns // 64, 1, dtype=torch.bfloat16, device=DEVICE)
        layer.pack(codes, aux[0], aux[1], None)
        layers.append(layer)
    t = torch.rand(columns, dtype=torch.bfloat16, device=DEVICE)
    return lambda x: [lambda layer=layer: layer(x * t if with_t else x) for layer in layers]


def bitsandbytes(shape: tuple[int, int], count: int) -> Callable[[Tensor], list[Callable]]:
    """bitsandbytes NF4."""
    import bitsandbytes as bnb

    dense = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
    weights = [bnb.functional.quantize_4bit(dense, blocksize=64, quant_type="nf4") for _ in range(count)]
    return lambda x: [lambda w=w: bnb.matmul_4bit(x, w[0].t(), quant_state=w[1]) for w in weights]


def humming(shape: tuple[int, int], count: int) -> Callable[[Tensor], list[Callable]]:
    """Humming, symmetric; it knows no t and compiles itself at the first call of each batch."""
    return _humming(shape, count, with_t=False)


def humming_with_t(shape: tuple[int, int], count: int) -> Callable[[Tensor], list[Callable]]:
    """What a dual-scaled weight would cost with it: `t * x`, then Humming."""
    return _humming(shape, count, with_t=True)


def _humming(shape: tuple[int, int], count: int, with_t: bool) -> Callable[[Tensor], list[Callable]]:
    from humming.layer import HummingLayer

    out, columns = shape
    config = {"dtype": "int4", "group_size": 64}
    first = HummingLayer(shape_n=out, shape_k=columns, weight_config=config, torch_dtype=torch.bfloat16).to(DEVICE)
    first.load_from_unquantized(torch.randn(shape, dtype=torch.bfloat16, device=DEVICE))
    first.transform()
    layers = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
    t = torch.rand(columns, dtype=torch.bfloat16, device=DEVICE)
    return lambda x: [lambda layer=layer: layer(x * t if with_t else x) for layer in layers]


PEERS: dict[str, tuple[str, int, Prepare]] = {
    "tinygemm W4": ("torch", 64, tinygemm),
    "gemlite W4": ("gemlite", 64, gemlite),
    "t * x then gemlite W4 (as sinq)": ("gemlite", 64, gemlite_with_t),
    "bitsandbytes NF4": ("bitsandbytes", 8192, bitsandbytes),
    "humming W4": ("humming", 8192, humming),
    "t * x then humming W4": ("humming", 8192, humming_with_t),
}
