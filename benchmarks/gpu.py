"""The fused linear against bf16 and its peers on one GPU: python benchmarks/gpu.py [-o FILE] [--shapes 8b,32b]

Correctness first: every format on fresh random inputs against fp64, twice, with the allocator's memory poisoned; a
kernel that is wrong is not timed. Then microseconds per call by CUDA-graph replay over more than 400 MB of rotated
weights (above batch 512 four sets), all kernels of one batch by turns. `share` is the bytes that the format stores,
plus x and y, over the time, as a share of a device copy measured in the same run. Peers that cannot be imported, or
fail, are listed and not silently left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import PEERS
from shapes import FORMATS, SHAPES
from timing import DEVICE, Timing, copies, copy_bandwidth, random_weight, relative_error, time_together
from torch import Tensor

from qbench.kernels import blocks, cuda, ops
from qbench.kernels.tiles import Tiles, to_tiles

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
WRITTEN = "W4, dequantize + cuBLAS"
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
Row = tuple[int, str, float, Timing]  # batch, kernel, bytes stored, timing


def check() -> float:
    """The largest relative error as a share of its limit; raises SystemExit naming the first wrong case."""
    worst = 0.0
    for name, (nbits, codebook) in FORMATS.items():
        for group, rows, columns in ((64, 256, 4096), (32, 200, 1000), (128, 1024, 12288), (64, 40, 577)):
            weight = random_weight(rows, columns, nbits, group, codebook=codebook)
            tiles = laid_out(weight)[0]
            for dtype, limit in LIMITS.items():
                for batch in (1, 3, 8, 13, 17, 64, 129, 300, 1100):
                    x = torch.randn(batch, columns, dtype=dtype, device=DEVICE)
                    poison = torch.full((2**24,), float("nan"), device=DEVICE)
                    del poison  # the next allocation gets this memory: what is not written stays NaN
                    y = ops.linear(x, tiles)
                    error = relative_error(y, x, weight) / limit
                    worst = max(worst, error)
                    if not error <= 1 or not torch.equal(y, ops.linear(x, tiles)):
                        case = f"{name} g{group} {rows}x{columns} batch {batch} {dtype}"
                        raise SystemExit(f"{case}: error {error:.2f} of the limit, or another result the second time")
    return worst


def laid_out(weight, count: int = 1) -> list[Tiles]:
    """The weight as the kernels read it, in `count` places in memory."""
    tiles = to_tiles(weight)
    rotated = [tiles, *(replace(tiles, data=tiles.data.clone()) for _ in range(count - 1))]
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return rotated


def our_weights(shape: tuple[int, int]) -> dict[str, tuple[float, list[Tiles]]]:
    """What each row is called: the bytes stored, and the weight in as many places as must be rotated through."""
    made = {}
    for name, (nbits, codebook) in FORMATS.items():
        for with_t in (True, False) if name == "W4" else (True,):
            weight = random_weight(*shape, nbits, codebook=codebook, input_scale=with_t)
            label = name if with_t else f"{name} without t"
            made[label] = weight.nbytes, laid_out(weight, copies(weight.nbytes))
    return made


def calls_of(x: Tensor, dense: list[Tensor], ours: dict[str, tuple[float, list[Tiles]]]) -> dict[str, list[Callable]]:
    """What multiplies with x, kernel by kernel."""
    calls: dict[str, list[Callable]] = {"bf16": [lambda w=w: F.linear(x, w) for w in dense]}
    for label, (_, rotated) in ours.items():
        calls[label] = [lambda t=t: ops.linear(x, t) for t in rotated]
    calls[WRITTEN] = [lambda t=t: F.linear(x, cuda.dequantize(t, x.dtype)) for t in ours["W4"][1]]
    return calls


def measured(x: Tensor, dense: list[Tensor], ours: dict, peers: dict, missing: list[str]) -> Iterator[Row]:
    """One batch, all kernels by turns."""
    batch = len(x)
    stored = {"bf16": dense[0].nbytes, WRITTEN: ours["W4"][0]} | {label: nbytes for label, (nbytes, _) in ours.items()}
    calls = calls_of(x, dense, ours)
    for name, (nbytes, most, prepared) in list(peers.items()):
        if batch > most:
            continue
        try:
            found = prepared(x)
            found[0]()
            torch.cuda.synchronize()
            calls[name], stored[name] = found, nbytes
        except Exception as error:
            missing.append(f"{name} at batch {batch}: {type(error).__name__}: {str(error)[:200]}")
            del peers[name]
    if batch > 512:  # the weights need not come from memory then, and a graph of 16 calls takes long
        calls = {name: found[:4] for name, found in calls.items()}
    for name, timing in time_together(calls, 21 if batch <= 512 else 9).items():
        yield batch, name, stored[name], timing
    if batch <= blocks.NARROW:
        cuda.EARLY_START = False
        yield batch, "W4, no early start", stored["W4"], time_together({"W4": calls["W4"]})["W4"]
        cuda.EARLY_START = True


def prepared_peers(names: list[str], shape: tuple[int, int], missing: list[str]) -> dict:
    """name -> (bytes stored, largest batch, x -> calls) of those that can be imported."""
    nbytes, found = shape[0] * shape[1] * 4.5 / 8, {}
    for name in names:
        package, most, prepare = PEERS[name]
        try:
            importlib.import_module(package)
            found[name] = (nbytes, most, prepare(shape, copies(nbytes)))
        except Exception as error:
            missing.append(f"{name} at {shape[0]}x{shape[1]}: {type(error).__name__}: {str(error)[:200]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="write all rows as JSON")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="which models' layers")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--peers", default=",".join(PEERS), help="the first use of gemlite tunes itself for minutes")
    chosen = parser.parse_args()
    peers = [name for name in chosen.peers.split(",") if name]
    torch.manual_seed(0)
    worst = check()
    print(f"correct: largest error {worst:.2f} of the limit (fp16 1e-3, bf16 1e-2), every run twice the same")
    ceiling, name, missing, rows = copy_bandwidth(), gpu_name(), [], []
    print(f"{name}, device copy {ceiling / 1e12:.2f} TB/s")
    print(f"{'layer':28}{'batch':>6}  {'kernel':28}{'us':>8}{'low':>8}{'high':>8}{'x bf16':>8}{'share':>7}")
    for model in chosen.shapes.split(","):
        for layer, shape in SHAPES[model].items():
            batches = map(int, chosen.batches.split(","))
            inputs = {batch: torch.randn(batch, shape[1], dtype=torch.bfloat16, device=DEVICE) for batch in batches}
            dense = [
                torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(copies(2 * math.prod(shape)))
            ]
            ours = our_weights(shape)
            beside = prepared_peers(peers, shape, missing)
            found = [row for x in inputs.values() for row in measured(x, dense, ours, beside, missing)]
            base = {batch: timing.us for batch, kernel, _, timing in found if kernel == "bf16"}
            for batch, kernel, stored, timing in sorted(found, key=lambda row: row[0]):
                share = (stored + 2 * batch * sum(shape)) / (timing.us * 1e-6) / ceiling
                speedup = base[batch] / timing.us
                title = f"{model} {layer} {shape[0]}x{shape[1]}"
                numbers = f"{timing.us:8.1f}{timing.low:8.1f}{timing.high:8.1f}{speedup:8.2f}{share:7.0%}"
                print(f"{title:28}{batch:6}  {kernel:28}{numbers}", flush=True)
                rows.append(
                    {"model": model, "layer": layer, "out": shape[0], "in": shape[1], "batch": batch, "kernel": kernel}
                    | {"stored_bytes": stored, "us": timing.us, "us_low": timing.low, "us_high": timing.high}
                    | {"speedup": speedup, "bandwidth_share": share}
                )
            if chosen.output:  # after every layer: a run that is cut off keeps what it has
                result = {
                    "gpu": name,
                    "torch": torch.__version__,
                    "copy_bytes_per_second": ceiling,
                    "worst_error_share_of_limit": worst,
                    "not_measured": missing,
                    "rows": rows,
                }
                chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"not measured: {'; '.join(missing) or 'nothing'}")


def gpu_name() -> str:
    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
