"""Seconds to quantize the experts of a mixture on one GPU as the product does it, rows included, after checking them.

    python benchmarks/experts.py [--shape qwen3-30b-a3b] [--layers 8] [--repeats 3] [--methods rtn,sinq] [--output FILE]

Weights are random, bf16, on the GPU, in the module that transformers itself holds experts in. A layer is its experts by
passes.experts.quantize_experts and its attention by passes.quantize.quantize_linears, from an idle GPU to an idle one,
diagnostics, rows and host included; what is made is let go layer by layer. `seconds_of_model` are those of the layers
times the model's layers over them. Checks: stacks equal matrix by matrix to the bit what each is alone, on matrices of
full size; what rows say agrees with plain torch; weights written out equal `dequantize` to the bit. "one by one" is the
same path with every expert quantized alone, on one layer.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from qbench.layers.dense import write
from qbench.passes.experts import quantize_experts
from qbench.passes.measured import measured
from qbench.passes.quantize import quantize_linears
from qbench.passes.variant import run_experts_as, sharing
from qbench.plugins.fp8 import FP8
from qbench.plugins.hqq import HQQ
from qbench.plugins.mxfp4 import MXFP4
from qbench.plugins.nf4 import NF4
from qbench.plugins.nvfp4 import NVFP4
from qbench.plugins.rtn import RTN
from qbench.plugins.sinq import SINQ
from qbench.quant.quantizer import Quantizer

DEVICE = os.environ.get("BENCH_DEVICE", "cuda")  # another one only to try the script out
# layers of the model, experts, hidden, intermediate; and of a layer's other linears, group by group
SHAPES = {
    "qwen3-30b-a3b": (48, 128, 2048, 768, (((4096, 2048), (512, 2048), (512, 2048)), ((2048, 4096),))),
    "deepseek-v2.5": (60, 160, 5120, 1536, ()),
    "tiny": (2, 5, 128, 64, (((64, 128), (32, 128)),)),
}
METHODS = {
    **{"rtn": RTN(), "nf4": NF4(), "sinq": SINQ(), "hqq": HQQ(), "rtn 3 int8": RTN(nbits=3, aux_dtype="int8")},
    **{
        "sinq nf4": SINQ(codebook="nf4"),
        "sinq hqq": SINQ(inner="hqq"),
        "fp8": FP8(),
        "mxfp4": MXFP4(),
        "nvfp4": NVFP4(),
    },
}
TARGETS = {"rtn": 1.0, "nf4": 1.5, "sinq": 2.5}  # seconds of a model, qwen3-30b-a3b


def layer(shape: str, seed: int) -> tuple[nn.Module, list[dict[str, nn.Linear]]]:
    """Experts, and the groups of a layer's other linears: rows and columns of uneven size, as trained ones have."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    _, experts, hidden, intermediate, groups = SHAPES[shape]
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts)
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for name, parameter in list(module.named_parameters()):
        stack = torch.empty(parameter.shape, dtype=torch.bfloat16, device=DEVICE)
        for matrix in stack:
            matrix.copy_(random_weight(matrix.shape, generator))
        setattr(module, name, nn.Parameter(stack, requires_grad=False))
    linears = []
    for j, group in enumerate(groups):
        made = {f"{seed}.{j}.{k}": nn.Linear(*size[::-1], bias=False, device="meta") for k, size in enumerate(group)}
        for one in made.values():
            one.weight = nn.Parameter(random_weight(one.weight.shape, generator), requires_grad=False)
        linears.append(made)
    return module, linears


def random_weight(shape: torch.Size, generator: torch.Generator) -> Tensor:
    weight = torch.randn(shape, generator=generator, device=DEVICE) * 0.02
    for dim in (0, 1):
        size = [n if i == dim else 1 for i, n in enumerate(shape)]
        weight *= (0.3 * torch.randn(size, generator=generator, device=DEVICE)).exp()
    return weight.bfloat16()


def check(name: str, quantizer: Quantizer, module: nn.Module, experts: int = 6) -> dict:
    """Of some experts of full size: codes and aux against those of each alone, rows against plain torch."""
    experts = min(experts, module.num_experts)
    both = module.gate_up_proj.detach()[:experts].chunk(2, 1)
    down = module.down_proj.detach()[:experts]
    differing, furthest, restored = 0, {}, 0
    for weights in (list(both), [down]):
        names = [[f"{j}.{e}" for e in range(experts)] for j in range(len(weights))]
        stacks = quantizer.quantize_stacks(names, weights)
        for e in range(experts):
            alone = quantizer.quantize_layers(names, [weight[e] for weight in weights], None)
            for stack, one in zip(stacks, alone, strict=True):
                mine, other = stack.select(e).tensors(), one.tensors()
                differing += sum(not torch.equal(mine[key], other[key]) for key in mine.keys() | other.keys())
        for weight, stack in zip(weights, stacks, strict=True):
            out = torch.empty_like(weight)
            write(stack, out)
            restored += not torch.equal(out, stack.dequantize(torch.bfloat16))
            fast = measured(weight, stack)
            os.environ["QBENCH_KERNELS"] = "0"
            plain = measured(weight, stack)
            del os.environ["QBENCH_KERNELS"]
            for key in plain:
                far = float((fast[key] / plain[key] - 1).abs().max())
                furthest[key] = max(furthest.get(key, 0.0), far)
    found = {"method": name, "matrices": 3 * experts, "buffers_differing_from_alone": differing}
    return found | {"stacks_written_otherwise": restored, "rows_furthest_from_torch": furthest}


def quantize(quantizer: Quantizer, layers: list) -> list:
    rows = []
    for i, (module, groups) in enumerate(layers):
        _, own = quantize_experts(f"layers.{i}.mlp.experts", module, quantizer)
        rows += own
        for group in groups:
            rows += [row for _, row in quantize_linears(group, quantizer).values()]
    return rows


def sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], repeats: int) -> dict:
    call()
    taken = []
    for _ in range(repeats):
        sync()
        started = time.perf_counter()
        call()
        sync()
        taken.append(time.perf_counter() - started)
    return {"seconds": statistics.median(taken), "least": min(taken), "most": max(taken), "repeats": repeats}


def profile(call: Callable[[], object], top: int = 10) -> dict:
    """GPU seconds by kernel, and host seconds by function, each in a run of its own."""
    host = cProfile.Profile()
    host.runcall(call)
    text = io.StringIO()
    pstats.Stats(host, stream=text).sort_stats("tottime").print_stats(14)
    lines = [line for line in text.getvalue().splitlines() if line.strip()][5:]
    found = {"host": lines}
    if DEVICE == "cuda":
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as record

        with record(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            sync()
        kernels = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
        found["gpu_seconds"] = sum(e.self_device_time_total for e in kernels) / 1e6
        found["launches"] = sum(e.count for e in kernels if e.self_device_time_total)
        found["kernels"] = [[e.key[:50], e.count, e.self_device_time_total / 1e6] for e in kernels[:top]]
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--methods", default=",".join(METHODS))
    options.add_argument("--only-check", action="store_true")
    options.add_argument("--no-check", action="store_true")
    options.add_argument("--profile", default="", help="methods of which one layer is profiled")
    options.add_argument("--one-by-one", default="", help="methods that also take one layer expert by expert")
    options.add_argument("--output", type=Path)
    given = options.parse_args()
    names = given.methods.split(",")
    if (DEVICE == "cuda" and not torch.cuda.is_available()) or set(names) - set(METHODS):
        raise SystemExit(f"needs a CUDA device, and --methods out of {', '.join(METHODS)}")
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    record: dict = {"gpu": gpu, "torch": torch.__version__, "shape": given.shape, "layers": given.layers}
    record |= {"checks": [], "times": []}

    def report(kind: str, row: dict) -> None:
        record[kind].append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "host"}), flush=True)
        for line in row.get("host", []):
            print("   ", line, flush=True)
        if given.output:
            given.output.write_text(json.dumps(record, indent=1))

    layers = [layer(given.shape, seed) for seed in range(1 if given.only_check else given.layers)]
    if not given.no_check:
        for name in names:
            report("checks", check(name, METHODS[name], layers[0][0]))
    if given.only_check:
        return
    weights = sum(p.numel() for module, groups in layers for p in module.parameters())
    weights += sum(
        p.numel() for _, groups in layers for group in groups for one in group.values() for p in one.parameters()
    )
    record["weights"], of_model = weights, SHAPES[given.shape][0] / given.layers
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for name in names:
        quantizer = METHODS[name]
        row = {"what": name} | seconds(lambda q=quantizer: quantize(q, layers), given.repeats)
        rows = quantize(quantizer, layers)
        row |= {"seconds_of_model": row["seconds"] * of_model, "target": TARGETS.get(name)}
        row |= {"rows": len(rows), "in_the_quantizer": sum(one.seconds for one in rows)}
        if DEVICE == "cuda":
            row["peak_alloc_bytes"] = torch.cuda.max_memory_allocated()
        report("times", row)
        module = layers[0][0]
        packed, _ = quantize_experts("layers.0.mlp.experts", module, quantizer)
        dense = sharing(module)
        report(
            "times",
            {"what": f"{name}, one layer written out"} | seconds(lambda d=dense, p=packed: run_experts_as(d, p), 3),
        )
        del packed, dense
        if name in given.profile.split(","):
            report("times", {"what": f"{name}, one layer"} | profile(lambda q=quantizer: quantize(q, layers[:1])))
        if name in given.one_by_one.split(","):
            lone = type(quantizer).__name__
            alone = type(lone, (type(quantizer),), {"stacks": False})(**vars(quantizer))
            once = seconds(lambda q=alone: quantize(q, layers[:1]), 1)
            report("times", {"what": f"{name}, one by one, one layer"} | once)


if __name__ == "__main__":
    main()
