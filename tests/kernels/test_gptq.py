"""GPTQ's block kernel and the fused scale search against plain torch."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreted import kernels  # noqa: F401  first: it sets Triton up

from qbench.plugins.asinq import ASINQ  # isort: skip
from qbench.plugins.awq import AWQ
from qbench.plugins.gptq import GPTQ
from qbench.quant.quantizer import Statistic
from qbench.testing import correlated_inputs, gaussian, statistics_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about lanes that are masked


def output_error(result, weight, inputs) -> float:
    return float(((result.dequantize() - weight) @ inputs.T).norm() / (weight @ inputs.T).norm())


@pytest.mark.parametrize(
    "quantizer",
    [
        # several groups in a block, a ragged last one
        GPTQ(group_size=16, block_size=32, act_order=False, static_groups=False),
        GPTQ(group_size=24, nbits=3, aux_dtype="int8", act_order=True, static_groups=False),
        GPTQ(group_size=16, block_size=32, nbits=2, symmetric=True, act_order=True, static_groups=True),
        # several blocks in a group
        GPTQ(group_size=32, block_size=16, act_order=False, static_groups=False),
        GPTQ(group_size=-1, block_size=32, nbits=8, act_order=False, static_groups=False),
    ],
    ids=str,
)
def test_gptq(kernels, quantizer):  # noqa: F811
    weights, inputs = [gaussian(10, 40), gaussian(7, 40, 1)], correlated_inputs(40, 200)
    stats = statistics_of(inputs, quantizer.needs)
    plain, fast = kernels(lambda: quantizer.quantize(weights, stats))
    for weight, expected, got in zip(weights, plain, fast, strict=True):
        assert (expected.codes() == got.codes()).float().mean() > 0.99
        torch.testing.assert_close(got.scale.dense(), expected.scale.dense(), rtol=1e-3, atol=1e-7)
        assert output_error(got, weight, inputs) == pytest.approx(output_error(expected, weight, inputs), rel=0.01)
        assert got.diagnostics == expected.diagnostics


@pytest.mark.parametrize(
    "quantizer",
    [
        GPTQ(group_size=16, block_size=32),
        pytest.param(
            GPTQ(group_size=24, nbits=3, aux_dtype="int8", static_groups=False), marks=pytest.mark.slow, id="gptq-kept"
        ),
        AWQ(group_size=16, ratios=3),
        ASINQ(group_size=16, ratios=3, iterations=4),
    ],
    ids=str,
)
def test_an_expert_in_a_batch_is_what_it_is_alone(kernels, quantizer):  # noqa: F811
    """Each with inputs of its own, and its own number of them; no expert's are more than the others' but by padding."""
    gate, up = (torch.stack([gaussian(10, 40, 3 * j + e) for e in range(3)]) for j in (0, 1))
    inputs = [correlated_inputs(40, 200)[: 30 + 60 * e] * (1 + e) for e in range(3)]
    stats = [statistics_of(one, quantizer.needs) for one in inputs]
    names = [[f"{e}.{projection}" for e in range(3)] for projection in ("gate", "up")]
    alone, together = kernels(lambda: quantizer.quantize_stacks(names, [gate, up], stats))
    for weights, expected, got in zip((gate, up), alone, together, strict=True):
        assert got.shape == expected.shape == (3, 10, 40)
        assert got.method == expected.method
        for key, told in expected.diagnostics.items():
            torch.testing.assert_close(
                torch.tensor(told), torch.as_tensor(got.diagnostics[key]).float(), rtol=0.02, atol=0
            )
        for e, x in enumerate(inputs):
            one, other = got.select(e), expected.select(e)
            assert (one.codes() == other.codes()).float().mean() > 0.99
            assert output_error(one, weights[e], x) == pytest.approx(output_error(other, weights[e], x), rel=0.01)


@pytest.mark.parametrize(
    ("quantizer", "tokens"),
    [
        (AWQ(group_size=16, ratios=3), 30),  # the inputs themselves
        (AWQ(group_size=16, ratios=3), 100),  # their Gram matrix
        (ASINQ(group_size=16, ratios=3, nbits=3), 30),
    ],
    ids=str,
)
def test_scale_search(kernels, quantizer, tokens):  # noqa: F811
    weights = [gaussian(20, 40), gaussian(33, 40, 1)]
    stats = statistics_of(correlated_inputs(40, tokens), frozenset(Statistic))
    plain, fast = kernels(lambda: quantizer.quantize(weights, stats))
    for expected, got in zip(plain, fast, strict=True):
        assert got.diagnostics["ratio"] == expected.diagnostics["ratio"]
        # the interpreter cuts bf16 off, which shrinks every error by up to 2**-8
        assert got.diagnostics["loss"] == pytest.approx(expected.diagnostics["loss"], rel=0.02)
        assert (expected.codes() == got.codes()).float().mean() > 0.999
