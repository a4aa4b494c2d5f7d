"""The readable end of a point, on stderr."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from qbench.record.quality import MetricRecord, detected
from qbench.record.quantization import FileRecord, QuantizationRecord
from qbench.record.result import Result
from qbench.record.speed import PhaseRecord, SpeedRecord


def show(result: Result) -> None:
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    if result.status != "ok" or result.quantization is None or result.model is None:
        console.print(f"FAILED: {result.error}", style="bold red", markup=False)
        console.print(f"run {result.run_id}", markup=False)
        return
    quantization, model, settings = result.quantization, result.model, result.config["quantizer"]
    options = " ".join(f"{k}={v}" for k, v in settings.items() if k != "name" and v is not None)
    title = f"{model.name}, {settings['name']}" + (f" ({options})" if options else "")
    table = Table(title_justify="left", title=None, box=None, pad_edge=False, show_header=True)
    for name, justify in (("", "left"), ("16 bit", "right"), (settings["name"], "right"), ("difference", "left")):
        table.add_column(name, justify=justify)
    many = any(metric.kinds for task in result.tasks for metric in task.metrics)
    for record in result.evaluation:
        divergence = record.divergence
        if many:  # kinds of text, a line each
            kl = "" if divergence is None else f"KL {divergence.kl.value:.4f}"
            _add_metric(table, record.perplexity, record.protocol, kl)
            continue
        _add_metric(table, record.perplexity, record.protocol)
        for metric in record.metrics:
            _add_metric(table, metric)
        if divergence is not None:
            kl, same = divergence.kl, divergence.top1_agreement
            table.add_row(
                *("KL(16 bit || quantized), nats", "0", f"{kl.value:.4f}"),
                f"median {divergence.kl_p50:.4f}, 99 % below {divergence.kl_p99:.3f}, 99.9 % {divergence.kl_p999:.3f}",
            )
            table.add_row("same most probable token", "100%", f"{same.value:.1%}", "")
    for task in result.tasks:
        for metric in task.metrics:
            _add_metric(table, metric, task.protocol)
    table.add_row("bits per weight, linears", "16", f"{quantization.bits_per_weight:.3f}", "codes and aux as stored")
    table.add_row(
        "model, MB",
        f"{model.baseline_bytes / 1e6:.1f}",
        f"{quantization.model_bytes / 1e6:.1f}",
        f"{model.baseline_bytes / quantization.model_bytes:.2f} times smaller; {_outside(quantization)}",
    )
    if (error := quantization.weight_error) is not None:
        table.add_row("relative weight error, mean", "0", f"{error:.4f}", f"{len(quantization.layers)} linears")
    table.add_row("quantizing, s", "", f"{quantization.quant_seconds:.1f}", f"coverage {quantization.coverage:.1%}")
    if result.speed is not None:
        _add_speed(table, result.speed)
    console.print(title, style="bold", markup=False)
    if model.note:
        console.print(f"model: {model.note}", markup=False)
    if quantization.file is not None:
        console.print(_told_of_file(quantization.file), markup=False)
    console.print(table)
    console.print(f"run {result.run_id}, recorded in {result.config['outputs']}/results/", markup=False)


def _outside(quantization: QuantizationRecord) -> str:
    bits = (quantization.embedding_bits, quantization.head_bits)
    return (
        "head and embeddings stay at 16 bit"
        if bits == (16, 16)
        else "embeddings {:.2f} bits, head {:.2f}".format(*bits)
    )


def _told_of_file(file: FileRecord) -> str:
    return f"file: {file.name}, {file.made_by}, {file.file_bytes / 1e6:.1f} MB" + (
        f"; {len(file.ignored)} of its tensors have no place in the model" if file.ignored else ""
    )


def _add_metric(table: Table, metric: MetricRecord, protocol: str = "", also: str = "") -> None:
    digits = metric.digits
    change = "no original" if metric.delta is None else f"{metric.delta:+.{digits}f}"
    if metric.delta_low is not None:
        change += f"  (95 %: {metric.delta_low:+.{digits}f} to {metric.delta_high:+.{digits}f})"
    if metric.spread is not None:
        change += f"; {len(metric.draws or ())} draws, spread {metric.spread:.{digits}f}"
    if metric.sample_spread is not None:
        change += f"; {len(metric.samples or ())} samples, spread {metric.sample_spread:.{digits}f}"
    if told := detected(metric.verdict, metric.detectable, digits):
        change += f"; {told}"
    if metric.flip_rate is not None:
        change += f"; {metric.flip_rate:.1%} flipped"
    if metric.turned_right is not None and metric.p_value is not None:
        change += f" ({metric.turned_right} right, {metric.turned_wrong} wrong, McNemar p {metric.p_value:.3f})"
    if metric.flip_rate_alone is not None:
        change += f" ({metric.flip_rate_alone:.1%} by sampling alone)"
    if metric.kinds and (worst := metric.worst_kind) is not None:
        change += f"; worst on {worst}, {metric.kinds[worst]:.{digits}f}"
    if also:
        change += f"; {also}"
    baseline = "" if metric.baseline is None else f"{metric.baseline:.{digits}f}"
    name = metric.called.replace("_", " ")
    table.add_row(f"{name}, {protocol}" if protocol else name, baseline, f"{metric.value:.{digits}f}", change)


def _add_speed(table: Table, speed: SpeedRecord) -> None:
    shapes = {"prefill": f"{speed.prefill_tokens} tokens", "decode": f"after {speed.context_tokens} tokens"}
    for phase, shape in shapes.items():
        ours = getattr(speed.quantized, phase)
        base = getattr(speed.baseline, phase) if speed.baseline is not None else None
        ratio = ""
        if base is not None:
            times = ours.tokens_per_second.median / base.tokens_per_second.median
            ratio = f"{times:.2f} times as fast; "
        method = "" if ours.method == "eager" and ours.eager_because is None else f", {ours.method}"
        batch = f"batch {speed.batch_size}, median of {speed.repeats}{method}"
        table.add_row(f"{phase}, tokens/s, {shape}", _rate(base), _rate(ours), ratio + batch)
        if ours.joules_per_token is not None:
            other = "" if base is None or base.joules_per_token is None else f"{base.joules_per_token:.3g}"
            table.add_row(f"{phase}, joules/token", other, f"{ours.joules_per_token:.3g}", "the whole GPU, by NVML")
        whose = "of the process" if ours.peak_alloc_bytes is None else "allocated, weights and cache included"
        table.add_row(f"{phase}, peak memory, MB", _peak(base), _peak(ours), whose)


def _rate(phase: PhaseRecord | None) -> str:
    return "" if phase is None else f"{phase.tokens_per_second.median:.1f}"


def _peak(phase: PhaseRecord | None) -> str:
    peak = phase and (phase.peak_alloc_bytes or phase.peak_rss_bytes)
    return f"{peak / 1e6:.0f}" if peak else ""
