"""The readable end of a point, on stderr."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from qbench.record.quality import MetricRecord, detected
from qbench.record.quantization import FileRecord, QuantizationRecord
from qbench.record.result import Result
from qbench.record.speed import PhaseRecord, SpeedRecord, SpreadRecord


def show(result: Result) -> None:
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    if result.status != "ok" or result.quantization is None or result.model is None:
        console.print(f"FAILED: {result.error}", style="bold red", markup=False)
        console.print(f"run {result.run_id}", markup=False)
        return
    quantization, model, settings = result.quantization, result.model, result.config["quantizer"]
    options = " ".join(f"{k}={v}" for k, v in settings.items() if k != "name" and v is not None)
    before = f"{quantization.transform.name} + " if quantization.transform is not None else ""
    title = f"{model.name}, {before}{settings['name']}" + (f" ({options})" if options else "")
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
    if (changed := quantization.transform) is not None:
        far = f"moved by {changed.moved:.1e} at most; {len(changed.alone)} left alone"
        table.add_row(f"{changed.name}, share of weights", "", f"{changed.coverage:.1%}", far)
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
    ours, base = speed.quantized, speed.baseline
    phases = [("prefill", f"{speed.prefill_tokens} tokens", ours.prefill, base and base.prefill)]
    for i, tokens in enumerate(speed.more_prefill_tokens):
        phases.append(("prefill", f"{tokens} tokens", ours.more_prefill[i], base and base.more_prefill[i]))
    phases.append(("decode", f"after {speed.context_tokens} tokens", ours.decode, base and base.decode))
    for name, shape, phase, before in phases:
        batch = f"batch {speed.batch_size}, median of {speed.repeats}{_method(phase, before)}"
        rate, other = phase.tokens_per_second, before and before.tokens_per_second
        table.add_row(f"{name}, tokens/s, {shape}", _rate(other), _rate(rate), f"{_times(rate, other)}{batch}")
        _add_other_ways(table, f"{name}, {shape}", phase, before)
        if phase.joules_per_token is not None:
            joules = "" if before is None or before.joules_per_token is None else f"{before.joules_per_token:.3g}"
            table.add_row(f"{name}, joules/token", joules, f"{phase.joules_per_token:.3g}", "the whole GPU, by NVML")
        whose = "of the process" if phase.peak_alloc_bytes is None else "allocated, weights and cache included"
        table.add_row(f"{name}, peak memory, MB", _peak(before), _peak(phase), whose)


def _method(phase: PhaseRecord, before: PhaseRecord | None) -> str:
    """How the fastest way is called; nothing on a CPU, unless it was compiled."""
    if before is not None and before.method != phase.method:
        return f", {phase.method} (16 bit: {before.method})"
    return "" if phase.method == "eager" and phase.eager_because is None else f", {phase.method}"


def _add_other_ways(table: Table, what: str, phase: PhaseRecord, before: PhaseRecord | None) -> None:
    """A row for each way that was not the fastest of both, with its numbers or why there are none."""
    fastest = {one.method for one in (phase, before) if one is not None}
    for method in dict.fromkeys(way.method for one in (phase, before) if one is not None for way in one.ways):
        rate, other = phase.rate(method), None if before is None else before.rate(method)
        refusals = [f"16 bit {why}" for why in ([] if before is None else before.refusals(method))]
        refusals += phase.refusals(method)
        if fastest == {method} and not refusals:
            continue
        told = _times(rate, other).removesuffix("; ") if rate is not None else ""
        told = "; ".join([told] * bool(told) + [f"refused: {why}" for why in refusals])
        table.add_row(f"{what}, {method}", _rate(other), _rate(rate), told)


def _times(rate: SpreadRecord, other: SpreadRecord | None) -> str:
    return "" if other is None else f"{rate.median / other.median:.2f} times as fast; "


def _rate(spread: SpreadRecord | None) -> str:
    return "" if spread is None else f"{spread.median:.1f}"


def _peak(phase: PhaseRecord | None) -> str:
    peak = phase and (phase.peak_alloc_bytes or phase.peak_rss_bytes)
    return f"{peak / 1e6:.0f}" if peak else ""
