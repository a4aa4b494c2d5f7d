"""`rotation=hadamard`: each method does in the rotated basis what it does in its own, and the result comes back."""

from __future__ import annotations

import pytest
import torch

from qbench.checkpoint.autogptq import format_refusal
from qbench.errors import RequestError
from qbench.format.rotation import Rotation
from qbench.layers.linear import relative_error
from qbench.quant.quantizer import InputStatistics
from qbench.registry import make_quantizer
from qbench.testing import correlated_inputs, gaussian, same

METHODS = ("rtn", "hqq", "gptq", "sinq", "nf4", "fp4")


def made(name, **settings):
    return make_quantizer({"name": name, "group_size": 16, "rotation": "hadamard", **settings})


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_method_on_the_rotated_problem(name):
    """Weights and inputs rotated outside, through the inputs themselves, not through their Hessian."""
    weights, inputs = [gaussian(12, 96), gaussian(7, 96, 1)], correlated_inputs(96, 200)
    rotation = Rotation.seeded(96, 32, 0)
    rotated = rotation(inputs.double())
    found = made(name).quantize(weights, InputStatistics(len(inputs), hessian=inputs.double().T @ inputs.double()))
    outside = made(name, rotation=None).quantize(
        [rotation(weight) for weight in weights], InputStatistics(len(inputs), hessian=rotated.T @ rotated)
    )
    for weight, inner in zip(found, outside, strict=True):
        assert weight.rotation.block == 32
        assert weight.method == f"{inner.method}-hadamard32"
        assert (weight.codes() == inner.codes()).float().mean() > 0.999  # a Hessian's rounding may move a tie
        if name != "gptq":
            named = weight.tensors()
            assert all(torch.equal(named[key], tensor) for key, tensor in inner.tensors().items())


@pytest.mark.parametrize("name", ["rtn", "sinq", "nf4"])
def test_outliers_are_spread(name):
    weight = gaussian(64, 256)
    weight[torch.arange(64), torch.arange(64) * 3] = 0.8  # 16 standard deviations, in another group of each row
    plain, rotated = (
        relative_error(weight, made(name, group_size=64, rotation=r).quantize_one(weight)) for r in (None, "hadamard")
    )
    assert rotated < 0.8 * plain


def test_an_odd_number_of_channels_is_quantized_as_it_is():
    weight = gaussian(6, 33)
    found, plain = made("rtn").quantize_one(weight), made("rtn", rotation=None).quantize_one(weight)
    assert same(found, plain)
    assert found.method == "rtn"


def test_block_and_seed():
    weight = gaussian(8, 96)
    first, again, other = (made("rtn", rotation_block=8, rotation_seed=s).quantize_one(weight) for s in (0, 0, 1))
    assert first.rotation.block == 8
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rotation": "haar"}, "rotation must be null or hadamard, got 'haar'"),
        ({"rotation_block": 48}, "rotation_block must be a power of two from 2 on, got 48"),
        ({"rotation_seed": -1}, "rotation_seed must lie in 0"),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_be_is_refused(name, settings, sentence):
    with pytest.raises(RequestError, match=sentence):
        made(name, **settings)


def test_autogptq_has_no_place_for_it():
    assert "rotated basis" in format_refusal(made("rtn").quantize_one(gaussian(32, 64)))
