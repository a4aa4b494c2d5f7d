"""What a point needs on one H200, before anything is fetched: bytes to download, GPU memory, hours.

The hours are those of the point alone, from what docs/performance.md measured; they are an estimate, good to about a
factor of two:

    start      20 s: imports, texts, kernels
    read       16-bit weights / 2.5 GB/s, as a network disk gives them
    evaluate   2 x tokens x weights that a token meets / 450 TFLOP/s, once for the original and once for the variant;
               90 TFLOP/s in a mixture, whose experts see few tokens each
    quantize   the method's own seconds (below), and 3.6 s for Qwen3-8B's 6.95 billion weights in the pass around it; in
               a mixture 5 ms a matrix, which the host spends, where that is more
    calibrate  the calibration tokens twice through the model, at the rate of evaluating
    speed      with speed=default, of both models: 6 s a phase, and 12 s for compiling it

A download is the 16-bit weights of a Hub model that is not here. GPU memory is what a pass holds at least: a block, the
next one, the rest of the model, and a batch's activations; hidden states wait in host memory where they do not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from qbench.quant.original import Original
from qbench.request import estimate
from qbench.request.plain import Skeleton
from qbench.request.prepare import Prepared

BYTES = 2  # a weight
START_SECONDS = 20.0
READ_BYTES_PER_SECOND = 2.5e9
FLOPS, MIXTURE_FLOPS = 450e12, 90e12  # per second
PASS_SECONDS_PER_WEIGHT = 3.6 / 6.946e9
MATRIX_SECONDS = 0.005
# of the 252 linears of a Qwen3-8B; a method that is not listed takes as long as the slowest of its kind
METHOD_SECONDS_PER_WEIGHT = {
    name: seconds / 6.946e9
    for name, seconds in {
        **{"rtn": 0.032, "nf4": 0.087, "fp4": 0.087, "hqq": 0.286, "sinq": 0.243},
        **{"gptq": 5.62, "awq": 2.92, "asinq": 3.51},
    }.items()
}
# documents x choices x tokens, rounded: lm-eval makes the requests when they are scored
TASK_TOKENS = {"hellaswag": 4_400_000, "piqa": 160_000, "mmlu": 6_700_000}
PHASE_SECONDS, COMPILE_SECONDS = 6.0, 12.0  # of speed=default: prefill, for each length, and decode
SEARCH_TOKENS = 2048
CALIBRATION_TOKENS = 128 * 2048  # where the configuration leaves the number of sequences to the text


@dataclass(frozen=True)
class Needs:
    """A number that is not known is None."""

    download_bytes: int
    gpu_bytes: int
    read_seconds: float
    original_seconds: float | None  # evaluating the original
    variant_seconds: float | None  # quantizing and evaluating, all draws, and measuring speed

    @property
    def hours(self) -> float | None:
        """Of the point alone."""
        if self.original_seconds is None or self.variant_seconds is None:
            return None
        return (START_SECONDS + self.read_seconds + self.original_seconds + self.variant_seconds) / 3600


def needs(point: Prepared, known: Skeleton) -> Needs:
    """Of a point of a model whose sizes are `known`."""
    weights = BYTES * known.parameters
    here = getattr(point.model, "weights_here", None)
    evaluate = _forward_seconds(point, known, _tokens(point, known))
    spent = None
    if evaluate is not None and point.quantizer is not None:
        quantize = _quantize_seconds(point, known)
        spent = point.draws * (evaluate + quantize) + _speed_seconds(point)
        if point.searches:  # every choice is quantized, and runs over a little of the calibration text
            choices = len(point.transform.choices(point.config.quantizer["name"]))
            spent += point.draws * choices * (quantize + (_forward_seconds(point, known, SEARCH_TOKENS) or 0.0))
    window = getattr(point.protocol, "window", 2048)
    batch = (point.config.runtime.batch_size or 1) * window * known.hidden * BYTES * 16
    return Needs(
        download_bytes=weights if here is not None and not here() else 0,
        gpu_bytes=BYTES * (2 * known.largest_block + known.outside) + batch + 2 * window * known.vocabulary * 4,
        read_seconds=(1 + point.searches) * weights / READ_BYTES_PER_SECOND,
        original_seconds=evaluate,
        variant_seconds=spent,
    )


def _tokens(point: Prepared, known: Skeleton) -> int | None:
    names, limit = getattr(point.protocol, "names", None), getattr(point.protocol, "limit", None)
    if names is not None and limit is None and all(name in TASK_TOKENS for name in names):
        return sum(TASK_TOKENS[name] for name in names)
    return estimate.tokens(point, known.vocabulary)


def _forward_seconds(point: Prepared, known: Skeleton, tokens: int | None) -> float | None:
    if tokens is None:
        return None
    rate = MIXTURE_FLOPS if known.found.experts else FLOPS
    return 2 * tokens * _met(known) / rate


def _met(known: Skeleton) -> int:
    """The weights that a token is multiplied with: all linears but the experts that it is not sent to, and the head."""
    experts = sum(estimate.expert_parameters(module) for module in known.found.experts.values())
    met = sum(
        estimate.expert_parameters(module) * known.experts_per_token // module.num_experts
        for module in known.found.experts.values()
    )
    return known.found.quantizable - experts + met + known.vocabulary * known.hidden


def _speed_seconds(point: Prepared) -> float:
    asked = point.config.speed
    if asked.name == "none":
        return 0.0
    models = 1 if isinstance(point.quantizer, Original) else 2
    return models * (len(asked.lengths) + 1) * (PHASE_SECONDS + COMPILE_SECONDS * asked.compiles("cuda"))


def _quantize_seconds(point: Prepared, known: Skeleton) -> float:
    quantizer = point.quantizer
    if quantizer is None or isinstance(quantizer, Original):
        return 0.0
    name = str(point.config.quantizer.get("method") or point.config.quantizer["name"])
    slowest = METHOD_SECONDS_PER_WEIGHT["gptq" if quantizer.needs else "hqq"]
    weights, matrices = known.found.quantizable, sum(known.shapes.values())
    around = max(weights * PASS_SECONDS_PER_WEIGHT, matrices * MATRIX_SECONDS if known.found.experts else 0.0)
    seconds = around + weights * METHOD_SECONDS_PER_WEIGHT.get(name, slowest)
    if quantizer.needs:
        asked = point.config.calibration
        tokens = asked.sequences * asked.window if asked.sequences else CALIBRATION_TOKENS
        seconds += 2 * (_forward_seconds(point, known, tokens) or 0.0)
    return seconds
