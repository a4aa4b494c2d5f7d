"""Pre-SINQ's factors: what they even out, and what the settings change."""

from __future__ import annotations

import pytest
import torch

from qbench.quant.diagnostics import imbalance
from qbench.quant.sinkhorn import column_factors
from qbench.testing.transforms import transformed
from qbench.transforms.presinq import PreSINQ
from tests.transforms.test_function import of_block, uneven


def test_the_columns_come_out_more_even():
    attention = uneven("Llama").model.layers[0].self_attn
    rows = torch.cat([getattr(attention, f"{name}_proj").weight for name in "qkv"])
    t = PreSINQ(iterations=16).factors([rows])
    assert t.median() == 1
    before, after = rows.std(0), (rows / t).std(0)
    assert after.max() / after.min() < 1.5 < 2 < before.max() / before.min()
    assert imbalance(rows / t) < imbalance(rows)


def test_linears_of_a_norm_share_t_found_on_all_of_them():
    model = uneven("Llama")
    _, _, _, new = transformed(model, PreSINQ(iterations=8, repeats=1, values=False))
    attention = model.model.layers[0].self_attn
    rows = torch.cat([getattr(attention, f"{name}_proj").weight for name in "qkv"])
    [(t, _)] = column_factors([rows], 64, 8, 0.7, 2.0)
    gains = [m.model.layers[0].input_layernorm.weight for m in (new, model)]
    torch.testing.assert_close(gains[0] / gains[1], t / t.median())


def test_heads_of_o_that_share_values_share_t():
    model = uneven("Llama")  # four heads, two of values, 16 channels each
    _, _, _, new = transformed(model, PreSINQ(iterations=8, repeats=1))
    old, made = (m.model.layers[0].self_attn.o_proj.weight for m in (model, new))
    t = (old / made).mean(0)
    torch.testing.assert_close(old / made, t.expand_as(old))
    heads = t.view(2, 2, 16)  # [values' heads, heads that share it, channels]
    torch.testing.assert_close(heads[:, 0], heads[:, 1])
    assert heads.std() > 0.05
    alone = transformed(model, PreSINQ(iterations=8, repeats=1, values=False))[2]
    assert not [where for where in of_block(alone) if "v_proj" in where]


def test_the_choices_are_those_of_the_paper():
    pairs = [(one.iterations, one.repeats) for one in PreSINQ().choices("rtn")]
    assert pairs == [(2, 1), (2, 2), (8, 1), (8, 2), (16, 1), (16, 2)]
    assert [one.iterations for one in PreSINQ(repeats=1).choices("gguf/q4_0")] == [2, 4, 8, 16, 32]
    assert list(PreSINQ(iterations=4, repeats=1).choices("rtn")) == [PreSINQ(iterations=4, repeats=1)]


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"repeats": 0}, {"group_size": 1}, {"step_min": 2.0}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PreSINQ(**wrong)
