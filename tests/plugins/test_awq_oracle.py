"""plugins/awq.py against AutoAWQ's own scale search on real linear groups (`make test-oracle`).

The official search is handed a module that only puts the outputs of the group's linears side by side, so that both
minimize the same: the original looks at the attention or MLP block around them. Symmetric grids are not compared,
since the official one leaves a code unused.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qbench.plugins.awq import AWQ
from qbench.testing import statistics_of
from tests.plugins.conftest import RealGroup
from tests.plugins.test_awq import brute_force, squared_error

pytestmark = pytest.mark.oracle

GROUP = 64
TOLERANCE = 0.02  # of the loss


class SideBySide(nn.Module):
    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.before = nn.Identity()
        self.linears = nn.ModuleList()
        for weight in weights:
            self.linears.append(nn.Linear(*reversed(weight.shape), bias=False))
            self.linears[-1].weight.data = weight.clone()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], -1)

    def state_dict(self, *args, **kwargs):
        """Copies: the search keeps `.cpu()` of them to restore, which on a CPU are the tensors that it scales."""
        return {name: tensor.clone() for name, tensor in super().state_dict(*args, **kwargs).items()}


@pytest.fixture(scope="module")
def awq_quantizer(oracle_package):
    """AutoAWQ's class, of which only the search is used: its constructor wants a whole model."""
    oracle_package("awq")
    with warnings.catch_warnings(record=True):  # the package announces its end at every import
        return importlib.import_module("awq.quantize.quantizer").AwqQuantizer


def official(cls: type, weights: list[Tensor], inputs: Tensor, nbits: int) -> tuple[Tensor, list[Tensor]]:
    """The official s `[in]` and the weights `[out, in]` rounded with it."""
    search = cls.__new__(cls)
    search.w_bit, search.group_size, search.zero_point, search.duo_scaling = nbits, GROUP, True, True
    search.n_parallel_calib_samples, search.max_chunk_memory = None, 2**30
    module = SideBySide(weights)
    _, _, s = search._search_best_scale(module, module.before, list(module.linears), inputs, module)
    return s, [search.pseudo_quantize_tensor(weight * s)[0] / s for weight in weights]


@pytest.fixture(scope="module")
def groups(real_groups) -> list[RealGroup]:
    """With 1024 tokens: more than the channels of some linears and fewer than those of others."""
    return [replace(group, inputs=group.inputs[::2]) for group in real_groups]


@pytest.mark.parametrize("nbits", [3, 4])
@torch.no_grad()
def test_scale_and_loss_agree_on_real_groups(awq_quantizer, groups, nbits):
    ratios = set()
    for group in groups:
        results = AWQ(nbits=nbits, group_size=GROUP).quantize(group.weights, statistics_of(group.inputs, AWQ.needs))
        s, rounded = official(awq_quantizer, group.weights, group.inputs, nbits)
        pairs = zip(group.weights, rounded, strict=True)
        theirs = float(sum((group.inputs @ (dense - w).T).double().square().sum() for w, dense in pairs))
        mine = squared_error(group.inputs, group.weights, results)
        ratio = results[0].diagnostics["ratio"]
        apart = float((results[0].input_scale.float() * s - 1).abs().max())
        print(f"{group.name}: ratio {ratio}, t differs by {apart:.1e}, loss {mine / theirs - 1:+.3%}")
        assert apart < 1e-3, f"{group.name}: another ratio was chosen"  # t is stored in fp16
        assert mine == pytest.approx(theirs, rel=TOLERANCE), group.name
        ratios.add(ratio)
    assert len(ratios) > 2, "the search always ends at the same ratio, the comparison is empty"


@torch.no_grad()
def test_ratio_and_loss_equal_a_brute_force_search_on_real_groups(groups):
    for group in groups[::4]:  # the attention's inputs; the others take the longer for nothing new
        results = AWQ(nbits=3, group_size=GROUP).quantize(group.weights, statistics_of(group.inputs, AWQ.needs))
        ratio, _ = brute_force(group.weights, group.inputs, GROUP, 3, 20)
        assert results[0].diagnostics["ratio"] == ratio, group.name
        loss = squared_error(group.inputs, group.weights, results)
        loss /= len(group.inputs) * sum(map(len, group.weights))
        assert results[0].diagnostics["loss"] == pytest.approx(loss, rel=1e-3), group.name
