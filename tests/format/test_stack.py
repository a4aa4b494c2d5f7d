import pytest
import torch

from qbench.format.weight import QuantizedWeight
from qbench.layers.linear import PackedWeight
from qbench.quant.rounding import round_to_nearest


def some(generator, nbits=4, aux_dtype="fp16", count=3, **options):
    # 7 rows x 5 groups: blocks of int8 aux end inside a matrix, and a row's last group is ragged
    weights = [torch.randn(7, 70, generator=generator) for _ in range(count)]
    form = dict(nbits=nbits, group_size=16, aux_dtype=aux_dtype, method="rtn") | options
    return [round_to_nearest(w, **form) for w in weights]


@pytest.mark.parametrize("aux_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
def test_a_stack_keeps_every_matrix_bit_for_bit(generator, nbits, aux_dtype):
    ones = some(generator, nbits, aux_dtype, input_scale=torch.rand(70, generator=generator) + 0.5)
    whole = QuantizedWeight.stack(ones)
    assert whole.shape == (3, 7, 70)
    assert whole.nbytes == sum(one.nbytes for one in ones)
    dense = whole.dequantize()
    for i, one in enumerate(ones):
        part = whole.select(i)
        assert part.shape == one.shape
        assert torch.equal(part.dequantize(), one.dequantize())
        assert torch.equal(dense[i], one.dequantize())
        assert part.planes[0].data_ptr() == whole.planes[0][i].data_ptr()


def test_a_codebook_is_stored_once_and_must_be_shared(generator):
    one, two = (
        QuantizedWeight.build(q.codes(), q.scale, nbits=4, group_size=16, codebook=torch.arange(16.0))
        for q in some(generator, count=2)
    )
    whole = QuantizedWeight.stack([one, two])
    assert whole.codebook.shape == (16,)
    assert torch.equal(whole.select(1).dequantize(), two.dequantize())
    other = QuantizedWeight.build(two.codes(), two.scale, nbits=4, group_size=16, codebook=torch.ones(16))
    with pytest.raises(ValueError, match="share their codebook"):
        QuantizedWeight.stack([one, other])


def test_formats_that_differ_are_refused_by_name(generator):
    four = some(generator, count=1)
    with pytest.raises(ValueError, match="share their nbits, got 4 and 3"):
        QuantizedWeight.stack(four + some(generator, nbits=3, count=1))
    with pytest.raises(ValueError, match="share their group_size, got 16 and 32"):
        QuantizedWeight.stack(four + some(generator, group_size=32, count=1))
    with pytest.raises(ValueError, match="share their tensors"):
        QuantizedWeight.stack(four + some(generator, aux_dtype="int8", count=1))


def test_a_packed_stack_keeps_its_precision_when_the_model_is_cast(generator):
    whole = QuantizedWeight.stack(some(generator))
    held = PackedWeight(whole).to(torch.bfloat16)
    assert torch.equal(held.quantized.dequantize(), whole.dequantize())
