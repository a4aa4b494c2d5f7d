"""The parts of SINQ that are options: one t for a linear group, t in 8 bits, the official package's kurtosis gate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qbench.format.aux import dense_input_scale, store_input_scale
from qbench.layers.linear import relative_error
from qbench.plugins.rtn import RTN
from qbench.plugins.sinq import SINQ
from qbench.quant.diagnostics import kurtosis
from qbench.quant.rounding import round_to_nearest
from qbench.testing import gaussian, same


def uneven(rows, columns=160, seed=0):
    sizes = gaussian(1, columns, seed + 100) * 14  # a standard deviation of 0.7
    return gaussian(rows, columns, seed) * sizes.exp()


def test_a_group_shares_the_t_of_its_stacked_rows():
    weights = [uneven(48), uneven(16, seed=1), uneven(16, seed=2)]
    shared = SINQ(shared_t=True).quantize(weights, None)
    t, after = SINQ().input_scale(torch.cat(weights), 64)
    for weight, made in zip(weights, shared, strict=True):
        assert torch.equal(made.input_scale, t.half())
        assert same(made, round_to_nearest(weight, nbits=4, group_size=64, input_scale=t))
        assert made.diagnostics["imbalance_after"] == after
    own = SINQ().quantize(weights, None)
    assert not torch.equal(own[0].input_scale, own[1].input_scale)
    assert same(SINQ(shared_t=True).quantize_one(weights[0]), own[0])


@pytest.mark.parametrize("t_dtype", ["fp8", "int8"])
@pytest.mark.parametrize("settings", [{}, {"nbits": 3, "inner": "hqq"}, {"codebook": "nf4"}], ids=str)
def test_t_in_a_byte(t_dtype, settings):
    weight = uneven(64)
    wide, made = SINQ(**settings).quantize_one(weight), SINQ(t_dtype=t_dtype, **settings).quantize_one(weight)
    assert wide.stored_bytes()["input_scale"] - made.stored_bytes()["input_scale"] == weight.shape[1]
    assert relative_error(weight, made) < 1.1 * relative_error(weight, wide)
    # what was rounded is W over t as stored: the same codes and the same weights as with that t in fp16
    t = dense_input_scale(made.input_scale)
    as_fp16 = replace(made, input_scale=t.half())
    assert torch.equal(as_fp16.dequantize(), made.dequantize())
    if not settings:
        assert same(as_fp16, round_to_nearest(weight, nbits=4, group_size=64, input_scale=t))


@pytest.mark.parametrize(("t_dtype", "bound"), [("fp16", 2**-11), ("fp8", 2**-4), ("int8", 0.04)])
def test_what_is_stored_of_t(t_dtype, bound):
    t = torch.linspace(0.75, 9, 200)
    dense = dense_input_scale(store_input_scale(t, t_dtype))
    factor = (dense / t).median()  # that group scales make up for
    assert ((dense / t / factor) - 1).abs().max() <= bound
    assert torch.equal(dense, dense.half().float())
    far = dense_input_scale(store_input_scale(torch.tensor([1e-5, 1.0, 1.0, 1e5]), t_dtype).flatten()[:3])
    assert (far > 0).all()
    with pytest.raises(ValueError, match="t_dtype must be one of fp16, fp8, int8, got 'fp4'"):
        store_input_scale(t, "fp4")


@pytest.mark.parametrize("settings", [{}, {"codebook": "nf4"}, {"shared_t": True}, {"t_dtype": "fp8"}], ids=str)
def test_the_gate_rounds_heavy_tails_plainly(settings):
    light, heavy = gaussian(32, 128), gaussian(32, 128, 1) ** 3
    made, other = SINQ(kurtosis_gate=5.0, **settings).quantize([light, heavy], None)
    assert (kurtosis(light), kurtosis(heavy)) == (pytest.approx(3, abs=0.3), pytest.approx(40, abs=20))
    assert same(other, RTN().quantize_one(heavy))
    assert other.method == "rtn"
    assert same(made, SINQ(**settings).quantize_one(light))
    exact = float(kurtosis(heavy))
    assert SINQ(kurtosis_gate=exact, **settings).quantize_one(heavy).method.startswith("sinq")  # only what is above it


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"t_dtype": "bf16"}, "t_dtype must be one of fp16, fp8, int8, got 'bf16'"),
        ({"kurtosis_gate": 0.0}, r"kurtosis_gate must be null or a positive number, got 0\.0"),
        ({"kurtosis_gate": float("nan")}, "kurtosis_gate must be null or a positive number"),
    ],
)
def test_what_cannot_be_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SINQ(**settings)
