"""Decoding speed of a Qwen3-8B-shaped model at batch 1: python benchmarks/decode.py [-o results.json]

The model is transformers' Qwen3ForCausalLM with random weights, built on the GPU: bf16, or quantized from the start.
One token is one CUDA graph over a static cache: its linears (bf16 cuBLAS, or the fused kernels), and three small
Triton kernels for everything else, the same for both; like the fused kernels they let the next kernel start while they
run (programmatic dependent launch), so that it can fetch its weights meanwhile. First it is compared with transformers'
own forward on a small configuration. `merged` computes q/k/v and gate/up as one matrix each, as inference engines do;
with a t per input channel that needs one t for the merged matrices (SINQ with a shared t), so `separate` is what the
harness itself runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from timing import random_weight
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qbench.layers.linear import QuantLinear, use_kernels

PDL = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
BLOCK = 128  # cached positions that a head attends to at a time
QWEN3_8B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}


@triton.jit
def _add_norm(x, delta, gain, out, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """x += delta; out = RMSNorm(x) * gain, for one token."""
    gdc_launch_dependents()
    i = tl.arange(0, BLOCK)
    inside = i < width
    gained = tl.load(gain + i, mask=inside, other=0.0).to(tl.float32)
    gdc_wait()
    value = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + i, value.to(x.dtype.element_ty), mask=inside)
        value = value.to(x.dtype.element_ty).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / width + eps)
    normed = (value * scale).to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + i, (normed * gained).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _silu_product(gate, up, out, width, BLOCK: tl.constexpr):
    gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gdc_wait()
    g = tl.load(gate + i, mask=i < width, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < width, other=0.0).to(tl.float32)
    g = (g / (1 + tl.exp(-g))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + i, (g * u).to(out.dtype.element_ty), mask=i < width)


@triton.jit
def _norm_and_rotate(x, gain, position, theta_log2, eps, HALF: tl.constexpr):
    """One head's RMSNorm and rotary embedding; returns its two halves in fp32."""
    i = tl.arange(0, HALF)
    a, b = tl.load(x + i).to(tl.float32), tl.load(x + HALF + i).to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a) + tl.sum(b * b)) / (2 * HALF) + eps)
    a, b = a * scale * tl.load(gain + i).to(tl.float32), b * scale * tl.load(gain + HALF + i).to(tl.float32)
    angle = position.to(tl.float32) * tl.exp2(-theta_log2 * i.to(tl.float32) / HALF)
    cos, sin = tl.cos(angle), tl.sin(angle)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _attend(
    q,
    k,
    v,
    q_gain,
    k_gain,
    keys,
    values,
    out,
    position_at,
    length,
    theta_log2,
    eps,
    SHARED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One query head of one token: norms, rotary embedding, cache `[kv heads, length, head_dim]`, attention."""
    gdc_launch_dependents()
    head = tl.program_id(0)
    kv = head // SHARED
    gdc_wait()
    position = tl.load(position_at)
    i = tl.arange(0, HALF)
    dtype = out.dtype.element_ty
    q1, q2 = _norm_and_rotate(q + head * 2 * HALF, q_gain, position, theta_log2, eps, HALF)
    k1, k2 = _norm_and_rotate(k + kv * 2 * HALF, k_gain, position, theta_log2, eps, HALF)
    k1, k2 = k1.to(dtype).to(tl.float32), k2.to(dtype).to(tl.float32)
    v1, v2 = tl.load(v + kv * 2 * HALF + i), tl.load(v + kv * 2 * HALF + HALF + i)
    at = (kv * length + position) * 2 * HALF
    if head % SHARED == 0:
        tl.store(keys + at + i, k1.to(dtype))
        tl.store(keys + at + HALF + i, k2.to(dtype))
        tl.store(values + at + i, v1)
        tl.store(values + at + HALF + i, v2)
    soften = 1.4426950408889634 / tl.sqrt(2.0 * HALF)
    q1, q2 = q1 * soften, q2 * soften
    top = tl.sum(q1 * k1) + tl.sum(q2 * k2)  # of the new token itself, which is not read back from the cache
    total = top * 0 + 1
    y1, y2 = v1.to(tl.float32), v2.to(tl.float32)
    start = position * 0
    while start < position:
        n = start + tl.arange(0, BLOCK)
        inside = (n < position)[:, None]
        base = (kv * length + n)[:, None] * 2 * HALF + i[None, :]
        a = tl.load(keys + base, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(keys + base + HALF, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(a * q1[None, :], 1) + tl.sum(b * q2[None, :], 1)
        score = tl.where(n < position, score, -float("inf"))
        higher = tl.maximum(top, tl.max(score))
        weight, shrink = tl.exp2(score - higher), tl.exp2(top - higher)
        a = tl.load(values + base, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(values + base + HALF, mask=inside, other=0.0).to(tl.float32)
        y1 = y1 * shrink + tl.sum(a * weight[:, None], 0)
        y2 = y2 * shrink + tl.sum(b * weight[:, None], 0)
        total = total * shrink + tl.sum(weight)
        top = higher
        start += BLOCK
    tl.store(out + head * 2 * HALF + i, (y1 / total).to(dtype))
    tl.store(out + head * 2 * HALF + HALF + i, (y2 / total).to(dtype))


class Decoder:
    """One token at a time through a Qwen3ForCausalLM, over a static cache of `length` positions."""

    def __init__(self, model: Qwen3ForCausalLM, length: int) -> None:
        self.model, self.length, config = model, length, model.config
        weight = model.model.norm.weight
        empty = lambda *shape: torch.zeros(shape, dtype=weight.dtype, device=weight.device)  # noqa: E731
        heads, shared = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        self.shared, self.half = shared, config.head_dim // 2
        self.caches = [empty(2, heads, length, config.head_dim) for _ in model.model.layers]
        self.position = torch.zeros(1, dtype=torch.int32, device=weight.device)
        self.token = torch.zeros(1, dtype=torch.int64, device=weight.device)
        theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
        self.theta_log2 = float(torch.log2(torch.tensor(float(theta))))
        self.normed = empty(1, config.hidden_size)
        self.attended = empty(1, config.num_attention_heads * config.head_dim)
        self.product = empty(1, config.intermediate_size)

    def norm(self, x: Tensor, delta: Tensor | None, norm: nn.Module) -> Tensor:
        width = x.shape[-1]
        block = triton.next_power_of_2(width)
        given = x if delta is None else delta
        options = {"num_warps": 16, "launch_pdl": PDL}
        add, eps = delta is not None, norm.variance_epsilon
        _add_norm[(1,)](x, given, norm.weight, self.normed, width, eps, add, block, **options)
        return self.normed

    def step(self) -> Tensor:
        """Logits `[1, vocabulary]` after `self.token`; moves `self.position` on and puts the best token in place."""
        model, config = self.model.model, self.model.config
        x = F.embedding(self.token, model.embed_tokens.weight)
        delta = None
        for layer, cache in zip(model.layers, self.caches, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            q, k, v = _project(attention, ("q_proj", "k_proj", "v_proj"), self.norm(x, delta, layer.input_layernorm))
            _attend[(config.num_attention_heads,)](
                q,
                k,
                v,
                attention.q_norm.weight,
                attention.k_norm.weight,
                cache[0],
                cache[1],
                self.attended,
                self.position,
                self.length,
                self.theta_log2,
                config.rms_norm_eps,
                self.shared,
                self.half,
                BLOCK,
                num_warps=8,
                launch_pdl=PDL,
            )
            delta = attention.o_proj(self.attended)
            gate, up = _project(mlp, ("gate_proj", "up_proj"), self.norm(x, delta, layer.post_attention_layernorm))
            width = gate.shape[-1]
            _silu_product[(-(-width // 1024),)](gate, up, self.product, width, 1024, launch_pdl=PDL)
            delta = mlp.down_proj(self.product)
        logits = self.model.lm_head(self.norm(x, delta, model.norm))
        self.token.copy_(logits.argmax(-1))
        self.position += 1
        return logits


def _project(module: nn.Module, names: tuple[str, ...], x: Tensor) -> tuple[Tensor, ...]:
    """The linears `names` of a module, or the one that `merge` put in place of them."""
    if (merged := getattr(module, "merged", None)) is not None:
        return merged(x).split(module.merged_rows, -1)
    return tuple(getattr(module, name)(x) for name in names)


def build(config: Qwen3Config, nbits: int | None, merged: bool, device: str) -> Qwen3ForCausalLM:
    """A random model on `device`: bf16, or with every linear of its blocks quantized (groups of 64, zero, t)."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)

    def random(rows: int, columns: int) -> nn.Module:
        if nbits is not None:
            return QuantLinear(random_weight(rows, columns, nbits, device=device))
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=device) / columns**0.5
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear

    for layer in model.model.layers:
        for module, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.mlp, ("gate_proj", "up_proj"))):
            rows = [getattr(module, name).weight.shape[0] for name in names]
            columns = getattr(module, names[0]).weight.shape[1]
            if merged:
                module.merged, module.merged_rows = random(sum(rows), columns), rows
            for name, own in zip(names, rows, strict=True):
                setattr(module, name, nn.Identity() if merged else random(own, columns))
        for module, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            setattr(module, name, random(*getattr(module, name).weight.shape))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, key = name.rpartition(".")
            shape = parameter.shape
            value = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02 if len(shape) > 1 else None
            value = torch.ones(shape, dtype=torch.bfloat16, device=device) if value is None else value
            setattr(model.get_submodule(owner), key, nn.Parameter(value, requires_grad=False))
    use_kernels(model)
    return model.eval()


def difference(device: str, dtype: torch.dtype) -> float:
    """||logits - transformers' logits|| / ||logits|| after seven tokens of a small model."""
    torch.manual_seed(0)
    small = QWEN3_8B | {"vocab_size": 100, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = Qwen3ForCausalLM(Qwen3Config(**small)).eval().to(device, dtype)
    for parameter in model.parameters():
        parameter.data = torch.rand_like(parameter) + 0.5 if parameter.dim() == 1 else torch.randn_like(parameter) * 0.1
    tokens = torch.randint(0, 100, (1, 7), device=device)
    with torch.inference_mode():
        expected = model(tokens).logits[0, -1].float()
        decoder = Decoder(model, 64)
        for token in tokens[0]:
            decoder.token.fill_(int(token))
            logits = decoder.step()
    return float((logits[0].float() - expected).norm() / expected.norm())


def measure(model: Qwen3ForCausalLM, context: int, tokens: int) -> dict[str, float]:
    """Tokens per second over `tokens` tokens after `context`, by replaying the graph of one token."""
    with torch.inference_mode():
        decoder = Decoder(model, context + 2 * tokens + 8)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                decoder.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = decoder.step()
        rates = []
        for _ in range(3):
            decoder.position.fill_(context)
            graph.replay()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(tokens):
                graph.replay()
            end.record()
            end.synchronize()
            rates.append(tokens / start.elapsed_time(end) * 1e3)
        if not torch.isfinite(logits).all():
            raise SystemExit("the logits are not finite")
    return {"tokens_per_second": statistics.median(rates), "low": min(rates), "high": max(rates)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache when timing starts")
    parser.add_argument("--tokens", type=int, default=128)
    chosen = parser.parse_args()
    error = difference("cuda", torch.bfloat16)
    print(f"against transformers' forward, bf16: {error:.1e}")
    if not error < 3e-2:
        raise SystemExit("the decoder does not compute what transformers computes")
    rows = []
    base: dict[bool, float] = {}
    for merged in (False, True):
        for name, nbits in (("bf16", None), ("W4", 4), ("W3", 3), ("W2", 2), ("W8", 8)):
            model = build(Qwen3Config(**QWEN3_8B), nbits, merged, "cuda")
            row = {"weights": name, "merged": merged} | measure(model, chosen.context, chosen.tokens)
            del model
            torch.cuda.empty_cache()
            base.setdefault(merged, row["tokens_per_second"])
            row["speedup"] = row["tokens_per_second"] / base[merged]
            rows.append(row)
            form = "merged" if merged else "separate"
            print(f"{name:5} {form:9} {row['tokens_per_second']:7.1f} tok/s  {row['speedup']:.2f}x", flush=True)
    if chosen.output:
        result = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "context": chosen.context,
            "rows": rows,
        }
        chosen.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
