"""Seconds to bring the linears of a Qwen3-8B from host memory to the GPU and quantize them there, RTN and SINQ.

    python benchmarks/stream.py [--layers 12] [--depth 1] [--repeats 3] [-o FILE.json]
    python benchmarks/stream.py --device cpu --layers 1 --shrink 16     # shows that it runs, measures nothing

Weights are random, bf16, in ordinary host memory; a linear at a time, as the harness does. Every time is from an idle
GPU to an idle GPU. Copying alone: (a) from pinned memory, which is the floor; with `weight.to`; through the stream.
For each method: quantizing (b) what is on the GPU already, (c) each weight after its `weight.to`, (d) what the stream
brings. The ratio is (d) over the larger of (a) and (b): at 1 the smaller one is hidden completely.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qbench.passes.stream import CHUNK_BYTES, CHUNKS, Stream
from qbench.plugins.rtn import RTN
from qbench.plugins.sinq import SINQ
from qbench.quant.quantizer import Quantizer

Q, KV, WIDE, DOWN = (4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288)
LAYER = (Q, KV, KV, Q, WIDE, WIDE, DOWN)
METHODS = {"rtn": RTN(nbits=4, group_size=64), "sinq": SINQ(nbits=4, group_size=64)}


def idle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Median, least and most of `repeats` calls, after one that compiles and fills the allocator."""
    call()
    taken = []
    for _ in range(repeats):
        idle(device)
        started = time.perf_counter()
        call()
        idle(device)
        taken.append(time.perf_counter() - started)
    return {"seconds": statistics.median(taken), "least": min(taken), "most": max(taken)}


def quantize(quantizer: Quantizer, device: torch.device, weights: Iterable[Tensor]) -> None:
    for weight in weights:
        quantizer.quantize([weight], None)
        if device.type == "cuda":  # the harness looks at every result before it goes on
            torch.cuda.current_stream(device).synchronize()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--device", default="cuda")
    options.add_argument("--layers", type=int, default=12, help="of the model's 36")
    options.add_argument("--shrink", type=int, default=1, help="divides both sizes of every weight")
    options.add_argument("--methods", default=",".join(METHODS))
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--depth", type=int, default=1, help="linears on their way at a time")
    options.add_argument("--chunk-mib", type=int, default=CHUNK_BYTES >> 20)
    options.add_argument("--chunks", type=int, default=CHUNKS)
    options.add_argument("-o", "--output", type=Path)
    given = options.parse_args()
    names = given.methods.split(",")
    if set(names) - set(METHODS) or (given.device.startswith("cuda") and not torch.cuda.is_available()):
        raise SystemExit(f"needs a CUDA device or --device cpu, and --methods out of {', '.join(METHODS)}")
    device = torch.device(given.device)

    generator = torch.Generator(device).manual_seed(0)
    shapes = [[size // given.shrink for size in shape] for shape in LAYER] * given.layers
    resident = [(0.02 * torch.randn(shape, generator=generator, device=device)).bfloat16() for shape in shapes]
    host = [torch.empty(weight.shape, dtype=weight.dtype).copy_(weight) for weight in resident]
    size = sum(weight.nbytes for weight in host)
    # one layer's worth, larger than any cache, as often as there are layers
    pinned = [weight.pin_memory() if device.type == "cuda" else weight for weight in host[: len(LAYER)]]
    largest = max(host, key=Tensor.numel)
    target = torch.empty(largest.numel(), dtype=largest.dtype, device=device)

    def copy_pinned() -> None:
        for _ in range(given.layers):
            for weight in pinned:
                target[: weight.numel()].copy_(weight.view(-1), non_blocking=True)

    def streamed() -> Iterator[Tensor]:
        with Stream(device, given.depth, given.chunk_mib << 20, given.chunks) as stream:
            for [weight] in stream.ahead([weight.detach()] for weight in host):
                yield weight

    record: dict = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    record |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "bytes": size}
    record |= {key: value for key, value in vars(given).items() if key != "output"} | {"times": {}}
    times = record["times"]
    print(f"{size / 1e9:.2f} GB in {len(host)} linears, {record['device']}, {record['threads']} CPU threads")

    def measure(what: str, call: Callable[[], object]) -> float:
        times[what] = row = seconds(call, device, given.repeats)
        print(
            f"{what:32} {row['seconds']:8.3f} s  ({row['least']:.3f} to {row['most']:.3f})"
            f"  {size / row['seconds'] / 1e9:6.1f} GB/s",
            flush=True,
        )
        return row["seconds"]

    def copy_each() -> None:
        for weight in host:
            weight.to(device)

    floor = measure("(a) copy, pinned memory", copy_pinned)
    measure("    copy, weight.to", copy_each)
    measure("    copy, streamed", lambda: deque(streamed(), 0))
    for name in names:
        work = partial(quantize, METHODS[name], device)
        there = measure(f"(b) {name}, on the GPU already", lambda work=work: work(resident))
        measure(f"(c) {name}, weight.to in turn", lambda work=work: work(weight.to(device) for weight in host))
        both = measure(what := f"(d) {name}, streamed", lambda work=work: work(streamed()))
        times[what]["ratio"] = both / max(floor, there)
        print(f"{'':32} {both / max(floor, there):8.2f} x the larger of (a) and (b)", flush=True)

    # what came over the stream is quantized to the same bits
    name, last = names[-1], resident[-1]
    [arrived] = deque(streamed(), 1)
    pairs = zip(METHODS[name].quantize([arrived], None), METHODS[name].quantize([last], None), strict=True)
    record["same_bits"] = all(
        torch.equal(tensor, other.tensors()[key]) for ours, other in pairs for key, tensor in ours.tensors().items()
    )
    print(json.dumps({what: row["seconds"] for what, row in times.items()} | {"same_bits": record["same_bits"]}))
    if given.output:
        given.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
