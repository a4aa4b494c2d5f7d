"""Hidden states between blocks: on the device or in host memory, the same to the bit."""

import pytest
import torch

from qbench.errors import RequestError
from qbench.passes import states
from qbench.passes.states import States, wait_on_host


def batches(device="cpu"):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 5, 8, generator=random).to(device) for rows in (3, 3, 2)]


def block(b, x):
    return x * (b + 2) + 1


def test_variants_share_what_they_begin_with_and_part_at_the_first_block():
    first = States(batches(), torch.device("cpu"))
    one, other = States.like(first), States.like(first)
    assert one[1] is other[1]
    assert one.through(block) is None
    assert torch.equal(one[2], block(2, batches()[2]))
    assert torch.equal(other[2], batches()[2])
    assert one.nbytes == sum(x.nbytes for x in batches())


def test_the_first_batch_that_is_not_finite_is_named():
    held = States(batches(), torch.device("cpu"))
    assert held.through(lambda b, x: x if b != 1 else x.where(x != x[2, 4, 1], torch.inf)) == 1


@pytest.mark.gpu
def test_states_in_host_memory_are_those_on_the_device():
    device = torch.device("cuda")
    here, away = (States(batches(device), device, on_host) for on_host in (False, True))
    for _ in range(5):
        assert here.through(block) is None
        assert away.through(block) is None
    for b in range(3):
        assert away[b].is_cuda
        assert torch.equal(here[b], away[b])
    assert away.through(lambda b, x: x * torch.nan if b == 2 else x) == 2


def test_where_states_wait_is_a_matter_of_room(monkeypatch):
    """1000 tokens of 64 numbers in 2 bytes, in 4 copies and one to spare: 0.64 MB."""
    cuda, asked = torch.device("cuda"), (1000, 64, 2, 4, 1 << 30)
    needed = 1000 * 64 * 2 * 5
    taken = states.KEEP_FREE_BYTES + states.BLOCKS * (1 << 30)
    for free, on_host in ((taken + needed, False), (taken + needed - 1, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 << 30))
        assert wait_on_host(*asked, cuda) is on_host
    assert not wait_on_host(*asked, torch.device("cpu"))
    memory = states.psutil.virtual_memory()
    monkeypatch.setattr(states.psutil, "virtual_memory", lambda: memory._replace(available=needed - 1))
    with pytest.raises(RequestError) as refused:
        wait_on_host(*asked, cuda)
    assert "task.max_windows" in str(refused.value)
    assert "\n" not in str(refused.value)
