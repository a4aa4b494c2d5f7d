"""plugins/asinq.py against the authors' package, sinq 0.2.0, on the same weights and inputs (`make test-oracle`).

The official search takes activations `[sequences, tokens, in]` and, given two dimensions, silently scales nothing;
fp32 needs the device to be the string "cpu". Its s2 is our `t` `[in]`. Its search rounds with scales in fp32 and ours
with scales as stored: two neighbouring ratios that are equally good to 1e-3 could change places. In none of the cases
below do they. The kurtosis gate, which would replace the method by plain rounding, is off.
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from torch import Tensor

from qbench.plugins.asinq import ASINQ
from qbench.quant.quantizer import InputStatistics

pytestmark = pytest.mark.oracle

os.environ["SINQ_AUTO_PATCH"] = "0"  # before the import: some installs patch transformers as soon as touched
pytest.importorskip("sinq", reason="run `make test-oracle`")
optimize = importlib.import_module("sinq.optimize")

GROUP = 64
TOLERANCE = 1e-3  # relative, per channel: t is stored in fp16, whose own rounding is 5e-4
SHAPES = [(192, 576), (256, 512), (512, 128), (96, 192)]


def official(weight: Tensor, inputs: Tensor, nbits: int, loss: str) -> tuple[Tensor, Tensor]:
    """The official t `[in]` and dequantized weight `[out, in]` for inputs `[sequences, tokens, in]`."""
    groups = weight.reshape(-1, GROUP)
    unused = torch.ones(len(groups), 1)  # HQQ's first guess, which the method discards
    codes, scale, zero, t, _ = optimize.optimize_weights_proximal(
        tensor=groups,
        layer_activations=inputs,
        scale=unused,
        zero=unused,
        min_max=[0, 2**nbits - 1],
        axis=1,
        device="cpu",
        opt_params={"lp_norm": 0.7, "beta": 10.0, "kappa": 1.01, "iters": 20, "kurtosis_threshold": None},
        shape=weight.shape,
        tiling_mode="1D",
        method="sinq_awq_l1_nogemlite" if loss == "l1" else "sinq_awq_nogemlite",
    )
    assert t.dtype == torch.float32, "the official code took its fp16 path"
    return t.flatten(), ((codes.float() - zero) * scale).view(weight.shape) * t.view(1, -1)


def case(rows: int, columns: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Weights `[out, in]` whose columns shrink where the inputs `[4, 160, in]` grow, as in trained models."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (spread * torch.randn(columns, generator=generator)).exp()
    inputs = torch.randn(4, 160, columns, generator=generator) * sizes
    return 0.05 * torch.randn(rows, columns, generator=generator) / sizes.pow(0.4), inputs


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("nbits", [3, 4])
@pytest.mark.parametrize("spread", [0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_t_and_weights_agree(shape: tuple[int, int], spread: float, nbits: int, loss: str) -> None:
    weight, inputs = case(*shape, spread, seed=sum(shape))
    rows = inputs.flatten(0, 1)
    theirs, their_weight = official(weight, inputs, nbits, loss)
    stats = InputStatistics(len(rows), absmean=rows.abs().mean(0), inputs=rows)
    [ours] = ASINQ(nbits=nbits, group_size=GROUP, loss=loss).quantize([weight], stats)
    assert theirs.max() > 1.01 * theirs.min(), "t is constant, the comparison is empty"
    error = float(((ours.input_scale.float() - theirs) / theirs).abs().max())
    assert error <= TOLERANCE, f"t differs by {error:.2e}"
    difference = float((ours.dequantize() - their_weight).norm() / their_weight.norm())
    assert difference <= 5e-3, f"the weights differ by {difference:.2e}"
