"""The kernel that reads windows' logits, beside the same in plain torch; interpreted on a CPU."""

import pytest
import torch

from qbench.evaluate.score import WindowAsks, WindowReader

if torch.cuda.is_available():
    DEVICE, pytestmark = "cuda", pytest.mark.gpu
else:
    import tests.kernels.interpreted  # noqa: F401  skips without Triton

    DEVICE = "cpu"
from qbench.kernels.divergence import tokens


def logits(seed, rows=5, columns=5003, dtype=torch.float32, near=None):
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3
    return (noise if near is None else near.float().cpu() + 0.01 * noise).to(DEVICE, dtype)


def in_torch(q, p, targets):
    """As the reader computes it, in fp64."""
    ids = torch.cat([targets.new_zeros(1), targets]).cpu().numpy()[None]
    reader = WindowReader(WindowAsks(ids, 1, True))
    masked = bool(p is not None and (p.isinf().any() or q.isinf().any()))
    return torch.from_numpy(reader._in_torch(0, q.double(), None if p is None else p.double(), masked))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("near", [True, False])
def test_it_finds_what_torch_finds(dtype, near):
    p = logits(0, dtype=dtype)
    q = logits(1, dtype=dtype, near=p if near else None)
    targets = torch.tensor([0, 5002, 17, 4096, 9], device=DEVICE)
    found, wanted = tokens(q, targets, p).cpu().double(), in_torch(q, p, targets)
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-7)
    torch.testing.assert_close(tokens(q, targets, None).cpu()[0].double(), wanted[0], rtol=1e-6, atol=1e-6)


def test_equal_logits_differ_by_exactly_nothing():
    p = logits(2, dtype=torch.bfloat16)
    p[:, 100] = p[:, 4000] = p.amax(-1)  # tied for the most probable
    _, kl, reverse, agrees, change, _ = tokens(p.clone(), torch.zeros(5, dtype=torch.int64, device=DEVICE), p).cpu()
    assert kl.tolist() == reverse.tolist() == change.tolist() == [0] * 5
    assert agrees.tolist() == [1] * 5


def test_tokens_that_cannot_be_are_left_out_and_nan_stays():
    p, q = logits(3), logits(4)
    p[:, 5000:] = q[:, 5000:] = float("-inf")
    q[2, 7] = float("nan")
    targets = torch.full((5,), 11, device=DEVICE)
    found, wanted = tokens(q, targets, p).cpu().double(), in_torch(q, p, targets)
    rows = [0, 1, 3, 4]
    torch.testing.assert_close(found[:, rows], wanted[:, rows], rtol=2e-4, atol=2e-7)
    assert found[0, 2].isnan()
