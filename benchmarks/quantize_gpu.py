"""Seconds to quantize all linears of a Qwen3-8B on one GPU, method by method, after checking the results.

    python benchmarks/quantize_gpu.py [--layers 36] [--repeats 5] [--methods rtn,sinq] [--peers] [--output FILE]

Weights are random, bf16, on the GPU; a method is called linear group by linear group, as the harness does, and the time
is that of the calls from an idle GPU to an idle GPU, host included. Each check compares the kernels with plain torch on
the CPU, on fresh weights of full size. "plain" is the same method with QBENCH_KERNELS=0 on the GPU. Peers are timed
through their own entry points on the same weights, where they can be imported: sinq (16-bit scales, no packing for
GemLite), hqq, bitsandbytes. Methods that would take minutes in plain torch are timed on fewer layers; the JSON says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from qbench.layers.linear import relative_error
from qbench.plugins.asinq import ASINQ
from qbench.plugins.awq import AWQ
from qbench.plugins.gptq import GPTQ
from qbench.plugins.hqq import HQQ
from qbench.plugins.nf4 import NF4
from qbench.plugins.rtn import RTN
from qbench.plugins.sinq import SINQ
from qbench.quant.quantizer import InputStatistics, Quantizer

Q, KV, WIDE = (4096, 4096), (1024, 4096), (12288, 4096)
GROUPS = ((Q, KV, KV), (Q,), (WIDE, WIDE), ((4096, 12288),))  # of one layer: q k v; o; gate up; down
METHODS = {"rtn": RTN(), "nf4": NF4(), "hqq": HQQ(), "sinq": SINQ(), "awq": AWQ(), "asinq": ASINQ()}
METHODS["gptq"] = GPTQ(act_order=False, static_groups=False)  # the harder case: every group takes its grid on arrival
METHODS["gptq as shipped"] = GPTQ()  # act-order, static groups
TARGETS = {"rtn": 0.09, "nf4": 0.09, "hqq": 0.5, "sinq": 0.25, "gptq": 15.0}  # seconds
PLAIN_LAYERS = {"awq": 1, "asinq": 1, "gptq": 1, "gptq as shipped": 1}  # of the slow ones, scaled up to the model
INPUT_ROWS = 2048  # as the harness keeps
HESSIAN_ROWS = 16384
ENOUGH = 4.0  # seconds

CHECKS = (KV, Q, WIDE, (4096, 12288))
CALIBRATED_CHECKS = ((512, 4096), (512, 12288))

Layer = list[list[Tensor]]


def random_weight(shape: tuple[int, int], unevenness: float, generator: torch.Generator) -> Tensor:
    """Gaussian bf16 `[out, in]`, rows and columns scaled by exp(N(0, unevenness))."""
    weight = torch.randn(shape, generator=generator, device="cuda") * 0.02
    for dim in (0, 1):
        size = [n if i == dim else 1 for i, n in enumerate(shape)]
        weight *= (unevenness * torch.randn(size, generator=generator, device="cuda")).exp()
    return weight.bfloat16()


def random_layers(count: int, unevenness: float, seed: int = 0) -> list[Layer]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        [[random_weight(shape, unevenness, generator) for shape in group] for group in GROUPS] for _ in range(count)
    ]


def random_statistics(columns: int) -> InputStatistics:
    """Of correlated inputs whose channels differ in size, as every method may ask for."""
    generator = torch.Generator("cuda").manual_seed(columns)
    inputs = torch.randn(HESSIAN_ROWS, columns, generator=generator, device="cuda")
    inputs += inputs.roll(1, 1) * 0.5
    inputs *= (0.7 * torch.randn(columns, generator=generator, device="cuda")).exp()
    inputs = inputs.bfloat16().float()
    hessian = inputs.T @ inputs
    return InputStatistics(HESSIAN_ROWS, inputs.abs().mean(0), inputs[:INPUT_ROWS].clone(), hessian)


def on_cpu(stats: InputStatistics) -> InputStatistics:
    return InputStatistics(stats.tokens, *(part.cpu() for part in (stats.absmean, stats.inputs, stats.hessian)))


def check(names: list[str], stats: dict[int, InputStatistics]) -> list[dict]:
    """Kernels against plain torch on the CPU, on weights that neither has seen before."""
    rows = []
    generator = torch.Generator("cuda").manual_seed(time.time_ns() % 2**31)
    for name in names:
        quantizer = METHODS[name]
        # the CPU takes minutes for the calibrated methods on whole matrices
        for shape in CALIBRATED_CHECKS if quantizer.needs else CHECKS:
            for unevenness in (0.0, 0.5) if name == "sinq" and shape == Q else (0.5,):
                weight = random_weight(shape, unevenness, generator)
                known = stats[shape[1]]
                fast = quantizer.quantize([weight], known)[0]
                slow = quantizer.quantize([weight.cpu()], on_cpu(known) if quantizer.needs else None)[0]
                slow = slow.with_tensors({name: tensor.cuda() for name, tensor in slow.tensors().items()})
                row = {"method": name, "shape": list(shape), "unevenness": unevenness}
                row["codes_equal"] = float((fast.codes() == slow.codes()).double().mean())
                if quantizer.needs:
                    # tokens x error of the weights, in double precision
                    errors = [known.inputs.double() @ (q - weight.float()).double().T for q in
                              (fast.dequantize(), slow.dequantize())]  # fmt: skip
                    row["output_error_ratio"] = float(errors[0].norm() / errors[1].norm())
                else:
                    row["weight_error_ratio"] = relative_error(weight, fast) / relative_error(weight, slow)
                if isinstance(quantizer, SINQ):
                    row |= compare_factors(quantizer, weight)
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def compare_factors(quantizer: SINQ, weight: Tensor) -> dict:
    """t before it is stored in fp16, and the imbalance that is left, against the CPU.

    The imbalance of a tile is the same for t and for a multiple of t, and on even weights the search passes through
    multiples; rounding noise then says which is kept. Such a factor moves into the scales, so it is divided out here.
    """
    (fast, left), (slow, expected) = (quantizer.input_scale(w, quantizer.group_size) for w in (weight, weight.cpu()))
    ratio = (fast.cpu() / slow).unflatten(0, (-1, quantizer.group_size))
    return {
        "t_largest_difference": float((ratio / ratio.median(1, keepdim=True).values - 1).abs().max()),
        "tiles_with_another_multiple": int(((ratio.median(1).values - 1).abs() > 1e-4).sum()),
        "tiles": len(ratio),
        "imbalance_ratio": left / expected,
    }


def each_weight(call: Callable[[Tensor], object], layers: list[Layer]) -> None:
    for layer in layers:
        for group in layer:
            for weight in group:
                call(weight)


def quantize_all(quantizer: Quantizer, stats: dict[int, InputStatistics], layers: list[Layer]) -> None:
    for layer in layers:
        for group in layer:
            quantizer.quantize(group, stats[group[0].shape[1]] if quantizer.needs else None)


def peers() -> dict[str, Callable[[Tensor], object]]:
    """Entry points that turn one weight into its quantized form, of the packages that are here."""
    found: dict[str, Callable[[Tensor], object]] = {}
    os.environ["SINQ_AUTO_PATCH"] = "0"
    for load in (_sinq, _hqq, _bitsandbytes):
        try:
            name, call = load()
        except ImportError as error:
            print(f"not here: {error}", flush=True)
            continue
        found[f"{name} {version(name)}"] = call
    return found


def _sinq():
    from sinq.quantizer import Quantizer as Official

    settings = {"nbits": 4, "group_size": 64, "round_zero": True, "axis": 1, "tiling_mode": "1D"}
    settings |= {"method": "sinq_nogemlite", "compute_dtype": torch.bfloat16, "device": torch.device("cuda")}
    return "sinq", lambda weight: Official.quantize(weight, None, **settings)


def _hqq():
    from hqq.core.quantize import Quantizer as Official

    settings = {"nbits": 4, "group_size": 64, "axis": 1, "compute_dtype": torch.bfloat16, "device": "cuda"}
    return "hqq", lambda weight: Official.quantize(weight, **settings)


def _bitsandbytes():
    from bitsandbytes.functional import quantize_4bit

    return "bitsandbytes", lambda weight: quantize_4bit(weight, blocksize=64, quant_type="nf4")


def seconds(call: Callable[[list[Layer]], object], layers: list[Layer], repeats: int) -> dict:
    """Median, least and most of up to `repeats` calls, after one on a layer that compiles and fills the allocator.

    Two at least, and no further ones once they took ENOUGH seconds together.
    """
    call(layers[:1])
    taken: list[float] = []
    while len(taken) < repeats and (len(taken) < 2 or sum(taken) < ENOUGH):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call(layers)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return {"seconds": statistics.median(taken), "least": min(taken), "most": max(taken), "repeats": len(taken)}


def gpu_seconds(call: Callable[[], object], top: int = 8) -> dict:
    """Time the GPU was busy in one call, and in which kernels, from the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        call()
        torch.cuda.synchronize()
    kernels = [
        e for e in record.key_averages() if e.self_device_time_total > 0 and "cuda" in str(e.device_type).lower()
    ]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    return {
        "gpu_seconds": sum(e.self_device_time_total for e in kernels) / 1e6,
        "kernels": [[e.key[:60], e.count, e.self_device_time_total / 1e6] for e in kernels[:top]],
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--layers", type=int, default=36)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--methods", default=",".join(METHODS))
    options.add_argument("--peers", action="store_true")
    options.add_argument("--no-plain", action="store_true")
    options.add_argument("--no-check", action="store_true")
    options.add_argument("--profile", action="store_true")
    options.add_argument("--output", type=Path)
    given = options.parse_args()
    names = given.methods.split(",")
    if not torch.cuda.is_available() or set(names) - set(METHODS):
        raise SystemExit(f"needs a CUDA device, and --methods out of {', '.join(METHODS)}")

    record: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": version("triton")}
    record |= {"layers": given.layers, "checks": [], "times": []}
    stats = {columns: random_statistics(columns) for columns in (4096, 12288)}
    if not given.no_check:
        record["checks"] = check(names, stats)

    layers = random_layers(given.layers, 0.0)
    weights = sum(weight.numel() for layer in layers for group in layer for weight in group)
    record["weights"] = weights

    def report(what: str, row: dict) -> None:
        row = {"what": what, **row}
        record["times"].append(row)
        print(
            f"{what:28} {row['seconds']:9.4f} s  ({row['least']:.4f} to {row['most']:.4f})",
            row.get("scaled", ""),
            flush=True,
        )
        if given.output:
            given.output.write_text(json.dumps(record, indent=1))

    for name in names:
        quantizer = METHODS[name]
        row = seconds(partial(quantize_all, quantizer, stats), layers, given.repeats)
        row |= {"target_seconds": TARGETS.get(name)}
        if given.profile:
            one = gpu_seconds(partial(quantize_all, quantizer, stats, layers[:1]))
            row["one_layer"] = one
            print(f"  one layer: {one['gpu_seconds'] * 1e3:.3f} ms of GPU time", flush=True)
            for key, count, taken in one["kernels"]:
                print(f"    {taken * 1e3:9.3f} ms {count:5} {key}", flush=True)
        report(name, row)
    if "sinq" in names:
        uneven = random_layers(given.layers, 0.5)
        report("sinq, uneven weights", seconds(partial(quantize_all, METHODS["sinq"], stats), uneven, given.repeats))
        del uneven
    if given.peers:
        for name, call in peers().items():
            try:
                report(name, seconds(partial(each_weight, call), layers, given.repeats))
            except Exception as error:  # a peer that fails is a finding, not the end of the run
                print(f"{name} failed: {error!r}", flush=True)
                record["times"].append({"what": name, "error": repr(error)})
    if not given.no_plain:
        os.environ["QBENCH_KERNELS"] = "0"
        for name in names:
            part = layers[: PLAIN_LAYERS.get(name, given.layers)]
            once = seconds(partial(quantize_all, METHODS[name], stats), part, 1)
            factor = len(layers) / len(part)
            row = {key: value * factor if key != "repeats" else value for key, value in once.items()}
            report(f"{name}, plain torch", row | {"scaled": f"from {len(part)} layers" if factor > 1 else ""})
        del os.environ["QBENCH_KERNELS"]
    print(json.dumps({row["what"]: row.get("seconds") for row in record["times"]}))


if __name__ == "__main__":
    main()
