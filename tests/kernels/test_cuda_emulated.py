"""The CUDA C++ kernels and their launch code against fp64, on the CPU: every unpacking, split, tail and option."""

from __future__ import annotations

import pytest
import torch

from qbench.kernels import attend, blocks, cuda, cuda_experts, grouped
from qbench.kernels.blocks import Plan, WidePlan
from qbench.kernels.routes import SLOT_ROWS, route
from qbench.kernels.tiles import to_tiles
from tests.kernels.cases import FORMATS, random_weight, relative_error

LIMITS = {torch.float16: 1e-3, torch.bfloat16: 1e-2}


def check(generator, weight, batch, dtype, plan, bias=None, x=None):
    x = torch.randn(batch, weight.shape[1], generator=generator).to(dtype) if x is None else x
    y = cuda.linear(x, to_tiles(weight), bias, plan)
    assert y.dtype == dtype
    assert relative_error(y, x, weight, bias) <= LIMITS[dtype]


@pytest.mark.slow
def test_one_row_through_registers(emulated, generator):
    check(generator, random_weight((40, 300), 4, 64, generator), 1, torch.bfloat16, Plan(1, 1, 1, 2, 1, 2))
    ((grid, threads, _, cluster),) = emulated
    assert (grid, threads, cluster) == ((3, 1, 1), 64, 1)


@pytest.mark.slow
def test_a_batch_through_the_ring_and_a_cluster(emulated, generator):
    bias = torch.randn(40, generator=generator).half()
    weight = random_weight((40, 600), 3, 64, generator)
    check(generator, weight, 5, torch.float16, Plan(1, 1, 1, 1, 2, 2, True), bias)
    assert len(emulated) == 2  # x * t first
    assert emulated[1][3] == 2
    check(generator, weight, 1, torch.float16, Plan(1, 1, 1, 1, 2, 2, True), bias)
    assert len(emulated) == 3  # of one row, every block makes x * t itself


@pytest.mark.slow
def test_a_wide_batch(emulated, generator):
    weight = random_weight((72, 600), 4, 64, generator)
    check(
        generator, weight, 19, torch.bfloat16, WidePlan(4, 1, 1, 2, 2), torch.randn(72, generator=generator).bfloat16()
    )
    assert [launch[:2] for launch in emulated] == [((1, 19, 1), 128), ((4, 1, 1), 160)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group_size", "dtype"), [(32, torch.float16), (64, torch.bfloat16), (64, torch.float16), (128, torch.bfloat16)]
)
@pytest.mark.parametrize(("nbits", "codebook"), FORMATS)
def test_every_format(emulated, generator, nbits, codebook, group_size, dtype):
    weight = random_weight((24, 330), nbits, group_size, generator, codebook=codebook)
    check(generator, weight, 1, dtype, Plan(1, 1, 1, 2, 1, 1))
    check(generator, weight, 3, dtype, Plan(1, 1, 2, 1, 2, 2, True))
    check(generator, weight, 11, dtype, WidePlan(2, 1, 1, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "plan"),
    [
        (9, Plan(2, 1, 2, 2, 1, 1)),
        (16, Plan(2, 2, 1, 1, 2, 2, True)),
        (20, Plan(2, 1, 2, 1, 2, 1)),  # two passes over the weights
        (16, WidePlan(2, 1, 1, 1, 2)),
        (17, WidePlan(4, 1, 1, 2, 2)),
        (64, WidePlan(8, 2, 1, 1, 2)),
        (64, WidePlan(8, 1, 2, 1, 4)),
        (30, WidePlan(4, 1, 3, 2, 6)),
        (70, WidePlan(8, 1, 1, 2, 3)),  # two passes
        (100, WidePlan(16, 1, 1, 1, 2)),
        (13, Plan(2, 1, 1, 2, 1, 2, True)),
    ],
)
def test_every_batch_shape(emulated, generator, batch, plan):
    check(generator, random_weight((72, 520), 4, 64, generator), batch, torch.bfloat16, plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group_size", "batch", "plan"),
    [
        (128, 9, Plan(2, 1, 1, 8, 2, 2, True)),
        (64, 3, Plan(1, 1, 2, 4, 2, 1)),
        (128, 33, WidePlan(16, 3, 1, 1, 2)),
    ],
)
def test_sums_that_take_more_memory_than_what_they_are_made_of(emulated, generator, group_size, batch, plan):
    """They leave the barriers alone, which the emulator sees to: of a GPU's nobody knows when they are done."""
    check(generator, random_weight((40, 200), 2, group_size, generator), batch, torch.bfloat16, plan)


@pytest.mark.slow
def test_before_hopper(emulated, generator, monkeypatch):
    """Without clusters, bulk copies and barriers for them."""
    monkeypatch.setattr(cuda, "_plain", lambda device: True)
    weight = random_weight((40, 300), 4, 64, generator)
    for batch in (1, 5, 11):
        (plan, *_) = blocks._by_rule(batch, 40, 300, plain=True)
        check(generator, weight, batch, torch.bfloat16, plan)


@pytest.mark.slow
def test_options(emulated, generator):
    plan = Plan(1, 1, 1, 1, 1, 1)
    for options in ({"zero": False}, {"t": False}, {"permuted": True}, {"zero": False, "codebook": True}):
        for batch, chosen in ((1, plan), (2, plan), (2, WidePlan(2, 1, 1, 1, 2))):
            check(generator, random_weight((16, 200), 4, 64, generator, **options), batch, torch.float16, chosen)
    weight = random_weight((16, 130), 4, 64, generator)
    strided = torch.randn(4, 261, generator=generator).half()[:, :130]
    check(generator, weight, 4, torch.float16, plan, x=strided)
    check(generator, weight, 4, torch.float16, WidePlan(2, 1, 1, 1, 2), x=strided)
    large = torch.randn(1, 130, generator=generator).clamp(-3, 3).half() * 2e4
    weight.input_scale.mul_(8)  # x * t exceeds fp16 unless t is scaled down
    weight.scale.stored.mul_(1e-4)
    check(generator, weight, 1, torch.float16, plan, x=large)
    check(generator, weight, 2, torch.float16, plan, x=large.repeat(2, 1))
    check(generator, weight, 2, torch.float16, WidePlan(2, 1, 1, 1, 2), x=large.repeat(2, 1))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [20000, 40000])  # of all pairs together
def test_experts_in_one_launch(emulated, generator, rows):
    """Of one stack, and of two that read the same x; some experts live elsewhere."""
    stacks = [random_weight((3, 24, 200), 4, 64, generator, permuted=True) for _ in range(2)]
    x = torch.randn(2, 200, generator=generator).bfloat16()
    index, plan = torch.tensor([[2, 0, 3], [1, 1, 9]]), blocks.pair_plan(rows)
    for count in (1, 2):
        ys = cuda.experts(x, index, [to_tiles(weight) for weight in stacks[:count]], plan)
        assert len(emulated) == count
        for weight, y in zip(stacks, ys, strict=False):
            dense = weight.dequantize().double()[index.clamp_max(2)]
            expected = torch.einsum("tkoi,ti->tko", dense, x.double())
            here = (index < 3).flatten()
            found = y.double()[here] - expected.view(6, 24)[here]
            assert found.norm() < 1e-2 * expected.view(6, 24)[here].norm()
    assert to_tiles(stacks[0]).select(1).shape == (24, 200)


@pytest.mark.parametrize(
    ("dtype", "permuted"), [(torch.bfloat16, False), pytest.param(torch.float16, True, marks=pytest.mark.slow)]
)
def test_experts_gate_what_they_multiply(emulated, generator, dtype, permuted):
    tiles = to_tiles(random_weight((2, 24, 130), 4, 64, generator, permuted=permuted))
    gate, up = (torch.randn(3, 130, generator=generator).to(dtype) for _ in range(2))
    index, plan = torch.tensor([[1], [0], [1]]), blocks.pair_plan(72)
    (y,) = cuda.experts(gate, index, [tiles], plan, up)
    (expected,) = cuda.experts(torch.nn.functional.silu(gate) * up, index, [tiles], plan)
    assert len(emulated) == 2
    assert (y.double() - expected.double()).norm() <= LIMITS[dtype] * expected.double().norm()


@pytest.mark.parametrize(
    ("dtype", "nbits", "permuted", "scored", "warps", "stages", "ring"),
    [
        (torch.bfloat16, 4, False, torch.float32, 8, 1, True),
        pytest.param(torch.float16, 3, True, torch.float16, 4, 1, False, marks=pytest.mark.slow),
    ],
)
def test_experts_add_up_what_they_multiply(emulated, generator, dtype, nbits, permuted, scored, warps, stages, ring):
    """Three pairs a token, a warp or two for each; one pair's expert lives elsewhere, and its row of x is no number."""
    tiles = to_tiles(random_weight((2, 24, 130), nbits, 64, generator, permuted=permuted))
    gate, up = (torch.randn(6, 130, generator=generator).to(dtype) for _ in range(2))
    index, scores = torch.tensor([[1, 0, 1], [0, 7, 1]]), torch.rand(2, 3, generator=generator).to(scored)
    gate[4] = float("nan")
    plan = Plan(1, 1, 1, warps, 1, stages, ring)
    y = cuda.summed_experts(gate, up, index, scores, tiles, plan)
    assert ((launch := emulated[0])[0], launch[1]) == ((2, 1, 2), 32 * warps)
    (each,) = cuda.experts(torch.nn.functional.silu(gate) * up, index.reshape(-1, 1), [tiles], blocks.pair_plan(72))
    expected = grouped.combine(each.double(), index, scores.double(), 2)
    assert y.dtype == dtype
    assert (y.double() - expected).norm() <= LIMITS[dtype] * expected.norm()
    assert torch.equal(y, cuda.summed_experts(gate, up, index, scores, tiles, plan))
    more = torch.randn(2, 24, generator=generator).to(dtype)
    y = cuda.summed_experts(gate, up, index, scores, tiles, plan, more)
    assert (y.double() - expected - more.double()).norm() <= LIMITS[dtype] * expected.norm()


def check_sorted_experts(generator, weight, tokens, per_token, dtype, plan, index=None):
    """Rows of x gathered, then sorted ones; experts that live elsewhere are left as they were."""
    experts, columns = weight.shape[0], weight.shape[2]
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    if index is None:
        index = torch.rand(tokens, experts + 1, generator=generator).argsort(-1)[:, :per_token]
    held, tiles, dense = route(index, experts, 8 * plan.batch_blocks), to_tiles(weight), weight.dequantize().double()
    here = int(held.starts[-1])
    assert 0 < here < len(held.token)
    expected = torch.einsum("poi,pi->po", dense[held.expert[:here].long()], x[held.token[:here].long()].double())
    gathered = cuda_experts.linear(x, tiles, held, True, plan)
    assert torch.equal(cuda_experts.linear(x[held.token.long()], tiles, held, False, plan)[:here], gathered[:here])
    assert gathered.dtype == dtype
    assert (gathered[:here].double() - expected).norm() <= LIMITS[dtype] * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nbits", "codebook", "group_size"),
    [(2, False, 128), (3, False, 32), (3, False, 64), (4, False, 64), (8, False, 64), (4, True, 32)],
)
def test_sorted_experts(emulated, generator, nbits, codebook, group_size):
    weight = random_weight((3, 40, 200), nbits, group_size, generator, codebook=codebook)
    check_sorted_experts(generator, weight, 5, 2, torch.bfloat16, WidePlan(2, 1, 1, 1, 2))
    assert [launch[0] for launch in emulated] == [(10, 1, 1), (1, 3, 1)] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "counts"),
    [
        (WidePlan(4, 1, 1, 1, 2), (9, 17, 32, 33)),
        (WidePlan(8, 1, 1, 1, 2), (3, 20, 45, 64)),
        (WidePlan(16, 1, 1, 1, 2), (33, 0, 97, 65)),
        (WidePlan(24, 1, 1, 1, 2), (49, 97, 0, 150)),
    ],
)
def test_slots_that_are_not_full(emulated, generator, plan, counts):
    """The products are of as many rows as a slot holds, up to the next quarter."""
    index = torch.repeat_interleave(torch.arange(5), torch.tensor([*counts, 2])).unsqueeze(-1)
    index = index[torch.randperm(len(index), generator=generator)]
    weight = random_weight((4, 24, 130), 4, 64, generator)
    check_sorted_experts(generator, weight, len(index), 1, torch.bfloat16, plan, index)


@pytest.mark.slow
def test_sorted_experts_of_every_kind(emulated, generator):
    """More pairs than a slot holds; splits of K; act-order; no t; fp16."""
    permuted = random_weight((3, 72, 330), 4, 64, generator, permuted=True)
    check_sorted_experts(generator, permuted, 30, 3, torch.float16, WidePlan(2, 2, 1, 1, 2))
    check_sorted_experts(generator, permuted, 30, 3, torch.bfloat16, WidePlan(4, 1, 1, 2, 2))
    check_sorted_experts(generator, random_weight((2, 24, 130), 4, 64, generator, t=False), 30, 2, torch.bfloat16,
                         WidePlan(2, 1, 2, 1, 4))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("nbits", "codebook"), FORMATS)
def test_dequantize_bit_for_bit(emulated, generator, nbits, codebook):
    for group_size, columns, dtype in ((32, 136, torch.float16), (64, 130, torch.bfloat16), (128, 264, torch.float32)):
        weight = random_weight((24, columns), nbits, group_size, generator, codebook=codebook)
        assert torch.equal(cuda.dequantize(to_tiles(weight), dtype), weight.dequantize(dtype))


def test_rows_of_heads_in_one_weight(emulated, generator):
    """Every head's own rows of one weight: written, and multiplied with that head's row of x."""
    weight = random_weight((3 * 48, 200), 4, 64, generator)
    tiles, dense = to_tiles(weight), weight.dequantize(torch.bfloat16).view(3, 48, 200)
    first, last = (attend._of_heads(tiles, 3, *rows) for rows in ((0, 16), (16, 48)))
    assert first.data.data_ptr() == tiles.data.data_ptr()
    assert torch.equal(cuda.dequantize(first, torch.bfloat16), dense[:, :16])
    x = torch.randn(3, 200, generator=generator).bfloat16()
    y = cuda.own_matrices(x, last, blocks.pair_plan(96))
    expected = torch.einsum("hoi,hi->ho", weight.dequantize().double().view(3, 48, 200)[:, 16:], x.double())
    assert (y.double() - expected).norm() <= 1e-2 * expected.norm()


def test_dequantize_a_stack(emulated, generator):
    weight = random_weight((3, 24, 130), 4, 64, generator)
    assert torch.equal(cuda.dequantize(to_tiles(weight), torch.bfloat16), weight.dequantize(torch.bfloat16))
    assert len(emulated) == 1


def test_a_warpgroup_keeps_to_its_own_stages():
    for stages in (2, 3):
        with pytest.raises(ValueError, match="times splits_in_block"):
            WidePlan(8, 1, 2, 1, stages)


@pytest.mark.parametrize("shape", [(1, 1, 2, 3, 1, 2), (1, 1, 2, 2, 3, 2), (1, 1, 8, 4, 1, 2)])
def test_a_plan_that_the_kernel_cannot_run_is_refused(shape):
    with pytest.raises(ValueError, match=r"must be 1, 2, 4|at most 16 warps"):
        Plan(*shape)


def test_plans_of_slots_fit():
    for rows in SLOT_ROWS:
        for N, K in ((768, 2048), (2048, 768), (5120, 1536), (40, 65)):
            for form in ((4, 64, True), (8, 32, True), (2, 128, False)):
                plan = cuda_experts._plan(rows, N, K, form, 232448)
                assert plan is not None, (rows, N, K, form)
                assert plan.shared_bytes(rows, -(-K // 128), *form) <= 232448
                assert 8 * plan.batch_blocks == rows


def test_plans_fit():
    """Every shape and batch gets a plan whose shared memory an H200 has, tuned entries included."""
    for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "another GPU"):
        for M in (1, 2, 8, 9, 17, 33, 64, 65, 128, 200):
            for N, K in (
                (4096, 4096),
                (12288, 4096),
                (4096, 12288),
                (1024, 4096),
                (5120, 25600),
                (25600, 5120),
                (40, 65),
            ):
                for form in ((4, 64, True), (8, 32, True), (2, 128, False)):
                    plan = blocks._plan(M, N, K, form, gpu, 232448)
                    assert plan is not None, (M, N, K, form)
                    assert plan.shared_bytes(M, -(-K // 128), *form) <= 232448
                    assert plan.batch_blocks * 8 >= M or M > 128  # then in several passes
        assert blocks._plan(8192, 12288, 4096, (4, 64, True), gpu, 232448) is None, "W is written"
