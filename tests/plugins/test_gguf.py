"""The GGUF types as quantizers: the suite, llama.cpp's rules of giving way, the importance matrix and its effect."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from qbench.format.gguf_blocks import TYPES
from qbench.layers.linear import relative_error
from qbench.plugins.gguf import BLIND, GIVES_WAY, settled
from qbench.quant.quantizer import InputStatistics, Statistic
from qbench.registry import make_quantizer, quantizer_class, quantizer_names
from qbench.request.estimate import model_bytes
from qbench.testing import QuantizerConformance, gaussian

libgguf = pytest.importorskip("libgguf", reason="the encoder; it comes with the extra gguf")
NAMES = [name for name in quantizer_names() if name.startswith("gguf/")]
SUITES = [
    (name, imatrix) for name in ("gguf/q4_0", "gguf/q4_k", "gguf/q6_k", "gguf/iq4_nl") for imatrix in (False, True)
]
SLOW = [("gguf/iq2_xs", True), ("gguf/iq3_s", False)]  # seconds each; the others are encoded by the same lines


def suite(name: str, imatrix: bool) -> type[QuantizerConformance]:
    def make(self):
        return quantizer_class(name)(imatrix=imatrix)

    return type(f"Test{name[5:].upper()}{'Imatrix' * imatrix}", (QuantizerConformance,), {"make": make})


for _chosen in (*SUITES, *SLOW):
    _suite = suite(*_chosen)
    globals()[_suite.__name__] = pytest.mark.slow(_suite) if _chosen in SLOW else _suite


def test_every_type_that_llama_cpp_encodes_is_there():
    assert {name[5:].upper() for name in NAMES} == TYPES.keys() - {"F32", "F16", "BF16", "MXFP4", "NVFP4"}
    for name in NAMES:
        assert quantizer_class(name).type == name[5:].upper()
        assert name[5:].upper() in BLIND or not make_quantizer({"name": name}).needs


@pytest.mark.parametrize(
    "type", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
)
def test_the_blocks_are_the_encoders_own(type):
    weight, x = gaussian(6, 512), gaussian(64, 512, 1)
    number = libgguf.GGMLQuantizationType[type]
    made = quantizer_class(f"gguf/{type.lower()}")().quantize_one(weight)
    assert made.type == made.method == type
    assert np.array_equal(made.blocks.numpy(), libgguf.quantize_rows(weight.numpy(), number))
    squares = x.square().mean(0) * torch.linspace(0.1, 10, 512)
    weighted = quantizer_class(f"gguf/{type.lower()}")(imatrix=True)
    found = weighted.quantize_one(weight, InputStatistics(64, squares=squares)).blocks.numpy()
    assert np.array_equal(found, libgguf.quantize_rows(weight.numpy(), number, squares.numpy()))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_type_decodes_as_the_encoders_package_does(name):
    cls, weight = quantizer_class(name), gaussian(4, 512)
    made = cls(imatrix=True).quantize_one(weight, InputStatistics(9, squares=torch.linspace(0.1, 10, 512)))
    number = libgguf.GGMLQuantizationType[cls.type]
    assert np.array_equal(made.dequantize().numpy(), libgguf.dequantize_rows(made.blocks.numpy(), number))
    assert relative_error(weight, made) < 0.9


@pytest.mark.parametrize("name", ["gguf/q4_k", "gguf/iq4_xs", "gguf/q3_k"])
def test_an_importance_matrix_spares_the_channels_that_count(name):
    weight, squares = gaussian(32, 512), torch.ones(512)
    squares[::4] = 100
    cls = quantizer_class(name)
    plain, weighted = (
        cls().quantize_one(weight),
        cls(imatrix=True).quantize_one(weight, InputStatistics(9, squares=squares)),
    )
    errors = [((made.dequantize() - weight).square() * squares).sum() for made in (plain, weighted)]
    assert errors[1] < 0.95 * errors[0]


def test_threads_change_no_bit(monkeypatch):
    weight, quantizer = gaussian(13, 256), quantizer_class("gguf/q4_k")()
    alone = quantizer.quantize_one(weight).blocks
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(quantizer.quantize_one(weight).blocks, alone)


@pytest.mark.parametrize(
    ("asked", "columns", "given"),
    [
        *((type, 512, type) for type in TYPES),
        *((type, 576, other) for type, other in GIVES_WAY.items()),
        ("Q4_0", 576, "Q4_0"),
        ("Q4_0", 100, "F16"),
        ("Q4_K", 100, "F16"),
    ],
)
def test_a_type_gives_way_as_in_llama_cpp(asked, columns, given):
    assert settled(asked, columns) == given


def test_what_gave_way_is_said_in_the_row():
    quantizer = quantizer_class("gguf/q4_k")()
    made = quantizer.quantize_one(gaussian(4, 576))
    assert (made.type, made.method) == ("Q5_0", "Q5_0 (no blocks of Q4_K in 576 input channels)")
    assert made.nbytes == quantizer.stored_bytes(4, 576)
    assert quantizer.quantize_one(gaussian(4, 100)).bits_per_weight == 16


def test_a_plan_knows_the_bytes():
    quantizer = quantizer_class("gguf/q4_k")()
    bits, _ = model_bytes(quantizer, 10**6, {(64, 576): 2, (64, 512): 1})
    assert bits == pytest.approx((2 * 576 * 5.5 + 512 * 4.5) / (2 * 576 + 512))


def test_refusals_are_sentences(monkeypatch):
    with pytest.raises(ValueError, match=r"IQ2_XXS is only made with an importance matrix: use quantizer.imatrix=true"):
        quantizer_class("gguf/iq2_xxs")(imatrix=False)
    quantizer = quantizer_class("gguf/q4_k")(imatrix=True)
    assert quantizer.needs == {Statistic.INPUT_SQUARES}
    for squares, sentence in (
        (None, "needs mean x\\^2"),
        (torch.ones(3), "has \\[3\\]"),
        (torch.zeros(256), "are zero"),
    ):
        with pytest.raises(ValueError, match=sentence):
            quantizer.quantize_one(gaussian(2, 256), InputStatistics(1, squares=squares))
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantizer.quantize_one(gaussian(2, 256), InputStatistics(1, squares=torch.full((256,), torch.nan)))
    with pytest.raises(ValueError, match="too large for fp16"):
        quantizer_class("gguf/q4_0")().quantize_one(torch.full((2, 33), 1e5))
    monkeypatch.setitem(sys.modules, "libgguf", None)
    with pytest.raises(ValueError, match=r"needs the package libgguf .*; install it with: pip install 'libgguf"):
        quantizer_class("gguf/q4_0")()
