"""Folders of results as real points leave them, for tests of what reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qbench.intervals import paired_delta, perplexity
from qbench.record.identity import Identity
from qbench.record.quality import EvaluationRecord, MetricRecord, TaskRecord
from qbench.record.quantization import LayerRow, ModelRecord, QuantizationRecord
from qbench.record.result import Result
from qbench.record.store import Store, identity

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
BASELINE = np.random.default_rng(0).normal(3.3, 0.3, 24)


def nll(shift: float, seed: int = 0, noise: float = 0.01) -> np.ndarray:
    """Per-window NLLs of a model that loses `shift` nats per token on average."""
    return BASELINE + shift + np.random.default_rng(seed).normal(0, noise, len(BASELINE))


def layers(quantizer: str, blocks: int, error: float, bits: float) -> list[LayerRow]:
    return [
        LayerRow(
            name=f"model.layers.{block}.{kind}",
            shape=(64, 64),
            method=quantizer,
            backend="cpu",
            seconds=0.01,
            bits_per_weight=bits,
            packed_bytes=int(64 * 64 * bits / 8),
            relative_error=error * (1 + 0.01 * block),
            imbalance_before=20.0,
            imbalance_after=1.5 if quantizer == "sinq" else None,
            kurtosis_before=3.2,
            kurtosis_after=3.0,
        )
        for block in range(blocks)
        for kind in KINDS
    ]


def point(
    quantizer: str = "sinq",
    nbits: int = 4,
    windows: np.ndarray | None = None,
    *,
    model: str = "example",
    protocol: str = "mini:gptq-w512",
    bits: float | None = None,
    blocks: int = 4,
    seconds: float = 2.0,
    version: str = "0.1.0",
    day: int = 1,
    options: dict[str, Any] | None = None,
    error: float = 0.09,
) -> tuple[Result, dict[str, np.ndarray]]:
    """A finished point and its per-window NLLs."""
    windows = nll(0.2) if windows is None else windows
    bits = nbits + 0.5 if bits is None else bits
    config = {
        "model": {"name": model, "source": "random", "path": None},
        "quantizer": {"name": quantizer, "nbits": nbits, "group_size": 64, **(options or {})},
        "task": {"name": "mini", "protocol": protocol},
        "runtime": {"threads": 1, "batch_size": 1},
        "outputs": "outputs",
    }
    same = Identity(
        weights=f"random:{model}",
        remote_code=False,
        quantizer={"codebook": None} | config["quantizer"],
        text_sha256="ab",
        protocol={"name": "mini", "protocol": protocol, "window": 512},
        calibration=None,
        device="cpu",
        dtype="float32",
        runtime={"batch_size": 1, "offload": False},
        speed=None,
    )
    run_id = identity(same.key, version, day)
    delta = paired_delta(windows, BASELINE)
    rows = layers(quantizer, blocks, error, bits)
    record = EvaluationRecord(
        protocol=protocol,
        text_source="mini",
        text_sha256="ab",
        token_ids_sha256="cd",
        total_tokens=12400,
        leading_special_tokens=0,
        window_tokens=512,
        windows=len(windows),
        dropped_tokens=112,
        scored_tokens=511 * len(windows),
        ppl=perplexity(windows),
        baseline_ppl=perplexity(BASELINE),
        baseline_cached=False,
        ppl_delta=delta.value,
        ppl_delta_low=delta.low,
        ppl_delta_high=delta.high,
        window_nll_file=f"windows-{run_id}.safetensors",
    )
    packed = sum(row.packed_bytes for row in rows)
    result = Result(
        run_id=run_id,
        status="ok",
        error=None,
        created_utc=f"2026-01-{day:02d}T00:00:00+00:00",
        qbench_version=version,
        command=[f"model={model}", f"quantizer={quantizer}", f"quantizer.nbits={nbits}"],
        config=config,
        identity=same,
        environment={"device": "cpu", "dtype": "float32", "packages": {"torch": "2.13.0"}},
        model=ModelRecord(model, f"random:{model}", "", 200_000, 150_000, 400_000),
        quantization=QuantizationRecord(
            quantizer, None, seconds, seconds, bits, packed, packed + 1000, 1.0, None, 10**8, rows, []
        ),
        evaluation=[record],
    )
    return result, {"quantized": windows, "baseline": BASELINE}


def tasked(quantizer: str, correct: np.ndarray, **changes: Any) -> tuple[Result, dict[str, np.ndarray]]:
    """A finished point of an accuracy task with two subtasks; `correct` is 0 or 1 per document."""
    result, _ = point(quantizer, protocol="lmeval", **changes)
    metric = MetricRecord("acc", True, float(correct.mean()), baseline=0.75, delta=float(correct.mean()) - 0.75)
    other = MetricRecord("f1", True, 0.5)  # of the whole task: no documents to pair
    record = TaskRecord(
        protocol="lmeval:pair-v1-0shot",
        task="pair",
        version="1",
        documents=len(correct),
        documents_sha256="ef",
        num_fewshot=0,
        max_length=2048,
        bos_policy="none",
        text_source="pair",
        baseline_cached=False,
        metrics=[metric, other],
        scores_file=f"scores-{result.run_id}.safetensors",
    )
    half = len(correct) // 2
    scores = {"quantized/a/acc,none": correct[:half], "quantized/b/acc,none": correct[half:]}
    scores["quantized/pair/acc,none"] = correct
    return replace(result, evaluation=[], tasks=[record]), scores


def save(folder: Path, *points: tuple[Result, dict[str, np.ndarray]]) -> Path:
    """Writes the points under `folder` and returns it."""
    store = Store(folder)
    for result, windows in points:
        store.save(result, {name: windows for name in result.files()})
    return folder


def with_identity(point: tuple[Result, Any], **changes: Any) -> tuple[Result, Any]:
    """The point with another identity; a dict is merged into the part of that name. Its run_id changes with it."""
    result, scores = point
    parts = {key: getattr(result.identity, key) for key in changes}
    merged = {k: parts[k] | v if isinstance(v, dict) and parts[k] is not None else v for k, v in changes.items()}
    same = replace(result.identity, **merged)
    run_id = identity(same.key, result.qbench_version, result.created_utc)
    model = replace(result.model, fingerprint=same.weights)
    records = [replace(record, window_nll_file=f"windows-{run_id}.safetensors") for record in result.evaluation]
    return replace(result, run_id=run_id, identity=same, model=model, evaluation=records), scores


def failed(command: list[str], error: str, of: Result | None = None) -> tuple[Result, None]:
    """A point that failed; `of` is what it would have measured, by default what no other example does."""
    result = with_identity(point(), text_sha256=identity(command))[0] if of is None else of
    return replace(
        result,
        run_id=identity(command),
        status="failed",
        error=error,
        command=command,
        quantization=None,
        evaluation=[],
    ), None
