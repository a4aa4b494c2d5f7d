"""A layer's experts on a GPU, W4 with t beside transformers in bf16: python benchmarks/experts_multiply.py [-o FILE]

One layer of each shape: its experts hold random codes, scales, zero points and t, and the bf16 experts hold what those
stand for, so that both compute the same and are compared before they are timed. Tokens are sent to experts at random.
bf16 runs transformers' `grouped_mm` or, if that is faster for few tokens, `batched_mm`, which copies chosen experts.
Microseconds per call are medians of CUDA-graph replays over several routings.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from timing import DEVICE, Timing, time_calls
from torch import Tensor

from qbench.format.aux import Aux
from qbench.format.weight import QuantizedWeight
from qbench.kernels import grouped, ops
from qbench.layers.experts import QuantExperts
from qbench.layers.linear import use_kernels

SHAPES = {  # experts, of which a token is sent to; hidden and intermediate size
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "deepseek-v2.5": (160, 6, 5120, 1536),
    "tiny": (8, 2, 256, 128),
}
TOKENS = (1, 8, 16, 64, 128, 512, 2048, 8192, 16384)


def random_stack(experts: int, rows: int, columns: int, nbits: int = 4, group_size: int = 64) -> QuantizedWeight:
    """`[experts, rows, columns]`, made on the device; no sum over a row leaves the range of what it is made for."""
    uniform = lambda *shape: torch.rand(experts, *shape, device=DEVICE)  # noqa: E731
    planes = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}[nbits]
    groups = columns // group_size
    return QuantizedWeight(
        (experts, rows, columns),
        nbits,
        group_size,
        tuple(
            torch.randint(0, 256, (experts, rows, columns * width // 8), dtype=torch.uint8, device=DEVICE)
            for width in planes
        ),
        Aux(((uniform(rows, groups) + 0.5) * 2.0**-nbits / columns**0.5 * 4).half()),
        Aux((uniform(rows, groups) * 2 + 2 ** (nbits - 1) - 1).half()),
        (torch.randn(experts, columns, device=DEVICE) * 0.3).exp().half(),
    )


def made(shape: str, nbits: int = 4) -> tuple[QuantExperts, torch.nn.Module]:
    """The quantized experts of one layer, laid out for the kernels, and bf16 experts of the same weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts, per_token, hidden, inner = SHAPES[shape]
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=per_token
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        original = Qwen3MoeExperts(config).to(torch.bfloat16)
    original = original.to_empty(device=DEVICE).requires_grad_(False)
    stacks = []
    places = (original.gate_up_proj[:, :inner], original.gate_up_proj[:, inner:], original.down_proj)
    for place in places:
        stacks.append(random_stack(*place.shape, nbits))
        for index in range(experts):
            place[index].copy_(stacks[-1].select(index).dequantize(torch.bfloat16))
    quantized = QuantExperts(stacks, original)
    use_kernels(quantized)
    return quantized, original


def inputs(shape: str, tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """x, indices and scores of some calls, one graph's, each token to the best of random scores."""
    experts, per_token, hidden, _ = SHAPES[shape]
    calls = []
    for seed in range(16 if tokens <= 16 else 2 if tokens >= 2048 else 4):  # what few tokens read stays in the cache
        generator = torch.Generator(DEVICE).manual_seed(seed)
        scores = torch.rand(tokens, experts, generator=generator, device=DEVICE).topk(per_token)
        x = torch.randn(tokens, hidden, generator=generator, device=DEVICE).bfloat16()
        calls.append((x, scores.indices, (scores.values / scores.values.sum(-1, keepdim=True)).bfloat16()))
    return calls


def time_module(module: torch.nn.Module, calls: list[tuple[Tensor, Tensor, Tensor]]) -> Timing:
    return time_calls([lambda call=call: module(*call) for call in calls], 21 if len(calls[0][0]) < 2048 else 9)


def ways(tokens: int, pairs: int) -> dict[str, dict[tuple[object, str], int]]:
    """What is timed: the product as it is chosen, and the others, by the constants that choose them."""
    found = {"W4": {}}
    if pairs <= 4 * ops.EXPERT_PAIRS:
        found["W4 a pair at a time"] = {(ops, "EXPERT_PAIRS"): 2**30}
        found["W4 sorted, fused"] = {(ops, "EXPERT_PAIRS"): 0}
    if tokens >= 2048:
        found["W4 sorted, fused"] = {(grouped, "FUSED_PAIRS"): 2**30}
        found["W4 sorted, written in bf16"] = {(grouped, "FUSED_PAIRS"): 0}
    return found


def measure(shape: str, tokens: int, quantized: QuantExperts, original: torch.nn.Module) -> list[dict]:
    calls, rows = inputs(shape, tokens), []
    expected = original(*calls[0]).double()
    base = time_module(original, calls)
    if tokens <= 16:
        original.config._experts_implementation = "batched_mm"
        base = min(base, time_module(original, calls), key=lambda timing: timing.us)
        original.config._experts_implementation = "grouped_mm"
    rows.append({"shape": shape, "tokens": tokens, "kernel": "bf16", **vars(base), "speedup": 1.0})
    for name, constants in ways(tokens, calls[0][1].numel()).items():
        before = {key: getattr(*key) for key in constants}
        for (module, constant), value in constants.items():
            setattr(module, constant, value)
        try:
            error = float((quantized(*calls[0]).double() - expected).norm() / expected.norm())
            same = torch.equal(quantized(*calls[0]), quantized(*calls[0]))
            if not error < 1.5e-2 or not same:  # bf16 beside bf16
                raise SystemExit(f"{shape}, {tokens} tokens, {name}: {error:.2g} from bf16's result, the same: {same}")
            timing = time_module(quantized, calls)
        finally:
            for (module, constant), value in before.items():
                setattr(module, constant, value)
        rows.append(
            {"shape": shape, "tokens": tokens, "kernel": name, **vars(timing), "speedup": base.us / timing.us}
            | {"difference": error}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--shapes", default="qwen3-30b-a3b,deepseek-v2.5")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    chosen = parser.parse_args()
    about = SimpleNamespace(gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    print(f"{about.gpu}, torch {about.torch}")
    rows = []
    with torch.inference_mode():
        for shape in chosen.shapes.split(","):
            quantized, original = made(shape)
            for tokens in map(int, chosen.tokens.split(",")):
                for row in measure(shape, tokens, quantized, original):
                    rows.append(row)
                    title = f"{shape:14}{tokens:6}  {row['kernel']:28}"
                    spread = f"{row['us']:9.1f}{row['low']:9.1f}{row['high']:9.1f}"
                    print(f"{title}{spread}{row['speedup']:7.2f}", flush=True)
                if chosen.output:
                    chosen.output.write_text(json.dumps(vars(about) | {"rows": rows}, indent=1) + "\n")
            del quantized, original


if __name__ == "__main__":
    main()
