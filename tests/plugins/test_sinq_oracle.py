"""plugins/sinq.py against the authors' package, sinq 0.2.0, on the same matrices (`make test-oracle`).

The official code is entered at its optimizer, the level at which it really is the SINQ of the paper: above
that, the method name "sinq" is rewritten to one with 8-bit scales. It works in fp32 only when the device is
the string "cpu" (a torch.device takes its fp16 path). It stores W ~= (codes - zero) * s1 * s2 with s2 = our
`t` `[1, in]`, and s1, zero `[out * groups, 1]`; s1 carries the row factors of the normalization, which cancel
in ours.

Its kurtosis gate replaces SINQ by plain rounding on heavy-tailed weights, which ours leaves out on purpose.
So real layers are compared where the gate stays open, and one test shows what happens where it does not.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from qbench.layers.linear import relative_error
from qbench.plugins.rtn import RTN
from qbench.plugins.sinq import SINQ
from qbench.quant.codebook import NF4_LEVELS
from qbench.sources import smollm2

pytestmark = pytest.mark.oracle

# before the import: some installs of the package patch transformers as soon as it is touched
os.environ["SINQ_AUTO_PATCH"] = "0"
pytest.importorskip("sinq", reason="run `make test-oracle`")
optimize = importlib.import_module("sinq.optimize")
dual_shift = importlib.import_module("sinq.dual_shift")
sinkhorn_log = importlib.import_module("sinq.sinkhorn").sinkhorn_log

GROUP = 64
ROUNDS = 16  # what every official quantization path uses; the default of sinkhorn_log is 8
METHOD = "sinq_nogemlite"  # 16-bit scales and zero points, no AWQ
GATE = 5.0  # Pearson kurtosis above which the official code falls back to plain rounding

T_TOLERANCE = 1e-4  # relative, per channel
SAME_CODES = 0.999
# Relative Frobenius norms. Where the codes agree, only scales that round differently to fp16 are left. A code
# may differ where a weight lies on a rounding boundary up to fp32 noise, and then by one step: a single one
# of 330,000 moves the whole by 2.1e-3 when it falls into a group of outliers (o_proj of block 17, 3 bits).
SAME_CODE_TOLERANCE = 1e-4
DEQUANTIZED_TOLERANCE = 5e-3

BLOCKS = (0, 1, 10, 17, 29)  # first, last and between: enough for every kind of layer
FEWEST_LAYERS = 20
MATRICES = {
    "gaussian-256x512": (256, 512, 0.0),
    "gaussian-192x576": (192, 576, 0.0),
    "gaussian-512x128": (512, 128, 0.0),
    "uneven-columns-256x512": (256, 512, 1.0),  # column scales exp(N(0, 1))
}


@dataclass(frozen=True)
class Official:
    codes: Tensor  # uint8 [out, in]
    weights: Tensor  # dequantized from aux in fp16, as stored, fp32 [out, in]
    t: Tensor  # fp32 [in]


def official(weight: Tensor, nbits: int, gate: float | None, method: str = METHOD) -> Official:
    """The official result for `[out, in]`; `gate=None` turns its fallback off."""
    groups = weight.float().reshape(-1, GROUP)
    unused = torch.ones(len(groups), 1)  # HQQ's first guess of scale and zero point, which the method discards
    codes, scale, zero, t, _ = optimize.optimize_weights_proximal(
        tensor=groups,
        layer_activations=None,
        scale=unused,
        zero=unused,
        min_max=[0, 2**nbits - 1],
        axis=1,
        device="cpu",
        opt_params={"lp_norm": 0.7, "beta": 10.0, "kappa": 1.01, "iters": 20, "kurtosis_threshold": gate},
        shape=weight.shape,
        tiling_mode="1D",
        method=method,
    )
    assert t.dtype == scale.dtype == torch.float32, "the official code took its fp16 path"
    levels = torch.tensor(NF4_LEVELS)[codes.long()] if "nf4" in method else codes.float()
    steps = (levels - zero.half().float()) * scale.half().float()
    return Official(codes.to(torch.uint8).view(weight.shape), steps.view(weight.shape) * t.half().float(), t.flatten())


def official_t(weight: Tensor) -> Tensor:
    """The column scale of every tile of 64 columns straight from the official Sinkhorn, fp32 `[in]`."""
    return torch.cat([sinkhorn_log(tile, ROUNDS)[1] for tile in weight.float().split(GROUP, dim=1)])


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def assert_same_t(weight: Tensor, name: str) -> None:
    ours, theirs = SINQ().input_scale(weight, GROUP)[0], official_t(weight)
    assert ours.dtype == torch.float32
    assert theirs.max() > 1.001 * theirs.min(), f"{name}: t is constant, the comparison is empty"
    error = float(((ours - theirs) / theirs).abs().max())
    assert error <= T_TOLERANCE, f"{name}: t differs by {error:.2e}"


def assert_same_result(weight: Tensor, nbits: int, gate: float | None, name: str) -> None:
    ours, theirs = SINQ(nbits=nbits, group_size=GROUP).quantize_one(weight), official(weight, nbits, gate)
    assert torch.allclose(official_t(weight), theirs.t, rtol=T_TOLERANCE, atol=0), f"{name}: not SINQ any more"
    same = ours.codes() == theirs.codes
    assert same.float().mean() >= SAME_CODES, f"{name}: {int((~same).sum())} of {same.numel()} codes differ"
    apart = int((ours.codes().int() - theirs.codes.int()).abs().max())
    assert apart <= 1, f"{name}: a code differs by {apart} steps"
    dequantized = ours.dequantize()
    error = relative(dequantized[same], theirs.weights[same])
    assert error <= SAME_CODE_TOLERANCE, f"{name}: weights of equal codes differ by {error:.2e}"
    error = relative(dequantized, theirs.weights)
    assert error <= DEQUANTIZED_TOLERANCE, f"{name}: weights differ by {error:.2e}"


def matrix(name: str) -> Tensor:
    rows, columns, spread = MATRICES[name]
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(spread * torch.randn(columns, generator=generator))
    return 0.02 * torch.randn(rows, columns, generator=generator) * scales


@pytest.fixture(scope="session")
def layers() -> dict[str, Tensor]:
    """The linears of some decoder blocks of the reference model, fp32 `[out, in]`, by name."""
    default = Path(__file__).resolve().parents[2] / "outputs" / "models"
    folder = smollm2.prepare(Path(os.environ.get("QBENCH_TEST_CACHE", default)), seed=0)
    prefixes = tuple(f"model.layers.{block}." for block in BLOCKS)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if n.startswith(prefixes) and n.endswith("_proj.weight")]  # noqa: SIM118
        return {name: file.get_tensor(name).float() for name in names}


@pytest.fixture(scope="session")
def some(layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """A few weights of every kind for the variants of the method, whose gate is always off here."""
    return {name: matrix(name) for name in MATRICES} | dict(list(layers.items())[::4])


@pytest.fixture(scope="session")
def below_gate(layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layers on which the official code really runs SINQ, judged by its own kurtosis."""
    kept = {name: weight for name, weight in layers.items() if float(optimize.kurtosis(weight)) <= GATE}
    kinds = {name.split(".")[-2] for name in kept}
    assert len(kept) >= FEWEST_LAYERS, f"only {len(kept)} of {len(layers)} layers can be compared"
    assert len(kinds) == 7, f"no layer to compare of some kind, only of {', '.join(sorted(kinds))}"
    return kept


@pytest.mark.parametrize("name", MATRICES)
def test_t_agrees_on_synthetic_matrices(name: str) -> None:
    assert_same_t(matrix(name), name)


@pytest.mark.parametrize("nbits", [3, 4])
@pytest.mark.parametrize("name", MATRICES)
def test_codes_and_weights_agree_on_synthetic_matrices(name: str, nbits: int) -> None:
    assert_same_result(matrix(name), nbits, None, name)


def test_t_agrees_on_model_layers(below_gate: dict[str, Tensor]) -> None:
    for name, weight in below_gate.items():
        assert_same_t(weight, name)


@pytest.mark.parametrize("nbits", [3, 4])
def test_codes_and_weights_agree_on_model_layers(below_gate: dict[str, Tensor], nbits: int) -> None:
    for name, weight in below_gate.items():
        assert_same_result(weight, nbits, GATE, name)


def test_the_gate_is_the_only_difference_on_a_heavy_tailed_layer(layers: dict[str, Tensor]) -> None:
    """With its gate the official code is plain rounding there; without it, it agrees with ours again."""
    name, weight = max(layers.items(), key=lambda item: float(optimize.kurtosis(item[1])))
    assert float(optimize.kurtosis(weight)) > GATE
    gated = official(weight, 4, GATE)
    assert torch.equal(gated.t, torch.ones_like(gated.t))
    plain = RTN(nbits=4, group_size=GROUP).quantize_one(weight)
    assert (plain.codes() == gated.codes).float().mean() >= SAME_CODES
    assert_same_result(weight, 4, None, name)


def test_nf4_codes_and_weights_agree_without_the_shift(some: dict[str, Tensor], monkeypatch) -> None:
    """The official coding has an option to leave the mean of a group where it is, which is what ours does."""
    plain = functools.partial(dual_shift.quantize_rtn, nf_use_shift=False)
    monkeypatch.setattr(dual_shift, "quantize_rtn", plain)
    for name, weight in some.items():
        ours, theirs = SINQ(codebook="nf4").quantize_one(weight), official(weight, 4, None, "sinq_nf4_nogemlite")
        same = ours.codes() == theirs.codes
        assert same.float().mean() >= SAME_CODES, f"{name}: {int((~same).sum())} of {same.numel()} codes differ"
        error = relative(ours.dequantize()[same], theirs.weights[same])
        assert error <= SAME_CODE_TOLERANCE, f"{name}: weights of equal codes differ by {error:.2e}"


def test_the_shift_is_worth_a_percent_of_the_error(some: dict[str, Tensor]) -> None:
    """What ours gives up by storing no mean per group, a quarter of a bit per weight."""
    for name, weight in some.items():
        ours = relative_error(weight, SINQ(codebook="nf4").quantize_one(weight))
        assert ours < 1.02 * relative(official(weight, 4, None, "sinq_nf4_nogemlite").weights, weight), name


@pytest.mark.parametrize("nbits", [3, 4])
def test_hqq_inside_is_as_good_as_the_official_one(some: dict[str, Tensor], nbits: int) -> None:
    """Another schedule and another weighting of the rows (see plugins/sinq.py): other zeros, the same quality."""
    for name, weight in some.items():
        ours = relative_error(weight, SINQ(nbits=nbits, inner="hqq").quantize_one(weight))
        assert ours < 1.003 * relative(official(weight, nbits, None, "sinq_hqq_nogemlite").weights, weight), name
