"""What calibrated methods cost through the product's own pass, beside a bare forward pass over the same tokens.

    python benchmarks/calibrate.py --shape qwen3-8b --sequences 128 --methods gptq         the whole model
    python benchmarks/calibrate.py --shape qwen3-30b-a3b --sequences 32 --methods gptq awq --layers 2 6 --profile
    python benchmarks/calibrate.py --parts                 X^T X, the factors and the column loop, one by one

A random model of the shape, made on the device block by block, is quantized with each method. With --layers two
numbers of layers are measured, and the whole model's seconds are those of the fewer and, for every layer more, what one
of the layers between took. Before, each method runs once on a short text, so that kernels are compiled. The
calibration text is random letters, 2048 tokens a sequence, so that a mixture's tokens go to many experts. Each line
is JSON, and is appended to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from passes import timed

WINDOW, BATCH = 2048, 8
LETTERS = [chr(code) for code in range(33, 127)]


def write(folder: Path, name: str, characters: int) -> Path:
    path, draw = folder / name, random.Random(0)
    path.write_text("".join(draw.choices(LETTERS, k=characters)))
    return path


def point(words: list[str]) -> Any:
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from qbench.config import register
    from qbench.request.prepare import prepare

    register()
    with initialize_config_module("qbench.conf", version_base="1.3"):
        return prepare(OmegaConf.to_object(compose("config", words)), words)


def quantized(shape: str, layers: int, method: str, sequences: int, window: int) -> dict[str, Any]:
    """The seconds of one point's phases, and of the quantizer alone, with what its rows say of experts."""
    from qbench.run import run_pass

    words = ["model=random", f"model.shape={shape}", f"model.layers={layers}", "calibration=file"]
    words += ["calibration.path=calibration.txt", f"calibration.sequences={sequences}", f"calibration.window={window}"]
    words += ["task=text", "task.path=text.txt", "task.max_windows=1", f"task.window={min(window, WINDOW)}"]
    words += ["runtime.rerun=true", *f"quantizer={method}".split()]
    started = time.perf_counter()
    [(_, result)] = run_pass([point(words)])
    if result.error:
        raise SystemExit(result.error)
    rows = result.quantization.layers
    return result.seconds | {
        "wall": time.perf_counter() - started,
        "quantizer": sum(row.seconds for row in rows),
        "on all tokens": sum("all tokens" in row.method for row in rows),
        "rows": len(rows),
        "peak_alloc_bytes": result.quantization.peak_alloc_bytes,
    }


def bare(shape: str, layers: int, sequences: int, window: int) -> float:
    """Seconds of transformers' own forward pass through the blocks, without logits."""
    from qbench.sources.random import Random

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Random(shape=shape, layers=layers).load(torch.bfloat16, device, Path.cwd()).model.eval()
    ids = torch.randint(33, 127, (sequences, window), device=device)

    @torch.no_grad()
    def run() -> None:
        for some in ids.split(BATCH):
            model.model(some, use_cache=False)

    run()
    return timed(run) if torch.cuda.is_available() else 0.0


def through_the_pass(shape: str, layers: list[int], sequences: int, window: int, methods: list[str], profile: bool):
    """The whole model where `layers` are none, else the two numbers of layers that the whole one's are taken from."""
    from qbench.sources.shapes import depth

    settings = {"shape": shape, "layers": layers, "tokens": sequences * window}
    most = layers[-1] if layers else 4
    yield settings | {"bare_forward_seconds_a_layer": bare(shape, most, sequences, window) / most}
    for method in methods:
        quantized(shape, 2, method, min(sequences, 2), window)
        measured = [quantized(shape, count, method, sequences, window) for count in layers or [depth(shape)]]
        found = {key: measured[-1][key] for key in ("quantize", "quantizer")}
        if layers:
            few, more = layers
            a_block = {key: (found[key] - measured[0][key]) / (more - few) for key in found}
            found = {key: measured[0][key] + a_block[key] * (depth(shape) - few) for key in found}
        yield settings | {"method": method, "whole_seconds": found, "measured": measured}
        if profile:
            call = partial(quantized, shape, 2, method, sequences, window)
            yield settings | {"method": method, **profiled(call)}


def profiled(call: Callable[[], Any], top: int = 24) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        call()
        torch.cuda.synchronize()
    kernels, host = [], []
    for event in record.key_averages():
        (kernels if "cuda" in str(event.device_type).lower() else host).append(event)
    kernels.sort(key=lambda e: -e.self_device_time_total)
    host.sort(key=lambda e: -e.self_cpu_time_total)
    return {
        "gpu_seconds": sum(e.self_device_time_total for e in kernels) / 1e6,
        "kernels": [[e.key[:70], e.count, round(e.self_device_time_total / 1e3, 2)] for e in kernels[:top]],
        "host": [[e.key[:40], e.count, round(e.self_cpu_time_total / 1e3, 2)] for e in host[: top // 2]],
    }


def milliseconds(call: Callable[[], Any], repeats: int = 5) -> list[float]:
    """Median, least and most, after one call that compiles and fills the allocator."""
    call()
    taken = [1e3 * timed(call) for _ in range(repeats)]
    return [round(value, 3) for value in (statistics.median(taken), min(taken), max(taken))]


def parts():
    """Of X^T X: its error against fp64 and its time. Of a batch of Hessians: the factor's. And the column loop."""
    from qbench.plugins.gptq import GPTQ
    from qbench.quant import cholesky, gram
    from qbench.quant.quantizer import InputStatistics

    generator = torch.Generator("cuda").manual_seed(0)

    def rows(columns: int, tokens: int = 16384) -> torch.Tensor:
        sizes = (0.7 * torch.randn(columns, generator=generator, device="cuda")).exp()
        x = torch.randn(tokens, columns, generator=generator, device="cuda") * sizes
        return (x + 0.5 * x.roll(1, 1)).bfloat16()

    for columns in (2048, 4096, 12288):
        x = rows(columns)
        made, plain = (torch.zeros(columns, columns, device="cuda") for _ in range(2))
        gram.add(made, x)
        gram.complete(made)
        plain.addmm_(x.float().T, x.float())
        some = slice(0, min(columns, 2048))
        exact = x[:, some].double().T @ x.double()
        size = (exact[:, some].diagonal()[:, None] * x.double().square().sum(0)).sqrt()
        error = {name: float(((h[some] - exact).abs() / size).max()) for name, h in (("16 bit", made), ("fp32", plain))}
        del exact, size
        took = {
            "16 bit": milliseconds(lambda x=x, h=made: gram.add(h, x)),
            "fp32": milliseconds(lambda x=x, h=made: h.addmm_(x.float().T, x.float()), 2),
            "whole": milliseconds(lambda x=x: torch.mm(x.T, x, out_dtype=torch.float32)),
        }
        yield {"what": "X^T X of 16,384 rows", "columns": columns, "largest error": error, "milliseconds": took}

    for tokens in (2048, 4096, 8192, 16384, 65536):
        x = rows(2048, tokens)
        made, exact = torch.mm(x.T, x, out_dtype=torch.float32).double(), x.double().T @ x.double()
        size = exact.diagonal().sqrt()
        apart = (made - exact) / (size[:, None] * size)
        row = {"what": "one product of 16 bits", "rows": tokens, "largest error": float(apart.abs().max())}
        yield row | {"mean error of the diagonal": float(apart.diagonal().mean())}

    for count, columns in ((1, 4096), (1, 12288), (32, 2048), (64, 768)):
        x = [rows(columns, max(2048, columns)).float() for _ in range(count)]
        hessians = torch.stack([one.T @ one for one in x])
        hessians /= hessians.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        row: dict[str, Any] = {"what": "factor", "matrices": count, "columns": columns}
        for block in (128, 256, 512) if count > 1 else (0,):
            cholesky.BLOCK = block or cholesky.BLOCK
            row[f"blocks of {block}"] = milliseconds(lambda h=hessians: cholesky.unit_factors(h.clone(), 0.01), 3)
        cholesky.BLOCK = 256
        unit, _ = cholesky.unit_factors(hessians[:1].flip(1, 2).clone(), 0.01)
        damped = hessians[0].double() + 0.01 * torch.eye(columns, device="cuda")
        lower = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
        row["error"] = float((unit[0].triu() - lower / lower.diagonal()).abs().max())
        out = {768: 2048, 2048: 1536, 4096: 24576, 12288: 4096}[columns]
        weights = torch.randn(count, out, columns, generator=generator, device="cuda").bfloat16() * 0.02
        stats = [InputStatistics(16384, hessian=one) for one in hessians]
        names = [[str(i) for i in range(count)]]
        row["GPTQ, all of it"] = milliseconds(lambda w=weights, s=stats, n=names: GPTQ().quantize_stacks(n, [w], s), 3)
        if count > 1:
            together = GPTQ().quantize_stacks(names, [weights], stats)[0]
            again = GPTQ().quantize_stacks(names, [weights], stats)[0]
            alone = GPTQ().quantize([weights[1]], stats[1])[0]
            row["codes as alone"] = float((together.select(1).codes() == alone.codes()).double().mean())
            row["same bits twice"] = bool((together.codes() == again.codes()).all())
        row["profile"] = profiled(lambda w=weights, s=stats, n=names: GPTQ().quantize_stacks(n, [w], s), 8)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b")
    parser.add_argument("--layers", type=int, nargs=2, default=())
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--methods", nargs="+", default=["gptq", "awq"], help="as `gptq quantizer.nbits=3`, quoted")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    out = asked.out.absolute() if asked.out else None
    card = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        write(Path(place), "calibration.txt", asked.sequences * asked.window + 16)
        write(Path(place), "text.txt", 2 * asked.window)
        found = parts()
        if not asked.parts:
            given = asked.shape, list(asked.layers), asked.sequences, asked.window
            found = through_the_pass(*given, asked.methods, asked.profile)
        for row in found:
            line = json.dumps(card | row)
            print(line, flush=True)
            if out is not None:
                with out.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
