"""The fused linear against bf16 and its peers on one GPU: python benchmarks/gpu.py [-o results.json] [--shapes 8b,32b]

Correctness first: every format on fresh random inputs against fp64, twice, with the allocator's memory poisoned; no
timing of a kernel that is wrong. Then microseconds per call by CUDA-graph replay over more than 400 MB of rotated
weights. `share` is the bytes that the format stores (plus x and y) over the time, as a share of a device copy measured
in the same run. Peers that cannot be imported are listed, not silently left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import Timing, copies, copy_bandwidth, random_weight, relative_error, time_calls
from torch import Tensor

from qbench.kernels import cuda, ops
from qbench.kernels.tiles import to_tiles

SHAPES = {  # out x in of the linears, and the fused pairs that inference engines use
    "8b": {"q or o": (4096, 4096), "k or v": (1024, 4096), "gate or up": (12288, 4096), "down": (4096, 12288)},
    "32b": {"q": (8192, 5120), "k or v": (1024, 5120), "o": (5120, 8192), "gate or up": (25600, 5120)}
    | {"down": (5120, 25600)},
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
FORMATS = {"W4": (4, False), "W3": (3, False), "W2": (2, False), "W8": (8, False), "NF4": (4, True)}
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 1e-2}


def check() -> float:
    """The largest relative error as a share of its limit; raises SystemExit naming the first wrong case."""
    worst = 0.0
    for name, (nbits, codebook) in FORMATS.items():
        for group, rows, columns in ((64, 256, 4096), (32, 200, 1000), (128, 1024, 12288), (64, 40, 577)):
            weight = random_weight(rows, columns, nbits, group, codebook=codebook)
            tiles = to_tiles(weight)
            torch.cuda.synchronize()
            for dtype, limit in LIMITS.items():
                for batch in (1, 3, 8, 17, 64, 129):
                    x = torch.randn(batch, columns, dtype=dtype, device="cuda")
                    poison = torch.full((2**24,), float("nan"), device="cuda")
                    del poison  # the next allocation gets this memory: what is not written stays NaN
                    y = ops.linear(x, tiles)
                    error = relative_error(y, x, weight) / limit
                    worst = max(worst, error)
                    if error > 1 or not torch.equal(y, ops.linear(x, tiles)):
                        raise SystemExit(
                            f"{name} g{group} {rows}x{columns} batch {batch} {dtype}: {error:.2f} of limit"
                        )
    return worst


def rows_of(shape: tuple[int, int], batch: int, peers: dict[str, Callable]) -> Iterator[tuple[str, float, Timing]]:
    """(kernel, stored bytes of one weight, timing) of everything that is timed at this shape and batch."""
    out, columns = shape
    x = torch.randn(batch, columns, dtype=torch.bfloat16, device="cuda")
    dense = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(copies(2 * out * columns))]
    yield "bf16", 2 * out * columns, time_calls([lambda w=w: F.linear(x, w) for w in dense])
    del dense
    formats = FORMATS if batch in (1, 16) else {"W4": FORMATS["W4"]}
    for name, (nbits, codebook) in formats.items():
        for with_t in (True, False) if name == "W4" and batch in (1, 16) else (True,):
            first = random_weight(out, columns, nbits, codebook=codebook, input_scale=with_t)
            stored = first.nbytes
            tiles = [to_tiles(first)]
            while len(tiles) < copies(stored):
                tiles.append(to_tiles(random_weight(out, columns, nbits, codebook=codebook, input_scale=with_t)))
            torch.cuda.synchronize()
            label = name if with_t else f"{name} without t"
            yield label, stored, time_calls([lambda t=t: ops.linear(x, t) for t in tiles])
            if name == "W4" and with_t and batch == 1:
                cuda.EARLY_START = False
                yield "W4, no early start", stored, time_calls([lambda t=t: ops.linear(x, t) for t in tiles])
                cuda.EARLY_START = True
            if name == "W4" and with_t and batch in (1, 64):
                calls = [lambda t=t: F.linear(x, cuda.dequantize(t, torch.bfloat16)) for t in tiles]
                yield "W4, dequantize + cuBLAS", stored, time_calls(calls)
    for name, make in peers.items():
        if batch <= 64 or name != "tinygemm W4":  # it takes milliseconds there
            yield name, out * columns * 4.5 / 8, make(x, shape)


def tinygemm(x: Tensor, shape: tuple[int, int]) -> Timing:
    """torch's own `_weight_int4pack_mm`, groups of 64, bf16."""
    out, columns = shape
    weights = []
    for _ in range(copies(out * columns * 4.5 / 8)):
        codes = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        weights.append((packed, torch.rand(columns // 64, out, 2, dtype=torch.bfloat16, device="cuda")))
    return time_calls([lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w[0], 64, w[1]) for w in weights])


def gemlite(x: Tensor, shape: tuple[int, int]) -> Timing:
    """gemlite as shipped, 4 bit, groups of 64, bf16; without t, which it does not know."""
    from gemlite.core import DType, GemLiteLinearTriton

    out, columns = shape
    layers = []
    for _ in range(copies(out * columns * 4.5 / 8)):
        layer = GemLiteLinearTriton(4, 64, columns, out, DType.BF16, DType.BF16)
        codes = torch.randint(0, 16, (out, columns), dtype=torch.uint8, device="cuda")
        aux = torch.rand(2, out, columns // 64, 1, dtype=torch.bfloat16, device="cuda")
        layer.pack(codes, aux[0].view(-1, 1), aux[1].view(-1, 1), None)
        layers.append(layer)
    return time_calls([lambda layer=layer: layer(x) for layer in layers])


def bitsandbytes(x: Tensor, shape: tuple[int, int]) -> Timing:
    """bitsandbytes NF4, groups of 64."""
    import bitsandbytes as bnb

    weights = []
    for _ in range(copies(shape[0] * shape[1] * 4.5 / 8)):
        dense = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        weights.append(bnb.functional.quantize_4bit(dense, blocksize=64, quant_type="nf4"))
    return time_calls([lambda w=w: bnb.matmul_4bit(x, w[0].t(), quant_state=w[1]) for w in weights])


PEERS = {"torch": ("tinygemm W4", tinygemm), "gemlite": ("gemlite W4", gemlite)}
PEERS |= {"bitsandbytes": ("bitsandbytes NF4", bitsandbytes)}


def importable() -> tuple[dict[str, Callable], list[str]]:
    found, missing = {}, []
    for package, (name, make) in PEERS.items():
        try:
            importlib.import_module(package)
            found[name] = make
        except Exception as error:
            missing.append(f"{name}: {type(error).__name__}: {error}")
    return found, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="write all rows as JSON")
    parser.add_argument("--shapes", default="8b,32b", help="which models' layers: 8b,32b")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    chosen = parser.parse_args()
    torch.manual_seed(0)
    worst = check()
    print(f"correct: largest error {worst:.2f} of the limit (fp16 1e-3, bf16 1e-2), every run twice the same")
    peers, missing = importable()
    ceiling = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, device copy {ceiling / 1e12:.2f} TB/s; not here: {missing or 'nothing'}")
    print(f"{'layer':28}{'batch':>6}  {'kernel':28}{'us':>8}{'low':>8}{'high':>8}{'x bf16':>8}{'share':>7}")
    rows = []
    for model in chosen.shapes.split(","):
        for layer, shape in SHAPES[model].items():
            for batch in map(int, chosen.batches.split(",")):
                base = None
                for kernel, stored, timing in _guarded(rows_of(shape, batch, peers), missing):
                    base = base or timing.us
                    share = (stored + 2 * batch * sum(shape)) / (timing.us * 1e-6) / ceiling
                    title = f"{model} {layer} {shape[0]}x{shape[1]}"
                    numbers = f"{timing.us:8.1f}{timing.low:8.1f}{timing.high:8.1f}{base / timing.us:8.2f}{share:7.0%}"
                    print(f"{title:28}{batch:6}  {kernel:28}{numbers}", flush=True)
                    rows.append(
                        {"model": model, "layer": layer, "out": shape[0], "in": shape[1], "batch": batch}
                        | {"kernel": kernel, "stored_bytes": stored, "us": timing.us, "us_low": timing.low}
                        | {"us_high": timing.high, "speedup": base / timing.us, "bandwidth_share": share}
                    )
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_second": ceiling,
        "worst_error_share_of_limit": worst,
        "peers_missing": sorted(set(missing)),
        "rows": rows,
    }
    if chosen.output:
        chosen.output.write_text(json.dumps(result, indent=1) + "\n")


def _guarded(rows: Iterator, missing: list[str]) -> Iterator:
    """A peer that fails at one shape is reported there; a generator cannot go on after that, and peers come last."""
    try:
        yield from rows
    except Exception as error:
        missing.append(f"failed: {type(error).__name__}: {str(error)[:200]}")


if __name__ == "__main__":
    main()
