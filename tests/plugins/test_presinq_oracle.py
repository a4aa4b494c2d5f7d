"""t against the authors' own normalization, `sinq.sinkhorn.sinkhorn_log`, on real layers (`make test-oracle`).

Their Pre-SINQ scripts are no part of the package: what they do around it is written here from the paper, sections 2.3.1
and A.6, in their order, with o_proj left alone as they leave it. Their folding of mixtures is not compared: it forgets
the routers.
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from qbench.transforms.presinq import PreSINQ

pytestmark = pytest.mark.oracle

os.environ["SINQ_AUTO_PATCH"] = "0"
pytest.importorskip("sinq", reason="run `make test-oracle`")
official = importlib.import_module("sinq.sinkhorn")
GROUP = 64


def theirs(weights, iterations):
    """t `[in]` of weights that share an input: tile by tile, over its median."""
    stacked = torch.cat([weight.float() for weight in weights])
    t = torch.cat([official.sinkhorn_log(tile, iterations)[1] for tile in stacked.split(GROUP, 1)])
    return t / t.median()


@pytest.mark.parametrize("iterations", [2, 8, 16])
def test_t_of_every_group_of_real_layers(real_groups, iterations):
    ours = PreSINQ(iterations=iterations, repeats=1, group_size=GROUP)
    for group in real_groups:
        torch.testing.assert_close(
            ours.factors(group.weights), theirs(group.weights, iterations), rtol=1e-4, atol=0, msg=group.name
        )


@pytest.mark.parametrize(("iterations", "repeats"), [(8, 1), (16, 2)])
def test_blocks_folded_in_the_authors_order(smollm2_folder, iterations, repeats):
    from transformers import AutoModelForCausalLM

    from qbench.testing.transforms import transformed

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval().requires_grad_(False)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    _, _, record, new = transformed(model, PreSINQ(iterations, repeats, GROUP, values=False))
    assert {row.name.rpartition(".")[2] for row in record.alone} == {"o_proj"}
    for layer, made in zip(model.model.layers, new.model.layers, strict=True):
        mlp, attention = layer.mlp, layer.self_attn
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        for _ in range(repeats):
            t = theirs([mlp.down_proj.weight], iterations)
            mlp.down_proj.weight /= t
            mlp.up_proj.weight *= t[:, None]
            for norm, linears in (
                (layer.input_layernorm, qkv),
                (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            ):
                t = theirs([linear.weight for linear in linears], iterations)
                norm.weight *= t
                for linear in linears:
                    linear.weight /= t
        for (name, expected), parameter in zip(layer.named_parameters(), made.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6, msg=name)
