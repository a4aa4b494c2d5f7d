import pytest
import torch

from qbench.format.packing import WIDTHS, pack, unpack

SHAPES = [(1, 1), (7, 33), (3, 64), (5, 576), (2, 3, 17)]


@pytest.mark.parametrize("nbits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_exact_and_dense(nbits, shape, generator):
    codes = torch.randint(0, 2**nbits, shape, generator=generator, dtype=torch.uint8)
    planes = pack(codes, nbits)
    assert torch.equal(unpack(planes, nbits, shape[-1]), codes)
    rows = codes[..., 0].numel()
    assert sum(p.numel() for p in planes) == rows * sum(-(-shape[-1] * width // 8) for width in WIDTHS[nbits])


def test_three_bits_cost_three_bits():
    planes = pack(torch.zeros(16, 576, dtype=torch.uint8), 3)
    assert 8 * sum(p.numel() for p in planes) == 3 * 16 * 576


@pytest.mark.parametrize("nbits", WIDTHS)
def test_non_contiguous_and_wider_integers(nbits, generator):
    codes = torch.randint(0, 2**nbits, (40, 9), generator=generator)
    transposed = codes.T
    assert not transposed.is_contiguous()
    assert torch.equal(unpack(pack(transposed, nbits), nbits, 40), transposed.to(torch.uint8))


def test_first_channel_sits_in_the_lowest_bits():
    assert pack(torch.tensor([[1, 2]]), 4)[0].tolist() == [[0x21]]
    assert pack(torch.tensor([[7, 0, 5, 0]]), 3)[0].tolist() == [[0b00_01_00_11]]
    assert pack(torch.tensor([[7, 0, 5, 0]]), 3)[1].tolist() == [[0b0101]]


@pytest.mark.parametrize("bad", [-1, 8])
def test_codes_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"codes of 3 bits lie in 0\.\.7"):
        pack(torch.tensor([[0, bad]]), 3)


@pytest.mark.parametrize("nbits", [0, 5, 7, 16])
def test_other_widths_are_refused(nbits):
    with pytest.raises(ValueError, match="nbits must be one of"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), nbits)
